"""Read the arrays of `.npz` files, which may be damaged or malicious."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.lib.format import read_array
from numpy.typing import NDArray


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays by name, from a file that `numpy.savez` wrote.

    Raises:
        ValueError: the file cannot be read, lacks an array, or unpacks to more than its size.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
            # `savez` does not compress, so a file that unpacks to more than its own size is
            # malicious.
            if size > path.stat().st_size:
                raise ValueError(f"it unpacks to {size} bytes")
            return {name: read_array(archive.open(f"{name}.npy")) for name in names}
    except ValueError:
        raise
    # A damaged archive can raise almost any exception.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
