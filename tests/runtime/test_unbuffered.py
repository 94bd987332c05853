"""Results row by row: of a pipe with `--unbuffered`, and of a terminal."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from ..commands.test_run import COMMAND


@contextmanager
def started(
    bert: Path, *options: str, stdin: Any = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    command = [*COMMAND, str(bert), *options]
    with subprocess.Popen(
        command, bufsize=0, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(stream: IO[bytes] | None) -> str:
    """The next line; fails where there is none for long."""
    assert stream is not None
    ready, _, _ = select.select([stream], [], [], 60)
    assert ready, "no answer"
    return stream.readline().decode()


@pytest.mark.parametrize(
    ("options", "header", "row"),
    [
        ((), "", '{{"text": "{}"}}\n'),
        (("--input-format", "csv"), "text,id\n", "{},1\n"),
    ],
    ids=["JSON lines", "CSV"],
)
def test_a_line_is_answered_before_the_next(
    bert: Path, options: tuple[str, ...], header: str, row: str
) -> None:
    texts = ["rain", "the film is not bad", "sun"]
    with started(bert, "-", "--unbuffered", "--quiet", "--with-text", *options) as process:
        assert process.stdin is not None
        process.stdin.write(header.encode())
        for number, text in enumerate(texts):
            process.stdin.write(row.format(text).encode())
            line = answer(process.stdout)
            assert line.startswith(f'{{"index": {number}, ')
            assert text in line
        process.stdin.close()
        assert answer(process.stdout) == ""
        assert process.wait() == 0


def test_lines_are_answered_at_once_at_a_terminal(bert: Path) -> None:
    pty = pytest.importorskip("pty", reason="there are no terminals here")
    typing, terminal = pty.openpty()
    try:
        with started(bert, "-", stdin=terminal) as process:
            assert "Ctrl-D" in answer(process.stderr)
            for number, text in enumerate([b"rain\n", b"sun\n"]):
                os.write(typing, text)
                assert json.loads(answer(process.stdout))["index"] == number
            os.write(typing, b"\x04")
            assert answer(process.stdout) == ""
            assert process.wait() == 0
    finally:
        os.close(typing)
        os.close(terminal)
