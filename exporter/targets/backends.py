"""The libraries that run targets."""

from __future__ import annotations

from ...runtime.backends.onnxruntime import check_installed
from ...runtime.backends.openvino import openvino_version

ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
RTX = "tensorrt-rtx"
TENSORRT = "tensorrt"


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
