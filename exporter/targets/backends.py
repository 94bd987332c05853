"""The backends and precisions of targets, and whether this machine can build for a backend."""

from __future__ import annotations

from importlib import util

from ...runtime.artifact.manifest import Target
from ...runtime.backends.cuda import packages
from ...runtime.backends.onnxruntime import check_installed
from ...runtime.backends.openvino import openvino_version
from ...runtime.backends.tensorrt import MODULES
from ...runtime.errors import BackendError, FpabeeError, MissingExtraError
from ...runtime.machine import cuda_device

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
CPU_BACKENDS = (ONNXRUNTIME, OPENVINO)
PLAN_BACKENDS = (RTX, TENSORRT)
FP16, INT8 = "fp16", "int8"


def unavailable_reason(backend: str) -> FpabeeError | None:
    """Why this machine cannot build for a backend, and for CPUs not run it; None: it can."""
    if backend in CPU_BACKENDS:
        try:
            version_of(backend)
        except FpabeeError as error:
            return error
        return None
    if util.find_spec(MODULES[backend]) is None:
        return MissingExtraError(
            f"{MODULES[backend]} is not installed", f"pip install {packages(backend)}"
        )
    if util.find_spec("polygraphy") is None:  # on a Jetson, TensorRT comes without the extra
        return MissingExtraError("polygraphy is not installed", "pip install polygraphy")
    if backend == TENSORRT and cuda_device().error:
        return BackendError(
            f"TensorRT builds on the GPU that runs the plans, and here {cuda_device().error}",
            "build on the device that runs it",
        )
    return None


def version_of(backend: str) -> str:
    """The version of a library for CPUs.

    Raises:
        FpabeeError: it cannot run on this machine.
    """
    if backend == OPENVINO:
        return openvino_version()
    check_installed()
    import onnxruntime

    return str(onnxruntime.__version__)


def is_cpu_int8(target: Target) -> bool:
    """Whether a target runs the int8 graphs for CPUs."""
    return target.backend in CPU_BACKENDS and target.precision == INT8
