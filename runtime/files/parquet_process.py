"""Read a Parquet file in a child process.

pyarrow ends the whole process on some damaged files: its C++ code aborts where Python would raise.
So a child process reads the file and sends its rows as lines of JSON. If the child dies, the caller
gets an `InputError`. The child ends as soon as its standard input is closed: when the caller stops
reading, and also when the caller is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import msgspec

from ..errors import FpabeeError, InputError, MissingExtraError, Remedy, RowError
from .parquet import parquet_rows
from .rows import ReadOptions, Row

# Lines are sent when there are this many bytes, or when a batch of rows has been read.
_BUFFER_BYTES = 2**18
# The child imports from where its caller does, and not from the working folder.
_START = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main()"
_ERRORS: dict[str, type[FpabeeError]] = {
    error.__name__: error for error in (InputError, MissingExtraError, RowError)
}


class _Failure(msgspec.Struct, array_like=True):
    """An error on its way to the caller."""

    kind: str
    message: str
    remedy: str
    values: dict[str, str]

    @classmethod
    def of(cls, error: FpabeeError) -> _Failure:
        remedy = error.remedy
        if isinstance(remedy, str):
            remedy = Remedy("{plain}", plain=remedy)
        values = {name: str(value) for name, value in remedy.values.items()}
        return cls(type(error).__name__, error.message, remedy.text, values)

    def error(self) -> FpabeeError:
        return _ERRORS[self.kind](self.message, Remedy(self.remedy, **self.values))


# A line of what the child sends: a row, an error, the share of the rows that has been read, a
# traceback, or null at the end.
_Line = Row | _Failure | float | str | None


def isolated_parquet_rows(
    path: Path, options: ReadOptions, progress: Callable[[float], None]
) -> Iterator[Row | RowError]:
    """One row for each row of a Parquet file, which a child process reads.

    Args:
        path: the file.
        options: which columns are text and labels; the others are passed through.
        progress: called with the share of the rows that has been read.

    Raises:
        InputError: the file is damaged, or a column is missing or has the wrong type.
        MissingExtraError: pyarrow cannot be imported.
        RuntimeError: a defect of the reader, with the child's traceback.
    """
    decoder: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line)
    with _start(path, options) as process:
        try:
            assert process.stdout is not None
            for content in process.stdout:
                if not content.endswith(b"\n"):  # cut off
                    break
                line = decoder.decode(content)
                if isinstance(line, Row):
                    yield line
                elif isinstance(line, _Failure):
                    error = line.error()
                    if not isinstance(error, RowError):
                        raise error
                    yield error
                elif isinstance(line, float):
                    progress(line)
                elif isinstance(line, str):
                    raise RuntimeError(f"the reader of {path} failed:\n{line}")
                else:
                    return
            name = end_of(process.wait())
            raise InputError(
                f"{path} cannot be read as Parquet: the reader crashed ({name})",
                "free some memory" if name == "SIGKILL" else "copy the file again",
            )
        finally:
            process.kill()


def _start(path: Path, options: ReadOptions) -> subprocess.Popen[bytes]:
    request = json.dumps([str(path), asdict(options)])
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, request, *sys.path],
            bufsize=_BUFFER_BYTES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The C++ library prints nothing helpful when it aborts.
            stderr=subprocess.DEVNULL,
            # Ctrl-C goes to the caller only, which then ends the child.
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(
            f"cannot start {sys.executable} to read {path}: {error.strerror}",
            "end other processes, or save the file as .csv or .jsonl",
        ) from error


def end_of(code: int) -> str:
    """How a process ended, by its return code: the name of a signal, or the code."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def main() -> None:
    """Read the file that the first argument names, and write its rows to standard output."""
    path, options = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    # If a library prints something, it must not appear between the rows.
    stream = os.fdopen(os.dup(1), "wb", _BUFFER_BYTES)
    os.dup2(2, 1)
    encode = msgspec.json.Encoder().encode

    def send(line: _Line) -> None:
        stream.write(encode(line) + b"\n")

    def progress(share: float) -> None:
        send(share)
        stream.flush()

    try:
        for row in parquet_rows(Path(path), ReadOptions(**options), progress):
            send(row if isinstance(row, Row) else _Failure.of(row))
        send(None)
    except FpabeeError as error:
        send(_Failure.of(error))
    except Exception:  # noqa: BLE001
        send(traceback.format_exc())
    stream.flush()


def _end_with_stdin() -> None:
    # Not through sys.stdin: Python could not take its lock while it shuts down.
    os.read(0, 1)
    os._exit(0)
