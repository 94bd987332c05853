"""The CUDA calls that backends make: memory, streams, events, one kernel. Needs no torch.

Besides `machine.cuda_device`, nothing else calls CUDA, so tests replace this class. Addresses and
handles are integers.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import START_AGAIN, BackendError, MissingExtraError
from ..machine import CudaDevice, cuda_device, package

PTX = Path(__file__).with_name("gather.ptx")
"""The compiled kernel `gather_rows`."""

GATHER = np.dtype(
    [
        *((name, np.uint64) for name in ("to", "pitch", "fill")),
        ("sources", np.uint64, (256,)),
        ("widths", np.uint32, (256,)),
    ]
)
"""The arguments of `gather.cu`: addresses, sizes in bytes, and the bytes of padding."""

_THREADS = 256
"""Threads of a block."""
_GATHERED_BYTES = 8192
"""Bytes of a row that a block gathers, in words of 8 bytes."""
FINAL = {4, 46, 201, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721}
FINAL |= {*range(805, 811), 999}  # those of MPS, which shares a GPU, and an unknown one
"""Errors after which a process cannot use the device again, because they break its context.

They are numbers of `CUresult`, such as 214, uncorrectable memory, and 700, an illegal address. All
others are refusals of one call, such as those while another thread captures a graph.
"""


class Cuda:
    """The CUDA driver on one device, through `cuda-bindings`.

    It uses the primary context of the device, as CUDA's runtime library and PyTorch do, and keeps
    it until the process ends. The context is current only within `with cuda:`, in the thread of
    this statement, so an application finds the context that it had. Every other method must be
    called there.

    Every method raises `BackendError` if the driver reports an error.

    Args:
        device: number of the device.

    Attributes:
        failed: why the device cannot be used any more in this process; empty if it can.

    Raises:
        MissingExtraError: `cuda-bindings` is not installed.
    """

    def __init__(self, device: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MissingExtraError(
                "cuda-bindings is not installed", f"pip install {package('cuda')}"
            ) from error
        self.failed = ""
        self._context: Any = None
        self._driver: Any = driver
        self._number = device
        self._check(driver.cuInit(0))
        (handle,) = self._check(driver.cuDeviceGet(device))
        (self._context,) = self._check(driver.cuDevicePrimaryCtxRetain(handle))
        ptx = np.frombuffer(PTX.read_bytes() + b"\0", np.uint8)
        with self:  # the driver compiles the kernel for this GPU now, and not in the first call
            (module,) = self._check(driver.cuModuleLoadData(ptx.ctypes.data))
            (self._gather_rows,) = self._check(driver.cuModuleGetFunction(module, b"gather_rows"))

    def __enter__(self) -> None:
        """Make the device's context current in this thread, also if it is current already."""
        if self.failed:
            raise BackendError(self.failed, START_AGAIN)
        self._check(self._driver.cuCtxPushCurrent(self._context))

    def __exit__(self, *error: object) -> None:
        """Make current what was current before."""
        self._check(self._driver.cuCtxPopCurrent())

    def malloc(self, size: int) -> int:
        """Allocate `size` bytes of device memory, and return their address.

        Raises:
            BackendError: too little memory is free.
        """
        status, pointer = self._driver.cuMemAlloc(size)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise self.no_room(size)
        self._check((status,))
        return int(pointer)

    def no_room(self, size: int) -> BackendError:
        """The error that `size` bytes of device memory cannot be allocated."""
        return BackendError(
            f"the GPU has no room for {size / 2**20:.1f} MiB: {self.free_room()}",
            "use smaller batches, or close other programs that use the GPU",
        )

    def free_room(self) -> str:
        """How much device memory is free, in words."""
        free, total = self.memory()
        return f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB of device memory are free"

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._check(self._driver.cuMemFree(pointer))

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        free, total = self._check(self._driver.cuMemGetInfo())
        return int(free), int(total)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PinnedArray:
        """Host memory that the device can copy to and from while the host goes on.

        It is freed when the last view of the array is gone.
        """
        count = int(np.prod(shape))
        size = max(1, count * dtype.itemsize)
        (address,) = self._check(self._driver.cuMemHostAlloc(size, 0))
        pointer = int(address)
        memory = (ctypes.c_uint8 * size).from_address(pointer)
        # When the process ends, the driver frees it. A forked process must not call the driver.
        weakref.finalize(memory, self._free_pinned, pointer).atexit = False
        array = np.ctypeslib.as_array(memory).view(np.uint8)[: count * dtype.itemsize]
        return PinnedArray(array.view(dtype).reshape(shape), pointer)

    def _free_pinned(self, pointer: int) -> None:
        """Free pinned memory, in whichever thread the last view of it is gone."""
        with suppress(BackendError), self:  # the device has failed, and nobody can be told here
            self._check(self._driver.cuMemFreeHost(pointer))

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes between two addresses, on the host or the device."""
        self._check(self._driver.cuMemcpyAsync(to, source, size, stream))

    def stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        flag = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._check(self._driver.cuStreamCreate(int(flag)))[0])

    def finish(self, stream: int) -> None:
        """Wait until all that was enqueued in a stream is done, without keeping a core busy."""
        event = self.event()
        try:
            self.record(event, stream)
            self.wait(event)
        finally:
            self.destroy_event(event)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._check(self._driver.cuStreamDestroy(stream))

    def event(self) -> int:
        """Create an event; a thread that waits for it sleeps instead of keeping a core busy."""
        flags = self._driver.CUevent_flags
        flag = int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_BLOCKING_SYNC)
        return int(self._check(self._driver.cuEventCreate(flag))[0])

    def record(self, event: int, stream: int) -> None:
        """Let an event mark the current end of a stream."""
        self._check(self._driver.cuEventRecord(event, stream))

    def wait(self, event: int) -> None:
        """Wait until the stream reaches the mark; returns at once if there is none."""
        self._check(self._driver.cuEventSynchronize(event))

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._check(self._driver.cuEventDestroy(event))

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
        self._check(status)

    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values that a function of the driver returned after its status."""
        status = result[0]
        if status == 0:
            return result[1:]
        code = int(status)
        _, text = self._driver.cuGetErrorString(status)
        reason = (text or b"unknown").decode()
        # Before the context exists, another process may have the device for itself, and end.
        if code in FINAL and self._context is not None:
            self.failed = f"GPU {self._number} has failed: {reason} (CUDA error {code})"
            raise BackendError(self.failed, START_AGAIN)
        raise BackendError(
            f"CUDA: {reason} (error {code})",
            "check the driver with nvidia-smi, and close other programs that use the GPU",
        )


