"""Ask the NVIDIA driver for a GPU, without any CUDA package.

TensorRT's own classes can crash the interpreter on a machine without a GPU, so this comes first.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass, field
from importlib import metadata

from ..errors import BackendError

_OLDEST_CUDA = (12, 4)  # our kernel is made for it
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class CudaDevice:
    """The first GPU, or why there is none.

    Attributes:
        name: the driver's name for it.
        compute_capability: such as `8.6`.
        cuda: the newest CUDA version that the driver runs, such as (12, 6).
        error: why no GPU can be used; empty if one can.
        process: the process that has asked, the only one that can use the GPU: CUDA does not work
            in processes that are forked from it.
    """

    name: str = ""
    compute_capability: str = ""
    cuda: tuple[int, int] = (0, 0)
    error: str = ""
    process: int = field(default_factory=os.getpid, compare=False)


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
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    if cuda < _OLDEST_CUDA:
        return CudaDevice(
            error=f"its driver is for CUDA {cuda[0]}.{cuda[1]}; install one for CUDA 12.4 or later "
            "(NVIDIA driver 550, JetPack 6.1)"
        )
    text = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(text, len(text), 0)
    parts = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return CudaDevice(text.value.decode(errors="replace"), ".".join(parts), cuda)


def extra(name: str) -> str:
    """The extra of `fpabee` with this machine's CUDA version, such as `gpu-cu12`."""
    return f"{name}-cu{12 if cuda_device().cuda[0] == 12 else 13}"


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
            "choose another `target`, such as onnxruntime-fp32",
        )
    check_not_forked(target)
    return device


def check_not_forked(target: str) -> None:
    """Refuse a process that was forked after CUDA was used: libraries can crash in it.

    Args:
        target: name of the target, for messages.

    Raises:
        BackendError: this is such a process.
    """
    if cuda_device().process != os.getpid():
        raise BackendError(
            f"target {target} cannot run in this process, which was forked from one that had used "
            "the GPU",
            "start processes with the method spawn or forkserver of multiprocessing, and load the "
            "engine in each of them",
        )


def check_cuda(target: str, library: str, major: int, extra_name: str) -> None:
    """Check that a library and `cuda-bindings` are for the same CUDA, which the driver supports.

    Args:
        target: name of the target that needs them, for messages.
        library: name of the library.
        major: the major version of CUDA that it was built for; 0: unknown.
        extra_name: the extra that installs it, without the version of CUDA.

    Raises:
        BackendError: the versions do not fit together.
    """
    bindings = bindings_cuda()
    driver = cuda_device().cuda
    for name, needed in ((library, major), ("cuda-bindings", bindings)):
        if needed > driver[0]:
            raise BackendError(
                f"target {target} uses {name} for CUDA {needed}, but the NVIDIA driver of this "
                f"machine supports CUDA {driver[0]}.{driver[1]}",
                "install a newer NVIDIA driver (580 or later for CUDA 13), or pip install "
                f"'fpabee[{extra(extra_name)}]'",
            )
    if major and bindings and major != bindings:
        raise BackendError(
            f"{library} was built for CUDA {major}, but cuda-bindings is for CUDA {bindings}",
            f"pip install 'fpabee[{extra(extra_name)}]'",
        )


def bindings_cuda() -> int:
    """The major version of CUDA of the installed `cuda-bindings`; 0: it is not installed."""
    try:
        return int(metadata.version("cuda-bindings").partition(".")[0])
    except metadata.PackageNotFoundError:
        return 0
