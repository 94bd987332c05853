"""Read a Parquet file in a process of its own.

pyarrow ends the whole process on some damaged files: its C++ code aborts where Python would raise.
So a child process reads the file, and sends its rows through a pipe as messages in MessagePack,
each behind its length. If the child dies, the caller gets an `InputError`. The child ends as soon
as its standard input does: when the caller stops reading, and also when the caller is killed.
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
from typing import IO, Any

import msgspec

from ..errors import FpabeeError, InputError, MissingExtraError, Remedy, RowError
from .parquet import parquet_rows
from .rows import ReadOptions, Row

# A message is sent when it has so many bytes, or when a batch of rows has been read.
_MESSAGE_BYTES = 2**18
_LENGTH_BYTES = 8
# The child imports from where its caller does, and not from the working folder.
_START = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main()"
_ERRORS: dict[str, type[FpabeeError]] = {
    error.__name__: error for error in (InputError, MissingExtraError)
}
_CRASHED = "copy the file again"
_HINTS = {"SIGKILL": "free some memory, and run it again"}


class _Good(msgspec.Struct, array_like=True, tag="row", gc=False):
    text: str
    text_pair: str | None
    labels: tuple[str, ...] | None
    fields: dict[str, Any]
    line: int


# The text and the values of a remedy.
_Advice = tuple[str, dict[str, str]]


class _Bad(msgspec.Struct, array_like=True, tag="error", gc=False):
    message: str
    advice: _Advice


class _Message(msgspec.Struct, array_like=True):
    rows: list[_Good | _Bad] = []
    share: float = 0.0
    is_last: bool = False
    # The class of an error, its message and its remedy.
    error: tuple[str, str, _Advice] | None = None
    bug: str = ""


def isolated_parquet_rows(
    path: Path, options: ReadOptions, progress: Callable[[float], None]
) -> Iterator[Row | RowError]:
    """A row for each row of a Parquet file, which a child process reads.

    Args:
        path: the file.
        options: which columns are text and labels; the others are passed through.
        progress: told the share of the rows that has been read.

    Raises:
        InputError: the file is damaged, or lacks a column or has it in another type.
        MissingExtraError: pyarrow cannot be imported.
        RuntimeError: a defect of the reader, with the child's traceback.
    """
    process = _start(path, options)
    with process:
        try:
            assert process.stdout is not None
            for message in _messages(process.stdout):
                for item in message.rows:
                    yield _row(item, path)
                progress(message.share)
                if message.error is not None:
                    kind, said, advice = message.error
                    raise _ERRORS[kind](said, _remedy(advice))
                if message.bug:
                    raise RuntimeError(f"the reader of {path} failed:\n{message.bug}")
                if message.is_last:
                    return
            name = end_of(process.wait())
            raise InputError(
                f"{path} cannot be read as Parquet: the reader crashed ({name})",
                _HINTS.get(name, _CRASHED),
            )
        finally:
            process.kill()


def _start(path: Path, options: ReadOptions) -> subprocess.Popen[bytes]:
    request = json.dumps([str(path), asdict(options)])
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, request, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What the C++ library says as it aborts is of no use to anybody.
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the caller, which then ends the child.
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(
            f"cannot start {sys.executable}, which is to read {path}: {error.strerror}",
            "end other processes, or save the file as .csv or .jsonl",
        ) from error


def _messages(stream: IO[bytes]) -> Iterator[_Message]:
    """The messages, up to the last whole one."""
    decoder = msgspec.msgpack.Decoder(_Message)
    while len(head := stream.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        length = int.from_bytes(head, "little")
        content = stream.read(length)
        if len(content) < length:
            return
        yield decoder.decode(content)


def _row(item: _Good | _Bad, path: Path) -> Row | RowError:
    if isinstance(item, _Bad):
        return RowError(item.message, _remedy(item.advice))
    where = f"{path}, row {item.line}"
    return Row(item.text, item.text_pair, item.labels, item.fields, item.line, where)


def _advice(error: FpabeeError) -> _Advice:
    if isinstance(error.remedy, str):
        return "{remedy}", {"remedy": error.remedy}
    return error.remedy.text, {name: str(value) for name, value in error.remedy.values.items()}


def _remedy(advice: _Advice) -> Remedy:
    text, values = advice
    return Remedy(text, **values)


def end_of(code: int) -> str:
    """How a process ended, by its return code: the name of a signal, or the code."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


class _Sender:
    """Collects rows in messages, and sends them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder()
        self._rows: list[msgspec.Raw] = []
        self._size = 0
        self._share = 0.0

    def add(self, row: Row | RowError) -> None:
        """Add a row; rows are encoded one by one, so that many long ones are never held."""
        item = (
            _Bad(row.message, _advice(row))
            if isinstance(row, RowError)
            else _Good(row.text, row.text_pair, row.labels, row.fields, row.line)
        )
        encoded = self._encoder.encode(item)
        self._rows.append(msgspec.Raw(encoded))
        self._size += len(encoded)
        if self._size >= _MESSAGE_BYTES:
            self.send()

    def progress(self, share: float) -> None:
        """Send the rows up to here, and their share of all rows."""
        self._share = share
        self.send()

    def send(self, *end: Any) -> None:
        """Send the rows, and how reading ended, in the order of the fields of a message."""
        content = self._encoder.encode((self._rows, self._share, *end))
        self._stream.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
        self._stream.flush()
        self._rows, self._size = [], 0


def main() -> None:
    """Read the file that the first argument names, and write its messages to standard output."""
    path, options = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    # Whatever a library prints must not get between the messages.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sender = _Sender(stream)
    try:
        for row in parquet_rows(Path(path), ReadOptions(**options), sender.progress):
            sender.add(row)
        sender.send(True)
    except FpabeeError as error:
        sender.send(True, (type(error).__name__, error.message, _advice(error)))
    except Exception:  # noqa: BLE001
        sender.send(True, None, traceback.format_exc())


def _end_with_stdin() -> None:
    # Not through sys.stdin, whose lock Python could not take at its end.
    os.read(0, 1)
    os._exit(0)
