"""Tensors on a CUDA device: their types and sizes, and copies of their rows.

Rows are copied by the driver's own calls, one for each run of neighbouring rows. So nothing
here needs a compiler on the device or a kernel for each GPU. A group has a few dozen rows,
and most neighbours stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import MASK_FILL, TensorSpec
from .buffers import shape_of
from .cuda import Cuda
from .shapes import Bucket, Rows

# NumPy lacks these types, so their bits are handled as integers.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The NumPy type whose bits a tensor has on the device."""
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


def gather_rows(
    cuda: Cuda,
    stream: int,
    spec: TensorSpec,
    sources: Sequence[tuple[int, Bucket, Rows]],
    target: int,
    bucket: Bucket,
) -> None:
    """Copy rows of several tensors into one, one after another; new padding becomes zero.

    Args:
        cuda: the driver.
        stream: the stream whose order the copies keep.
        spec: the tensor, whose first axis is the batch.
        sources: for each tensor its address, its padded shape and the rows to copy.
        target: address of the tensor to fill.
        bucket: its padded shape.
    """
    pitch = nbytes_of(spec, Bucket(1, bucket.sequence))
    shortest = min(source_bucket.sequence for _, source_bucket, _ in sources)
    count = sum(len(rows) for _, _, rows in sources)
    if "sequence" in spec.shape and shortest < bucket.sequence:
        cuda.clear(target, pitch * bucket.batch, stream)
    elif count < bucket.batch:
        cuda.clear(target + count * pitch, (bucket.batch - count) * pitch, stream)
    for source, source_bucket, rows in sources:
        source_pitch = nbytes_of(spec, Bucket(1, source_bucket.sequence))
        width = min(pitch, source_pitch)
        for first, length in _runs(rows):
            start = source + first * source_pitch
            cuda.copy_rows(target, pitch, start, source_pitch, width, length, stream)
            target += length * pitch


def crop(
    cuda: Cuda,
    stream: int,
    spec: TensorSpec,
    source: tuple[int, Bucket],
    target: tuple[int, Bucket],
) -> None:
    """Copy the part of a tensor without a batch axis that a shorter sequence needs.

    Args:
        cuda: the driver.
        stream: the stream whose order the copies keep.
        spec: the tensor.
        source: its address and padded shape.
        target: the same of the tensor to fill, which is no longer.
    """
    wide, narrow = shape_of(spec, source[1]), shape_of(spec, target[1])
    itemsize = dtype_of(spec).itemsize
    # The innermost rows are cut to their new width; of the axis before, fewer are taken.
    wide_pitch, pitch = wide[-1] * itemsize, narrow[-1] * itemsize
    for matrix in range(int(np.prod(narrow[:-2]))):
        start = source[0] + matrix * wide[-2] * wide_pitch
        end = target[0] + matrix * narrow[-2] * pitch
        cuda.copy_rows(end, pitch, start, wide_pitch, pitch, narrow[-2], stream)


def _runs(numbers: Rows) -> list[tuple[int, int]]:
    """Runs of neighbouring rows: first row and length."""
    if len(numbers) == 0:
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    return [(int(numbers[start]), int(size)) for start, size in zip(starts, lengths, strict=True)]
