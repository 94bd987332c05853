"""How TensorRT plans are built: settings, what they cannot be, and the shapes they give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...runtime.artifact.manifest import Manifest, Range, Shapes, TensorSpec
from ...runtime.errors import BackendError

RTX = "tensorrt-rtx"
TENSORRT = "tensorrt"
PORTABLE = ("8.6", "8.9", "12.0")
"""Ampere, Ada and Blackwell GPUs of desktops, laptops and workstations."""
TURING = "7.5"

RTX_CAPABILITIES = (TURING, "8.0", "8.6", "8.9", "12.0", "12.1")
_BATCH_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTH_STEPS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        batch: smallest, typical and largest number of rows.
        sequence: the same in tokens; the largest is lowered to what the model takes.
        compute_capabilities: GPUs to build for; only with TensorRT for RTX.
        version_compatible: plans that later versions of TensorRT can run.
        hardware_compatible: plans for Ampere and everything after it.
        optimization_level: 0 to 5; None: the library's own.
        workspace: most scratch memory in bytes; None: no limit.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    sequence: tuple[int, int, int] = (16, 64, 128)
    compute_capabilities: tuple[str, ...] = PORTABLE
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    workspace: int | None = None

    def fitted(self, manifest: Manifest, backend: str, precision: str) -> PlanOptions:
        """The options with shapes that the model takes, and GPUs only where they are chosen.

        Raises:
            BackendError: the backend builds no such plans in this precision.
        """
        longest = manifest.tokenizer.max_length
        low, typical, high = (min(length, longest) for length in self.sequence)
        if list(self.batch) != sorted(self.batch) or not low <= typical <= high:
            raise BackendError(
                f"batch {self.batch} or sequence {self.sequence} does not ascend",
                "give smallest, typical and largest: --batch 1,8,32 --sequence 16,64,128",
            )
        if backend == RTX:
            self._check_rtx(precision)
        capabilities = self.compute_capabilities if backend == RTX else ()
        return dataclasses.replace(
            self, sequence=(low, typical, high), compute_capabilities=capabilities
        )

    def _check_rtx(self, precision: str) -> None:
        for capability in self.compute_capabilities:
            if capability not in RTX_CAPABILITIES:
                raise BackendError(
                    f"TensorRT for RTX has no support for compute capability {capability}; "
                    f"it has {', '.join(RTX_CAPABILITIES)}",
                    "there use TensorRT, on the device: fpabee-export --from ENGINES "
                    "--backend tensorrt",
                )
            if capability == TURING and precision in ("fp32", "bf16"):
                raise BackendError(
                    f"TensorRT for RTX has no {precision} matrix products on compute "
                    f"capability {TURING}",
                    "export with --fp16, or leave 75 out of --sm",
                )
        if self.version_compatible or self.hardware_compatible:
            raise BackendError(
                "plans of TensorRT for RTX are for one release and the GPUs of --sm",
                "--version-compatible and --hardware-compatible go with --backend tensorrt",
            )

    def profiles(self) -> tuple[Shapes, ...]:
        """Two length buckets: up to the typical length, and beyond it."""
        batch = Range(**dict(zip(("min", "opt", "max"), self.batch, strict=True)))
        low, typical, high = self.sequence
        profiles = [Shapes(batch=batch, sequence=Range(min=low, opt=typical, max=typical))]
        if high > typical:
            profiles.append(
                Shapes(batch=batch, sequence=Range(min=min(typical + 1, high), opt=high, max=high))
            )
        return tuple(profiles)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to pad to."""
        return _steps(_BATCH_STEPS, self.batch)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """The lengths to pad to."""
        return _steps(_LENGTH_STEPS, self.sequence)


def profile_of(spec: TensorSpec, shapes: Shapes) -> tuple[list[int], list[int], list[int]]:
    """A tensor's smallest, typical and largest shape."""

    def shape(which: str) -> list[int]:
        sizes = {
            "batch": getattr(shapes.batch, which),
            "sequence": getattr(shapes.sequence, which),
        }
        return [sizes[size] if isinstance(size, str) else size for size in spec.shape]

    return shape("min"), shape("opt"), shape("max")


def _steps(steps: tuple[int, ...], asked: tuple[int, int, int]) -> tuple[int, ...]:
    """Few sizes, so that prepared graphs are used again."""
    inside = {step for step in steps if asked[0] < step < asked[2]}
    return tuple(sorted(inside | set(asked)))
