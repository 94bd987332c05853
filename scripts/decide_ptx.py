"""Compile the kernels for GPUs: writes `runtime/backends/decide/decide.ptx`.

Run it after each change of their sources. It needs NVRTC 12.4, but no GPU:

    pip install 'nvidia-cuda-nvrtc-cu12==12.4.*'
    python scripts/decide_ptx.py

A driver refuses PTX from a compiler that is newer than itself. CUDA 12.4 is the first version with
conditional graphs, so every driver that can run the result accepts it.
"""

from __future__ import annotations

import ctypes
import hashlib
from importlib import metadata
from pathlib import Path

from fpabee.runtime.backends.decide import PTX

PACKAGE = "nvidia-cuda-nvrtc-cu12"
VERSION = "12.4."
HEADERS = (PTX.with_suffix(".h"), PTX.with_name("gather.h"))
SOURCES = (*HEADERS, PTX.with_suffix(".cu"))
_OPTIONS = (b"--gpu-architecture=compute_75", b"--device-as-default-execution-space")


def nvrtc() -> Path | None:
    """The library of the installed NVRTC 12.4; None if it is not installed."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    found = [file for file in package.files or () if "libnvrtc.so" in file.name]
    return Path(str(found[0].locate())) if found and package.version.startswith(VERSION) else None


def first_line() -> bytes:
    """The first line of the PTX, which names the sources that it was made from."""
    names = ", ".join(path.name for path in SOURCES)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    return f"// SHA-256 of {names}: {digest}\n".encode()


def compile_ptx(library: Path) -> bytes:
    """The content of `decide.ptx`.

    Args:
        library: NVRTC.

    Raises:
        ValueError: the source has errors, which the message lists.
    """
    functions = ctypes.CDLL(str(library))
    *headers, source = (path.read_bytes() for path in SOURCES)
    texts = ctypes.c_char_p * len(headers)
    names = texts(*(path.name.encode() for path in HEADERS))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    functions.nvrtcCreateProgram(
        *(ctypes.byref(program), source, b"decide.cu", len(headers)),
        *(texts(*headers), names),
    )
    options = (ctypes.c_char_p * len(_OPTIONS))(*_OPTIONS)
    failed = functions.nvrtcCompileProgram(program, len(options), options)
    part = "ProgramLog" if failed else "PTX"
    getattr(functions, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(functions, f"nvrtcGet{part}")(program, text)
    functions.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise ValueError(text.value.decode())
    return first_line() + text.value


if __name__ == "__main__":
    found = nvrtc()
    if found is None:
        raise SystemExit(f"NVRTC 12.4 is not installed: pip install '{PACKAGE}=={VERSION}*'")
    PTX.write_bytes(compile_ptx(found))
    print(f"{PTX}: {PTX.stat().st_size} bytes")
