"""Read the arrays of `.npz` files, which may be damaged or malicious."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The header of version 1 that `numpy.savez` writes for numbers and strings. NumPy itself evaluates
# whatever is there as Python, with warnings.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][biufU]\d+)', 'fortran_order': (True|False), "
    rb"'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays by name, from a file that `numpy.savez` wrote; they cannot be changed.

    Raises:
        ValueError: the file cannot be read, lacks an array, or unpacks to more than its size.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
            # `savez` does not compress, so a file that unpacks to more than its own size is
            # malicious.
            if size > path.stat().st_size:
                raise ValueError(f"it unpacks to {size} bytes")
            return {name: _array(name, archive.read(f"{name}.npy")) for name in names}
    except ValueError:
        raise
    # A damaged archive can raise almost any exception.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _array(name: str, content: bytes) -> NDArray[Any]:
    header = _HEADER.match(content)
    if header is None:
        raise ValueError(f"its array {name} does not begin as one of numbers or strings")
    dtype, is_fortran, sizes = (part.decode() for part in header.groups())
    shape = [int(size) for size in sizes.split(",") if size.strip()]
    order: Any = "F" if is_fortran == "True" else "C"
    return np.frombuffer(content, dtype, offset=header.end()).reshape(shape, order=order)
