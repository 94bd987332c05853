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

ALONE = PTX.with_suffix(".h")
"""One thread decides about a row, with the function `decide`."""
WARPS = 8
"""So many warps at most share the rows."""
IN_LANES = Path(__file__).with_name("decide_lanes.c")
"""Several threads share a row, with the function `decide_in_lanes`."""
COUNTED = IN_LANES.with_name("decide_calls.c")
"""Like `ALONE`; the variables `functions` and `reductions` count what takes long on a GPU."""


@functools.cache
def compiled(source: Path = ALONE) -> Any:
    """A library that is compiled from a source; the test is skipped without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler")
    flags = ("-std=gnu99", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-pthread")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/decide.so"
        files = ("-x", "c", str(source), f"-I{PTX.parent}", "-o", library, "-lm")
        subprocess.run([compiler, *flags, *files], check=True)
        return ctypes.CDLL(library)


def decide(board: int, logits: int, exit_number: int, rows: int, source: Path = ALONE) -> bool:
    """Run `decide` on a board and logits `[rows, labels]`, both given by their addresses."""
    arguments = ctypes.c_void_p(board), ctypes.c_void_p(logits), exit_number, rows
    if source == IN_LANES:
        going = compiled(source).decide_in_lanes(*arguments)
        assert going >= 0, "the lanes do not agree"
    else:
        warps = min(rows, WARPS)
        going = max(compiled(source).decide(*arguments, warp, warps) for warp in range(warps))
    return bool(going)


def exits_of(logits: Any, settings: Any, first_exit: int = 1, source: Path = ALONE) -> Any:
    """The exit of each row that goes through all exits: `[rows]`.

    Args:
        logits: `[exits, rows, labels]` float32.
        settings: the result of `settings_of`.
        first_exit: the exit of the first logits.
        source: how `decide.h` is compiled.
    """
    count, rows, labels = logits.shape
    board = np.zeros(1, board_type(first_exit + count - 1, labels, rows))
    board.view(np.uint8)[: len(settings)] = settings
    if first_exit == 0:
        board["logits"][0, 0] = logits[0]
    for number in range(1, first_exit + count):
        now = np.ascontiguousarray(logits[number - first_exit], np.float32)
        going = decide(board.ctypes.data, now.ctypes.data, number, rows, source)
        assert going == (0 in board["stops"])
    return board["stops"][0]
