"""Arrays of `.npz` files: they come back as they were written, or with one error and no warning."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.runtime.artifact.untrusted.arrays import read_arrays


def test_arrays_come_back(tmp_path: Path) -> None:
    numbers = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    arrays: dict[str, NDArray[Any]] = {
        "numbers": numbers,
        "transposed": numbers.T,
        "text": np.array("é"),
        "one": np.array([5]),
    }
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    found = read_arrays(tmp_path / "a.npz", list(arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x93NUMPY", b"\x93NUMPX"),
        (b"'<f4'", b"'\\d4'"),
        (b"'<f4'", b"'<c8'"),
        (b"'<f4'", b"'|O8'"),
        (b"'<f4'", b"'a4' "),
        (b"False", b"1if 0"),
        (b"(3,)", b"(3L)"),
        (b"(3,)", b"(4,)"),
        (b"(3,)", b"(1 )"),
    ],
)
def test_a_damaged_header(old: bytes, new: bytes, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.ones(3, np.float32))
    assert old in file.getvalue()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", file.getvalue().replace(old, new))
    with pytest.raises(ValueError, match=r"."):  # most messages are those of NumPy
        read_arrays(tmp_path / "a.npz", ["a"])
