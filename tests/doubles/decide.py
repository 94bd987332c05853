"""`decide.h`, compiled by the system's C compiler."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime.backends.decide import PTX, board_type


@functools.cache
def compiled() -> Any:
    """The function `decide`; the test is skipped if there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "decide.so"
        flags = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-x", "c")
        command = [compiler, *flags, str(PTX.with_suffix(".h")), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library)).decide


def decide(board: int, logits: int, exit_number: int, rows: int) -> bool:
    """Run `decide` on a board and logits `[rows, labels]`, both given by their addresses."""
    pointers = ctypes.c_void_p(board), ctypes.c_void_p(logits)
    return bool(compiled()(*pointers, exit_number, rows, 0, 1))


def exits_of(logits: Any, settings: Any, first_exit: int = 1) -> Any:
    """The exit of each row that goes through all exits: `[rows]`.

    Args:
        logits: `[exits, rows, labels]` float32.
        settings: the result of `settings_of`.
        first_exit: the exit of the first logits.
    """
    count, rows, labels = logits.shape
    board = np.zeros(1, board_type(first_exit + count - 1, labels, rows))
    board.view(np.uint8)[: len(settings)] = settings
    if first_exit == 0:
        board["logits"][0, 0] = logits[0]
    for number in range(1, first_exit + count):
        now = np.ascontiguousarray(logits[number - first_exit], np.float32)
        going = decide(board.ctypes.data, now.ctypes.data, number, rows)
        assert going == (0 in board["stops"])
    return board["stops"][0]
