"""`OUT.partial`: the rows that a run has done, so that a later run can continue after them.

It holds JSON lines. Each is handed to the operating system before the next row is worked on, so
that neither Ctrl-C nor `kill -9` loses one; an incomplete last line is dropped. `OUT.partial.run`
beside it says what was run on which inputs: only the same run may continue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..artifact.folder import BAD_JSON
from ..errors import InputError, Remedy
from .records import Record, to_json
from .writers import records_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Partial:
    """The rows of one output file that are done.

    Args:
        output: the file that they are for.
        settings: what is run on which inputs.
        resume: whether to continue after the rows of an earlier run.

    Attributes:
        output: as given.
        path: the file that holds them.
        rows: how many are done.
        completed: how many of these were done by an earlier run.

    Raises:
        InputError: the rows are from another run, would be lost, or are being written by another
            process.
        OSError: the file cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self._settings_path = output.with_name(output.name + ".partial.run")
        existed = self.path.exists()
        # Opened to append, because nothing may be lost before the checks below.
        self._stream = self.path.open("ab")
        try:
            self._lock()
            self.rows, size = _whole_lines(self.path)
            if self.rows and not resume:
                raise InputError(
                    f"{self.path} holds {self.rows} rows of a run that did not finish",
                    Remedy("use {resume} to continue, or delete it to start again"),
                )
            if self.rows:
                self._check(settings)
            else:
                self._settings_path.write_text(to_json(settings) + "\n", encoding="utf-8")
            self._stream.truncate(size)
        except BaseException:
            self._stream.close()
            if not existed:
                self._delete()
            raise
        self.completed = self.rows

    def records(self) -> Iterator[Record]:
        """The records that an earlier run has written.

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
                f"{self.path}, line {index + 1} is damaged", "delete the file to start again"
            ) from error

    def write(self, record: Record) -> None:
        """Add a record; the operating system has it when this returns."""
        self._stream.write(to_json(record).encode() + b"\n")
        self._stream.flush()
        self.rows += 1

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self, keep: bool) -> None:
        """Close the file, and delete it unless it is to be kept."""
        try:
            self._stream.close()
        finally:
            if not keep:
                self._delete()

    def become_output(self) -> None:
        """Turn the file into the output; another run may use its name at once."""
        self.path.replace(self.output)
        self._stream.close()
        self._settings_path.unlink(missing_ok=True)

    def _delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self._settings_path.unlink(missing_ok=True)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another run",
                Remedy("wait for that run, or set another {output}"),
            ) from error

    def _check(self, settings: dict[str, Any]) -> None:
        """Check that the rows are those of the same run.

        Raises:
            InputError: the settings of the earlier run are different or unknown.
        """
        remedy = f"delete {self.path} to start again"
        try:
            earlier = msgspec.json.decode(self._settings_path.read_bytes(), type=dict[str, Any])
        except (OSError, *BAD_JSON) as error:
            raise InputError(
                f"{self._settings_path}, which says what was run, is missing or damaged", remedy
            ) from error
        for name, value in settings.items():
            before, now = to_json(earlier.get(name)), to_json(value)
            if before != now:
                raise InputError(
                    f"{self.path} is from another run: {name} was {before} and is {now}",
                    f"run it as before, or {remedy}",
                )


def _whole_lines(path: Path) -> tuple[int, int]:
    """The number of complete lines, and their size in bytes."""
    count = size = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                count, size = count + 1, size + len(line)
    return count, size
