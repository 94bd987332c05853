"""Tensors on a CUDA device: their bits, and which rows are copied together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import MASK_FILL, TensorSpec
from .buffers import dtype_of, shape_of
from .shapes import Bucket, Rows


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
