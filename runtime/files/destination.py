"""Where results go: standard output, a pipe, or a file that appears when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..artifact.folder import check_outside
from ..errors import FpabeeError, InputError, Remedy
from .formats import TextFormat, is_plain_file
from .partial import Partial
from .records import Record, RecordSchema, to_json
from .sources import STANDARD_INPUT
from .writers import convert


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that can be continued.

    Attributes:
        message: where the rows that are done are kept.
        remedy: how to continue.
    """

    def __init__(self, message: str, remedy: Remedy) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


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
                Remedy("set another {output}"),
            )


@contextmanager
def open_output(
    output: Path | None,
    chosen: TextFormat,
    resume: bool,
    schema: RecordSchema,
    settings: Callable[[], dict[str, Any]],
) -> Iterator[tuple[Callable[[Record], object], Iterator[Record]]]:
    """Open the output.

    A file gets its name when it is complete. Until then, and after an error or Ctrl-C, its rows
    are in `OUT.partial`.

    Args:
        output: the file; None for standard output.
        chosen: its format; a pipe or a device takes JSON lines.
        resume: whether to continue after the rows that an earlier run has done.
        schema: what the records contain.
        settings: returns what is run on which inputs; called only if the output is a file.

    Yields:
        What takes the next record; and the records that an earlier run has written, once.

    Raises:
        InputError: the output cannot be written, or an earlier run left rows that do not fit.
        Interrupted: Ctrl-C, and the rows that are done are kept.
    """
    try:
        if output is not None and is_plain_file(output):
            # A link stays; the file that it leads to is replaced.
            partial = Partial(Path(os.path.realpath(output)), settings(), resume)
            with _kept(partial):
                yield partial.write, partial.records()
                partial.sync()
                _finish(partial, chosen, schema)
        else:
            with _stream(output) as stream:
                yield lambda record: stream.write(to_json(record) + "\n"), iter(())
    except BrokenPipeError:
        raise
    except OSError as error:
        remedy = "set another {output}" if output else "free some space there, or set {output}"
        raise InputError(
            f"cannot write {output or 'standard output'}: {error.strerror}", Remedy(remedy)
        ) from error


@contextmanager
def _kept(partial: Partial) -> Iterator[None]:
    """After an error, keep the finished rows and say where they are."""
    try:
        yield
    except BaseException as error:
        # On a full disk closing fails too: the next run drops the line that is incomplete.
        with contextlib.suppress(OSError):
            partial.close(keep=partial.rows > 0)
        if not partial.rows:
            raise
        done = f"{partial.rows} finished rows are in {partial.path}"
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {partial.output}: {error.strerror}; {done}",
                Remedy("free some space, then use {resume} to continue"),
            ) from error
        if isinstance(error, FpabeeError):
            raise type(error)(f"{error.message}; {done}", error.remedy) from error
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(done, Remedy("use {resume} to continue")) from error
        raise


def _finish(partial: Partial, chosen: TextFormat, schema: RecordSchema) -> None:
    output = partial.output
    if chosen is TextFormat.JSON_LINES:
        partial.become_output()
        return
    table = output.with_name(output.name + ".partial.out")
    try:
        convert(partial.path, table, chosen, schema)
        with table.open("rb") as stream:
            os.fsync(stream.fileno())
        table.replace(output)
    finally:
        table.unlink(missing_ok=True)
    partial.close(keep=False)


@contextmanager
def _stream(output: Path | None) -> Iterator[IO[str]]:
    if output is None and sys.stdout is None:  # closed before Python began
        raise OSError(errno.EBADF, "it is closed")
    target: Any = output or sys.stdout.fileno()
    # Buffered by lines, so that each record is handed to the operating system at once.
    with open(target, "w", 1, encoding="utf-8", newline="", closefd=bool(output)) as stream:
        yield stream