class PinnedArray(NamedTuple):
    """Pinned host memory as an array, and its address."""

    array: NDArray[Any]
    pointer: int


@functools.cache
def cuda(device: int) -> Cuda:
    """The driver on a device, made once."""
    return Cuda(device)


_FOR_CUDA_12 = {"gpu": "'onnxruntime-gpu[cuda,cudnn]<1.27'", "tensorrt": "'tensorrt-cu12<12'"}


def packages(extra: str) -> str:
    """The arguments of `pip install` for this machine's version of CUDA.

    Args:
        extra: an extra of fpabee without the version of CUDA: `gpu`, `tensorrt` or `tensorrt-rtx`.
    """
    if cuda_device().cuda[0] != 12:
        return package(f"{extra}-cu13")
    return f"{package('commands,cuda')} {_FOR_CUDA_12.get(extra, f'{extra}-cu12')}"


def required_gpu(target: str, number: int = 0) -> CudaDevice:
    """The GPU of a target.

    Args:
        target: name of the target that needs it, for messages.
        number: of the GPU.

    Raises:
        BackendError: no GPU can be used, or this process was forked after CUDA was used: libraries
            can crash in it.
    """
    device = cuda_device(number)
    if device.error:
        other_target = "choose another `target`, such as onnxruntime-fp32"
        raise BackendError(
            f"target {target} needs an NVIDIA GPU, but {device.error}",
            f"give another `device`, or {other_target}" if number else other_target,
        )
    if device.process != os.getpid():
        raise BackendError(
            f"target {target} cannot run in this process, which was forked from one that had used "
            "the GPU",
            "start processes with the method spawn or forkserver of multiprocessing, and load the "
            "engine in each of them",
        )
    return device
