"""Compiling C, as a driver or a kernel is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def compile_c(tmp_path: Path) -> Callable[..., Path]:
    """Makes a library of C code; the test is skipped without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler")

    def make(code: str, name: str, *flags: str) -> Path:
        source = tmp_path / "source.c"
        source.write_text(code, "utf-8")
        library = tmp_path / name
        command = [compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return library

    return make
