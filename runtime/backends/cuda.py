"""The CUDA calls that backends make: memory, streams, events, one kernel. Needs no torch.

Besides `machine.cuda_device`, nothing else calls CUDA, so tests replace this class. Addresses and
handles are integers.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, MissingExtraError
from ..machine import CudaDevice, cuda_device

PTX = Path(__file__).with_name("gather.ptx")
"""The compiled kernel `gather_rows`."""

GATHER = np.dtype(
    [
        *((name, np.uint64) for name in ("to", "pitch", "fill")),
        ("sources", np.uint64, (256,)),
        ("widths", np.uint32, (256,)),
    ]
)
"""What `gather.cu` reads: addresses, sizes in bytes, and the bytes of padding."""

_THREADS = 256
"""Threads of a block."""
_GATHERED_BYTES = 8192
"""Bytes of a row that a block gathers, in words of 8 bytes."""
_DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver: cuda-bindings are for a newer CUDA


class Cuda:
    """CUDA's runtime library on the first device, through `cuda-bindings`.

    Every method raises `BackendError` if CUDA reports an error.

    Raises:
        MissingExtraError: `cuda-bindings` is not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            # Not an extra: each backend on a GPU has its own, and all of them contain this package.
            raise MissingExtraError(
                "cuda-bindings is not installed",
                f"pip install 'cuda-bindings{'>=13' if cuda_device().cuda[0] > 12 else '<13'}'",
            ) from error
        self._runtime: Any = runtime
        self._check(runtime.cudaSetDevice(0))

    def malloc(self, size: int) -> int:
        """Allocate `size` bytes of device memory, and return their address.

        Raises:
            BackendError: too little memory is free.
        """
        status, pointer = self._runtime.cudaMalloc(size)
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise self.no_room(size)
        self._check((status,))
        return int(pointer)

    def no_room(self, size: int) -> BackendError:
        """The error that `size` bytes of device memory cannot be allocated."""
        free, total = self.memory()
        return BackendError(
            f"the GPU has no room for {size / 2**20:.1f} MiB: {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB are free",
            "use smaller batches or fewer threads, or close other programs that use the GPU",
        )

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._check(self._runtime.cudaFree(pointer))

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        free, total = self._check(self._runtime.cudaMemGetInfo())
        return int(free), int(total)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PinnedArray:
        """Host memory that the device can copy to and from while the host goes on.

        It is freed when the last view of the array is gone.
        """
        count = int(np.prod(shape))
        size = max(1, count * dtype.itemsize)
        (pointer,) = self._check(
            self._runtime.cudaHostAlloc(size, self._runtime.cudaHostAllocDefault)
        )
        memory = (ctypes.c_uint8 * size).from_address(int(pointer))
        weakref.finalize(memory, self._runtime.cudaFreeHost, int(pointer))
        array = np.ctypeslib.as_array(memory).view(np.uint8)[: count * dtype.itemsize]
        return PinnedArray(array.view(dtype).reshape(shape), int(pointer))

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes between two addresses, on the host or the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._check(self._runtime.cudaMemcpyAsync(to, source, size, kind, stream))

    def stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        flag = self._runtime.cudaStreamNonBlocking
        return int(self._check(self._runtime.cudaStreamCreateWithFlags(flag))[0])

    def synchronize(self, stream: int) -> None:
        """Wait until all work in a stream is done."""
        self._check(self._runtime.cudaStreamSynchronize(stream))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._check(self._runtime.cudaStreamDestroy(stream))

    def event(self) -> int:
        """Create an event."""
        flag = self._runtime.cudaEventDisableTiming
        return int(self._check(self._runtime.cudaEventCreateWithFlags(flag))[0])

    def record(self, event: int, stream: int) -> None:
        """Let an event mark the current end of a stream."""
        self._check(self._runtime.cudaEventRecord(event, stream))

    def wait(self, event: int) -> None:
        """Wait until the stream reaches the mark; returns at once if there is none."""
        self._check(self._runtime.cudaEventSynchronize(event))

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._check(self._runtime.cudaEventDestroy(event))

    def gather(self, plan: NDArray[np.void], rows: int, stream: int) -> None:
        """Enqueue `gather_rows`, see `gather.cu`.

        Args:
            plan: `[1]` of type `GATHER`; the driver copies it.
            rows: rows to write, at most as many as the plan has sources.
            stream: the stream.
        """
        values = np.array([plan.ctypes.data], np.uint64)
        blocks = -(-int(plan["pitch"][0]) // _GATHERED_BYTES)
        status = self._driver.cuLaunchKernel(
            self._gather_rows,
            rows,  # blocks in x, y and z
            blocks,
            1,
            _THREADS,  # threads of a block in x, y and z
            1,
            1,
            0,  # bytes of shared memory
            stream,
            values.ctypes.data,
            0,  # no other options
        )
        self._check_driver(status)

    @functools.cached_property
    def _driver(self) -> Any:
        from cuda.bindings import driver

        return driver

    @functools.cached_property
    def _gather_rows(self) -> Any:
        """The kernel, which the driver compiles for this GPU."""
        ptx = np.frombuffer(PTX.read_bytes() + b"\0", np.uint8)
        (module,) = self._check_driver(self._driver.cuModuleLoadData(ptx.ctypes.data))
        (kernel,) = self._check_driver(self._driver.cuModuleGetFunction(module, b"gather_rows"))
        return kernel

    def _check_driver(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same for the driver's own functions, whose errors have the same numbers."""
        return self._check((self._runtime.cudaError_t(int(result[0])), *result[1:]))

    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            hint = "check the driver with nvidia-smi, and close other programs that use the GPU"
            if int(status) == _DRIVER_TOO_OLD:
                hint = (
                    "install a newer NVIDIA driver, or cuda-bindings for the CUDA version of this "
                    "driver, which nvidia-smi shows"
                )
            raise BackendError(
                f"CUDA: {text.decode() if isinstance(text, bytes) else text} (error {int(status)})",
                hint,
            )
        return tuple(values)


class PinnedArray(NamedTuple):
    """Pinned host memory as an array, and its address."""

    array: NDArray[Any]
    pointer: int


@functools.cache
def cuda() -> Cuda:
    """CUDA's runtime library, loaded once."""
    return Cuda()


def packages(extra: str) -> str:
    """What `pip install` needs for this machine's version of CUDA.

    Args:
        extra: an extra of fpabee without the version of CUDA: `gpu`, `tensorrt` or `tensorrt-rtx`.
    """
    if cuda_device().cuda[0] != 12:
        return f"'fpabee[{extra}-cu13]'"
    library = "'onnxruntime-gpu[cuda,cudnn]<1.27'" if extra == "gpu" else f"{extra}-cu12"
    return f"'cuda-bindings>=12.9.1,<13' {library} polygraphy"


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
