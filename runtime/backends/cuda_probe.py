"""Ask the NVIDIA driver for a GPU, without any CUDA package.

TensorRT's own classes can crash the interpreter on a machine without a GPU, so this comes first.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

from ..errors import BackendError, Remedy

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class CudaDevice:
    """The first GPU, or why there is none.

    Attributes:
        name: the driver's name for it.
        compute_capability: such as `8.6`.
        error: why no GPU can be used; empty if one can.
    """

    name: str = ""
    compute_capability: str = ""
    error: str = ""


@functools.cache
def cuda_device() -> CudaDevice:
    """The first CUDA device of this process."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return CudaDevice(error="no NVIDIA driver is installed")
    status = driver.cuInit(0)
    count = ctypes.c_int()
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return CudaDevice(error=f"the NVIDIA driver finds no GPU (error {status})")
    if count.value == 0:
        return CudaDevice(error="there is no CUDA device")
    text = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(text, len(text), 0)
    parts = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return CudaDevice(text.value.decode(errors="replace"), ".".join(parts))


def required_gpu(target: str) -> CudaDevice:
    """The first GPU.

    Args:
        target: name of the target that needs it, for messages.

    Raises:
        BackendError: no GPU can be used.
    """
    device = cuda_device()
    if device.error:
        raise BackendError(
            f"target {target} needs an NVIDIA GPU, but {device.error}",
            Remedy("choose another {target}, such as onnxruntime-fp32"),
        )
    return device
