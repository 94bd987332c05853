"""Where results go: standard output, a pipe, or a file that appears only when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..cli.console import echo
from ..errors import FpabeeError, InputError
from . import STANDARD_INPUT
from .partial import Partial
from .records import Record, RecordSchema
from .writers import OutputFormat, StreamWriter, convert

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Destination:
    """Where results go, and as what.

    Attributes:
        output: the file; None for standard output.
        chosen: the format.
        resume: whether to go on with the rows that an earlier run has done.
        unbuffered: whether each record is handed to the system at once; of files all are.
    """

    output: Path | None
    chosen: OutputFormat
    resume: bool = False
    unbuffered: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is a file, which is replaced as a whole; not a pipe or a device."""
        return self.output is not None and (self.output.is_file() or not self.output.exists())

    def check_inputs(self, sources: Sequence[str]) -> None:
        """Check that no input would be replaced by its results.

        Args:
            sources: the inputs, which are there; `-` is standard input.

        Raises:
            InputError: one of them is the output.
        """
        if self.output is None or not self.output.is_file():
            return
        for source in sources:
            if source != STANDARD_INPUT and self.output.samefile(source):
                raise InputError(
                    f"{self.output} is an input: its results would take its place",
                    "give another --output",
                )


@dataclass(frozen=True)
class Sink:
    """An output that is open.

    Attributes:
        write: takes the next record.
        completed: the records that an earlier run has written; it yields them once.
    """

    write: Callable[[Record], None]
    completed: Iterator[Record]


@contextmanager
def open_sink(
    destination: Destination, schema: RecordSchema, settings: Callable[[], dict[str, Any]]
) -> Iterator[Sink]:
    """Open the output.

    A file gets its name when all is written; until then, and after an error or Ctrl-C, its
    rows are in `OUT.partial`.

    Args:
        destination: where results go.
        schema: what records hold.
        settings: tells what is run, on what; asked for only where a run can be resumed.

    Raises:
        InputError: it cannot be written, or what stands there is of another run.
    """
    if not destination.is_file:
        with _errors_named(destination.output), _stream(destination) as stream:
            writer = StreamWriter(stream, destination.chosen, schema)
            yield Sink(writer.write, iter(()))
            writer.finish()
        return
    assert destination.output is not None
    # The file behind a link is replaced, not the link.
    output = Path(os.path.realpath(destination.output))
    with _errors_named(destination.output):
        partial = Partial(output, settings(), destination.resume)
    try:
        yield Sink(partial.write, partial.records())
        partial.sync()
        _finish(partial, output, destination.chosen, schema)
    except KeyboardInterrupt:
        _close(partial)
        done = _completed(partial)
        echo("interrupted" + (f" -> {done}; go on with --resume" if done else ""), err=True)
        sys.exit(INTERRUPTED)
    except FpabeeError as error:
        _close(partial)
        done = _completed(partial)
        if done:
            raise type(error)(error.message, f"{error.hint}; {done}") from error
        raise
    except OSError as error:
        _close(partial)
        done = _completed(partial)
        hint = f"free some space, then go on with --resume; {done}" if done else "free some space"
        raise InputError(f"cannot write {output}: {error.strerror}", hint) from error
    except BaseException:
        _close(partial)
        raise


def _finish(partial: Partial, output: Path, chosen: OutputFormat, schema: RecordSchema) -> None:
    if chosen is OutputFormat.JSON_LINES and output.suffix != ".gz":
        partial.become(output)
        partial.close(keep=True)
        return
    table = output.with_name(output.name + ".partial.out")
    try:
        convert(partial.path, table, chosen, schema, output)
        with table.open("rb") as stream:
            os.fsync(stream.fileno())
        table.replace(output)
    finally:
        table.unlink(missing_ok=True)
    partial.close(keep=False)


def _close(partial: Partial) -> None:
    # A full disk, once more: what could not be written is cut off by the next run.
    with contextlib.suppress(OSError):
        partial.close(keep=partial.rows > 0)


def _completed(partial: Partial) -> str:
    return f"{partial.rows} rows done so far are in {partial.path}" if partial.rows else ""


@contextmanager
def _stream(destination: Destination) -> Iterator[IO[str]]:
    output = destination.output
    # A record ends with its line.
    buffering = 1 if destination.unbuffered else -1
    if output is None:
        if sys.stdout is None:  # closed before Python began
            raise OSError(errno.EBADF, "it is closed")
        target: Any = sys.stdout.fileno()
        with open(target, "w", buffering, encoding="utf-8", newline="", closefd=False) as stream:
            yield stream
        return
    with output.open("w", buffering, encoding="utf-8", newline="") as stream:
        yield stream


@contextmanager
def _errors_named(output: Path | None) -> Iterator[None]:
    name = "standard output" if output is None else str(output)
    try:
        if output is not None and output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot write {name}: {error.strerror}",
            "give another --output"
            if output is not None
            else "make room where it goes to, or give --output",
        ) from error
