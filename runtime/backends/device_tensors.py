"""Types, sizes and bits of tensors in the terms of NumPy, and which rows are copied together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import MASK_FILL, TensorSpec
from .buffers import shape_of
from .shapes import Bucket, Rows

# NumPy lacks these types, so their bits are handled as integers.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The NumPy type that holds the bits of a tensor."""
    return _DTYPES.get(spec.dtype) or np.dtype(spec.dtype)


def nbytes_of(spec: TensorSpec, bucket: Bucket) -> int:
    """A tensor's size in bytes at a padded shape."""
    return int(np.prod(shape_of(spec, bucket))) * dtype_of(spec).itemsize


def bits_of(value: float, spec: TensorSpec) -> float:
    """A number as it is written into an array of `dtype_of(spec)`."""
    if spec.dtype != "bfloat16":
        return value
    bits = int(np.array(value, np.float32).view(np.uint32))
    # Rounds to the nearest bfloat16, and to an even one halfway between two.
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def bias_of(lengths: NDArray[np.intp], spec: TensorSpec, bucket: Bucket) -> NDArray[Any]:
    """The attention bias of rows of given lengths: 0 on tokens, `MASK_FILL` on padding."""
    bias = np.full(shape_of(spec, bucket), bits_of(MASK_FILL, spec), dtype_of(spec))
    for number, length in enumerate(lengths):
        bias[number, ..., :length] = 0
    return bias


def runs_of(numbers: Rows) -> list[tuple[int, int]]:
    """Runs of neighbouring rows: the first row of each, and its length."""
    if len(numbers) == 0:
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    return [(int(numbers[start]), int(size)) for start, size in zip(starts, lengths, strict=True)]
