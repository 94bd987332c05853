"""`OUT.partial`: the rows of a run that are done, so that a later run can go on with them.

Rows stand in it as JSON lines, each handed to the system before the next one is worked on, so
that neither Ctrl-C nor `kill -9` loses one. `OUT.partial.run` beside it says what was run on
which inputs; only the same run may go on. A last line that was cut off is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .records import Record, to_json
from .writers import records_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BLOCK_BYTES = 2**16


class Partial:
    """The rows done so far of one output file.

    Args:
        output: the file that they are for.
        settings: what is run, on what.
        resume: whether to go on with what stands there.

    Raises:
        InputError: what stands there is of another run, or would be lost, or is being
            written by another process.
        OSError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = output.with_name(output.name + ".partial")
        self._settings_path = output.with_name(output.name + ".partial.run")
        self.rows = 0
        existed, had_settings = self.path.exists(), self._settings_path.exists()
        # Opened to append: nothing is lost before we know that it may be.
        self._stream = self.path.open("ab")
        try:
            self._lock()
            whole, self.rows = _whole_lines(self.path)
            if self.rows and not resume:
                raise InputError(
                    f"{self.path} holds {self.rows} rows of a run that did not finish",
                    "go on with --resume, or delete it to start again",
                )
            if self.rows:
                self._check(settings)
            else:
                self._write_settings(settings)
            self._stream.truncate(whole)
        except BaseException:
            self._stream.close()
            if not existed:
                self.path.unlink(missing_ok=True)
                if not had_settings:
                    self._settings_path.unlink(missing_ok=True)
            raise
        self.completed = self.rows

    def records(self) -> Iterator[Record]:
        """The records that stood there at the start.

        Raises:
            InputError: they are damaged.
        """
        index = 0
        try:
            for index, record in zip(range(self.completed), records_of(self.path), strict=False):
                if record["index"] != index:
                    raise ValueError
                yield record
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.path}, line {index + 1} is not what this program writes",
                "delete the file to start again",
            ) from error

    def write(self, record: Record) -> None:
        """Add a record; it stands there when this returns."""
        self._stream.write(to_json(record).encode() + b"\n")
        self._stream.flush()
        self.rows += 1

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self, keep: bool) -> None:
        """Close the file; drop it unless it is to be kept."""
        try:
            self._stream.close()
        finally:
            if not keep:
                self.path.unlink(missing_ok=True)
                self._settings_path.unlink(missing_ok=True)

    def become(self, output: Path) -> None:
        """Be the output."""
        self.path.replace(output)
        self._settings_path.unlink(missing_ok=True)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another run",
                "wait for it, or give another --output",
            ) from error

    def _write_settings(self, settings: dict[str, Any]) -> None:
        self._settings_path.write_text(to_json(settings) + "\n", encoding="utf-8")

    def _check(self, settings: dict[str, Any]) -> None:
        again = f"delete {self.path} to start again"
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._settings_path}, which says what was run, is missing or damaged", again
            ) from error
        # As they would be read: tuples are lists there.
        now = json.loads(to_json(settings))
        for name in now:
            if not isinstance(before, dict) or before.get(name) != now[name]:
                was = before.get(name) if isinstance(before, dict) else None
                raise InputError(
                    f"{self.path} is of another run: {_difference(name, was, now[name])}",
                    f"run it as before, or {again}",
                )


def _difference(name: str, before: Any, now: Any) -> str:
    if name != "inputs" or not isinstance(before, list) or len(before) != len(now):
        return f"{name} was {to_json(before)} and is {to_json(now)}"
    for was, item in zip(before, now, strict=True):
        if was != item:
            same = isinstance(was, dict) and was.get("name") == item["name"]
            return f"{item['name']} has changed" if same else f"{item['name']} was not its input"
    return "its inputs differ"


def _whole_lines(path: Path) -> tuple[int, int]:
    """Bytes and number of the lines that are whole."""
    end = position = count = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            count += block.count(b"\n")
            last = block.rfind(b"\n")
            if last >= 0:
                end = position + last + 1
            position += len(block)
    return end, count
