"""Read the arrays of `.npz` files, which may be damaged or malicious."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
            return {name: _array(archive.read(f"{name}.npy")) for name in names}
    except ValueError:
        raise
    # A damaged archive can raise almost any exception.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _array(content: bytes) -> NDArray[Any]:
    """An array of numbers or strings over the bytes, so that no header can ask for memory."""
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    order: Any = "F" if is_fortran else "C"
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order=order)
