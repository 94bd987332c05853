"""Where results go: standard output, a pipe, or a file that appears when it is complete.

Until then, `OUT.partial` holds its rows, so that a later run can continue after them. It holds JSON
lines. Each is handed to the operating system before the next row is worked on, so that neither
Ctrl-C nor `kill -9` loses one; an incomplete last line is dropped. `OUT.partial.run` beside it says
what was run on which inputs: only the same run may continue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from ..artifact.folder import BAD_JSON, check_outside, lock
from ..errors import FpabeeError, InputError
from .formats import is_plain_file
from .records import Record, records_of, to_json
from .sources import STANDARD_INPUT, Inputs

Convert = Callable[[Path, Path], object]


def check_output(output: Path, sources: Sequence[str]) -> None:
    """Check that results would replace neither an input nor a file of a model.

    Args:
        output: the file to write.
        sources: the inputs, which exist; `-` is standard input.

    Raises:
        InputError: one of them is the output, or the output is inside the folder of a model.
    """
    check_outside(output)
    if not output.is_file():
        return
    for source in sources:
        if source != STANDARD_INPUT and output.samefile(source):
            raise InputError(
                f"{output} is an input, which the results would replace",
                "set another `output`",
            )


@contextmanager
def open_output(
    output: Path | None,
    table: Convert | None,
    inputs: Inputs,
    settings: dict[str, Any],
    resume: bool,
) -> Iterator[tuple[Callable[[Record], object], Iterator[Record]]]:
    """Open the output.

    A file gets its name when it is complete. Until then, and after an error or Ctrl-C, its rows
    are in `OUT.partial`.

    Args:
        output: the file; None for standard output.
        table: converts a file of JSON lines to another one, which is the output; None: the output
            takes JSON lines.
        inputs: what is read; hashed only if the output is a file.
        settings: what is run on them.
        resume: whether to continue after the rows that an earlier run has done.

    Yields:
        What takes the next record; and the records that an earlier run has written, once.

    Raises:
        InputError: the output cannot be written, or an earlier run left rows that do not fit.
        KeyboardInterrupt: Ctrl-C; if rows are done, with an error that says where they are kept.
    """
    partial = None
    is_file = is_plain_file(output)
    shared = settings | inputs.identity(resume) if is_file else {}
    try:
        if output is None or not is_file:
            with _stream(output) as stream:
                yield lambda record: stream.write(to_json(record) + "\n"), iter(())
            return
        # A link stays; the file that it leads to is replaced.
        partial = Partial(Path(os.path.realpath(output)), shared, resume)
        with closing(partial.records()) as completed:
            yield partial.write, completed
        partial.finish(table)
    except BrokenPipeError:
        raise
    except BaseException as error:
        done = partial.leave() if partial else ""
        hint = "use `resume` to continue"
        if isinstance(error, OSError):
            if not done:
                elsewhere = "set another `output`"
                hint = elsewhere if output else f"free some space there, or {elsewhere}"
            more = done and f"; {done}"
            raise InputError(
                f"cannot write {output or 'standard output'}: {error.strerror}{more}", hint
            ) from error
        if done and isinstance(error, FpabeeError):
            raise type(error)(f"{error.message}; {done}", error.hint) from error
        if done and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(InputError(done, hint)) from error
        raise


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

    Raises:
        InputError: the rows are from another run, would be lost, or are being written by another
            process.
        OSError: the file cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self._settings_path = output.with_name(output.name + ".partial.run")
        self._settings = settings
        existed = self.path.exists()
        # Opened to append, because nothing may be lost before the checks below.
        self._stream = self.path.open("ab")
        is_locked = False
        try:
            self._lock()
            is_locked = True
            self.rows, size = _whole_lines(self.path)
            if self.rows and not resume:
                raise InputError(
                    f"{self.path} holds {self.rows} rows of a run that did not finish",
                    "use `resume` to continue, or delete it to start again",
                )
            if self.rows:
                self._check()
            else:
                self._write_settings()
            self._stream.truncate(size)
        except BaseException:
            self._stream.close()
            if is_locked and not existed:  # else it is the file of another process
                self.path.unlink()
            raise

    def records(self) -> Generator[Record]:
        """The records that an earlier run has written.

        Raises:
            InputError: they are damaged.
        """
        index = 0
        try:
            for index, record in zip(range(self.rows), records_of(self.path), strict=False):
                if record["index"] != index or not {"exit", "results", "error"} & record.keys():
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

    def finish(self, table: Convert | None) -> None:
        """Turn the rows into the output, and delete everything else; see `open_output`."""
        made = self.path
        try:
            if table is not None:
                made = self.output.with_name(self.output.name + ".partial.out")
                table(self.path, made)
            with made.open("rb+") as stream:
                os.fsync(stream.fileno())
            # Another run may use both names as soon as the rows are the output.
            self._settings_path.unlink(missing_ok=True)
            try:
                made.replace(self.output)
            except OSError:
                self._write_settings()
                raise
        finally:
            if made != self.path:
                made.unlink(missing_ok=True)
        self.close(keep=made == self.path)

    def close(self, keep: bool) -> None:
        """Close the file, and delete it unless it is to be kept."""
        try:
            self._stream.close()
        finally:
            if not keep:
                self.path.unlink(missing_ok=True)
                self._settings_path.unlink(missing_ok=True)

    def leave(self) -> str:
        """Close the file after an error; returns where finished rows are, if there are any."""
        # On a full disk closing fails too: the next run drops the line that is incomplete.
        with contextlib.suppress(OSError):
            self.close(keep=self.rows > 0)
        return f"{self.rows} finished rows are in {self.path}" if self.rows else ""

    def _lock(self) -> None:
        try:
            lock(self._stream.fileno())
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another run",
                "wait for that run, or set another `output`",
            ) from error

    def _write_settings(self) -> None:
        self._settings_path.write_text(to_json(self._settings) + "\n", encoding="utf-8")

    def _check(self) -> None:
        """Check that the rows are those of the same run.

        Raises:
            InputError: the settings of the earlier run are different or unknown.
        """
        hint = f"delete {self.path} to start again"
        try:
            earlier = msgspec.json.decode(self._settings_path.read_bytes(), type=dict[str, Any])
        except (OSError, *BAD_JSON) as error:
            raise InputError(
                f"{self._settings_path}, which says what was run, is missing or damaged", hint
            ) from error
        for name, value in self._settings.items():
            before = to_json(earlier.get(name))
            now = to_json(value)
            if before != now:
                raise InputError(
                    f"{self.path} is from another run: {name} was {before} and is {now}",
                    f"run it as before, or {hint}",
                )


def _whole_lines(path: Path) -> tuple[int, int]:
    """The number of complete lines, and their size in bytes."""
    count = size = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                count = count + 1
                size = size + len(line)
    return count, size


@contextmanager
def _stream(output: Path | None) -> Iterator[IO[str]]:
    if output is None and sys.stdout is None:  # closed before Python began
        raise OSError(errno.EBADF, "it is closed")
    target: Any = output or sys.stdout.fileno()
    # Buffered by lines, so that each record is handed to the operating system at once.
    with open(target, "w", 1, encoding="utf-8", newline="", closefd=bool(output)) as stream:
        yield stream
