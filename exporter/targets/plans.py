"""Settings for building TensorRT plans: shapes and GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...runtime.artifact.manifest import Manifest, Range, Shapes, TensorSpec
from ...runtime.backends.buffers import Bucket, shape_of
from ...runtime.errors import InputError
from .backends import RTX, TENSORRT

PORTABLE = ("8.6", "8.9", "12.0")
"""Ampere, Ada and Blackwell GPUs of desktops, laptops and workstations."""

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")

_SHORT = 8  # tokens; shorter rows are not faster


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        batch: the smallest, typical and largest number of rows.
        sequence: the same for the number of tokens; the largest is lowered to the model's limit.
        compute_capabilities: GPUs to build for; only with TensorRT for RTX.

    Raises:
        InputError: sizes do not ascend, or TensorRT for RTX does not support a GPU.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    sequence: tuple[int, int, int] = (16, 64, 128)
    compute_capabilities: tuple[str, ...] = PORTABLE

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or list(sizes) != sorted(sizes) or sizes[0] < 1:
                raise InputError(
                    f"{name} is {','.join(map(str, sizes))}",
                    f"give the smallest, typical and largest size as `{name}`",
                )
        for capability in self.compute_capabilities:
            if capability not in RTX_CAPABILITIES:
                raise InputError(
                    f"TensorRT for RTX supports compute capabilities {', '.join(RTX_CAPABILITIES)},"
                    f" not {capability}",
                    f"for other GPUs build targets of {TENSORRT}, on the device",
                )


def fitted(options: PlanOptions, manifest: Manifest, backend: str) -> PlanOptions:
    """Options with lengths that the model takes, and GPUs only if the backend asks for them.

    Args:
        options: as they were given.
        manifest: of the engines folder.
        backend: `tensorrt-rtx` or `tensorrt`.
    """
    low, typical, high = (min(size, manifest.tokenizer.max_length) for size in options.sequence)
    capabilities = options.compute_capabilities if backend == RTX else ()
    return dataclasses.replace(
        options, sequence=(low, typical, high), compute_capabilities=capabilities
    )


def profiles_of(options: PlanOptions) -> tuple[Shapes, ...]:
    """Two ranges of lengths, up to the typical length and beyond it.

    TensorRT chooses kernels for the typical shape of a profile. TensorRT for RTX compiles kernels
    for the actual shape on the device.
    """
    fewest, usual, most = options.batch
    batch = Range(min=fewest, opt=usual, max=most)
    low, typical, high = options.sequence
    profiles = [Shapes(batch=batch, sequence=Range(min=low, opt=typical, max=typical))]
    if high > typical:
        profiles.append(Shapes(batch=batch, sequence=Range(min=typical + 1, opt=high, max=high)))
    return tuple(profiles)


def batch_sizes_of(options: PlanOptions) -> tuple[int, ...]:
    """The batch sizes to pad to: the smallest, four times as many and so on, and the largest.

    For every padded shape, each segment needs an execution context, for which TensorRT for RTX also
    compiles kernels, and a server prepares all of them before its first request. So there are few
    shapes. A small batch takes a GPU about as long as one row, so these steps are larger than those
    of lengths.
    """
    fewest, _, most = options.batch
    return _steps(fewest, most, 4)


def sequence_lengths_of(options: PlanOptions) -> tuple[int, ...]:
    """The lengths to pad to: the smallest, twice as many tokens and so on, and the largest.

    They are few as well, see `batch_sizes_of`. The typical length is one of them, because a profile
    ends there.
    """
    low, typical, high = options.sequence
    return tuple(sorted({*_steps(max(low, min(_SHORT, typical)), high, 2), typical}))


def profile_of(spec: TensorSpec, shapes: Shapes) -> list[tuple[int, ...]]:
    """The smallest, typical and largest shape of a tensor."""
    batch = shapes.batch
    sequence = shapes.sequence
    buckets = (
        Bucket(batch.min, sequence.min),
        Bucket(batch.opt, sequence.opt),
        Bucket(batch.max, sequence.max),
    )
    return [shape_of(spec, bucket) for bucket in buckets]


def _steps(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """The smallest size, each next one `factor` times as large, and the largest."""
    sizes = [smallest]
    while sizes[-1] * factor < largest:
        sizes.append(sizes[-1] * factor)
    return tuple(sorted({*sizes, largest}))
