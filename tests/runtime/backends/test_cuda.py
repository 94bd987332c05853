"""What the driver must be, and what it gets through the real `cuda-bindings`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fpabee.runtime import BackendError, MissingExtraError, machine
from fpabee.runtime.backends import cuda
from fpabee.runtime.backends.cuda import PTX
from fpabee.runtime.machine import CudaDevice

from ...doubles.device import set_gpu

ROOT = Path(__file__).parents[3]

_LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long Address;
static int depth;
static char memory[64];
#define CALL(...) \
  do { \
    printf(depth == 1 ? "" : "without a context: "); \
    printf(__VA_ARGS__); \
    puts(""); \
    fflush(stdout); \
    if (depth != 1) return 201; \
  } while (0)
static int other(void) { return 0; }
static int device(int *device, int number) { *device = number; return 0; }
static int retain(Address *context, int device) { *context = 100 + device; return 0; }
static int push(Address context) { depth += context == 101; return context != 101; }
static int pop(Address *context) { *context = 101; depth -= 1; return 0; }
static int load(Address *module, const char *image) {
  CALL("load %zu", strlen(image));
  *module = 1;
  return 0;
}
static int get(Address *function, Address module, const char *name) {
  CALL("get %llu %s", module, name);
  *function = 3;
  return 0;
}
static int launch(Address function, int x, int y, int z, int threads, int rows, int depth_,
                  int shared, Address stream, void **values, void **extra) {
  unsigned long long *plan = values[0];
  CALL("launch %llu %d %d %d %d %d %d %d %llu %p %llu %llu %llu %llu %u", function, x, y, z,
       threads, rows, depth_, shared, stream, (void *)extra, plan[0], plan[1], plan[2],
       plan[3 + 255], ((unsigned *)(plan + 3 + 256))[255]);
  return 0;
}
static int allocate(Address *address, size_t size) {
  CALL("allocate %zu", size);
  *address = 4096;
  return size > 1000 ? 2 : 0;
}
static int release(Address address) {
  CALL("free %llu", address);
  return address == 4096 ? 0 : 719;
}
static int room(size_t *left, size_t *total) {
  CALL("room");
  *left = 3 << 20;
  *total = 8 << 20;
  return 0;
}
static int pin(void **address, size_t size, int flags) {
  CALL("pin %zu %d", size, flags);
  *address = memory;
  return 0;
}
static int unpin(void *address) { CALL("unpin %d", address == memory); return 0; }
static int copy(Address to, Address from, size_t size, Address stream) {
  CALL("copy %llu %d %zu %llu", to, from == (Address)memory, size, stream);
  return 0;
}
static int stream(Address *stream, int flags) { CALL("stream %d", flags); *stream = 78; return 0; }
static int event(Address *event, int flags) { CALL("event %d", flags); *event = 79; return 0; }
static int record(Address event, Address stream) {
  CALL("record %llu %llu", event, stream);
  return 0;
}
static int wait(Address event) { CALL("wait %llu", event); return 0; }
static int end_event(Address event) { CALL("end event %llu", event); return 0; }
static int end_stream(Address stream) { CALL("end stream %llu", stream); return 0; }
static int reason(int status, const char **text) { *text = "made up"; return 0; }
static const struct { const char *name; void *function; } calls[] = {
    {"cuDeviceGet", device}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxPushCurrent", push}, {"cuCtxPopCurrent", pop},
    {"cuModuleLoadData", load}, {"cuModuleGetFunction", get}, {"cuLaunchKernel", launch},
    {"cuMemAlloc", allocate}, {"cuMemFree", release}, {"cuMemGetInfo", room},
    {"cuMemHostAlloc", pin}, {"cuMemFreeHost", unpin}, {"cuMemcpyAsync", copy},
    {"cuStreamCreate", stream}, {"cuStreamDestroy", end_stream},
    {"cuEventCreate", event}, {"cuEventRecord", record}, {"cuEventSynchronize", wait},
    {"cuEventDestroy", end_event}, {"cuGetErrorString", reason}, {"cuInit", other}};
int cuGetProcAddress_v2(const char *name, void **function, int version, long flags, void *status) {
  *function = !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)other;
  for (size_t n = 0; n < sizeof calls / sizeof *calls; n++)
    if (!strcmp(name, calls[n].name)) {
      if (version > 12040) printf("%s is too new: %d\n", name, version);
      *function = calls[n].function;
    }
  return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""
"""A driver that prints the calls that need a context, and refuses them without one.

It also prints which functions are asked for as drivers after CUDA 12.4 have them.
"""
_PROGRAM = """
import numpy as np
from fpabee.runtime import BackendError
from fpabee.runtime.backends.cuda import GATHER, Cuda
cuda = Cuda(1)
plan = np.zeros(1, GATHER)
plan["to"], plan["pitch"], plan["fill"] = 7, 8193, 9
plan["sources"][0, -1], plan["widths"][0, -1] = 10, 11
with cuda:
    stream = cuda.stream()
    event = cuda.event()
    address = cuda.malloc(24)
    pinned = cuda.pinned((2, 3), np.dtype(np.float32))
    pinned.array[:] = 1
    cuda.copy(address, pinned.pointer, pinned.array.nbytes, stream)
    cuda.gather(plan, 256, stream)
    cuda.record(event, stream)
    cuda.wait(event)
    cuda.finish(stream)
    cuda.free(address)
    cuda.destroy_event(event)
    cuda.destroy_stream(stream)
del pinned
def fails(call, *arguments):
    try:
        with cuda:
            call(*arguments)
    except BackendError as error:
        print(error, flush=True)
fails(cuda.malloc, 64 << 20)
fails(cuda.free, 1)
fails(cuda.free, address)
"""
_CALLS = f"""
load {PTX.stat().st_size}
get 1 gather_rows
stream 1
event 3
allocate 24
pin 24 0
copy 4096 1 24 78
launch 3 256 2 1 256 1 1 0 78 (nil) 7 8193 9 10 11
record 79 78
wait 79
event 3
record 79 78
wait 79
end event 79
free 4096
end event 79
end stream 78
unpin 1
allocate {64 << 20}
room
the GPU has no room for 64.0 MiB: 3 of 8 MiB of device memory are free -> use .*
free 1
GPU 1 has failed: made up .CUDA error 719. -> start .* again
GPU 1 has failed: made up .CUDA error 719. -> start .* again
"""
"""Event 3 has no timing and does not keep a core busy, and stream 1 is not blocking."""


@pytest.mark.skipif(sys.platform != "linux", reason="loads a library by its name on Linux")
def test_the_real_bindings_make_the_calls_in_the_context_of_the_device(
    compile_c: Callable[..., Path],
) -> None:
    """With a made-up driver for CUDA 12.4. The kernel is loaded first, and once."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    library = compile_c(_LIBRARY, "libcuda.so.1")
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stdout.splitlines(), _CALLS.split("\n")[1:-1], strict=True):
        assert line == expected or re.fullmatch(expected, line), (line, expected)


def _driver(version: int, devices: int) -> SimpleNamespace:
    """A driver whose devices have their number as compute capability, twice."""

    def sets(number: int) -> Callable[..., int]:
        return lambda place, *_: assign(place, number)

    def assign(place: Any, number: int) -> int:
        place._obj.value = number
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=sets(devices),
        cuDriverGetVersion=sets(version),
        cuDeviceGet=assign,
        cuDeviceGetName=lambda *_: 0,
        cuDeviceGetAttribute=lambda place, attribute, device: assign(place, device.value),
    )


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sequence[CudaDevice]]:
    """The devices of a driver."""

    def find(version: int, count: int = 1) -> Sequence[CudaDevice]:
        monkeypatch.setattr("ctypes.CDLL", lambda name: _driver(version, count))
        found = machine.cuda_devices.__wrapped__()
        monkeypatch.setattr(machine, "cuda_devices", lambda: found)
        return found

    return find


@pytest.mark.parametrize(("version", "is_old"), [(11040, True), (12020, True), (12040, False)])
def test_a_driver_must_be_for_cuda_12_4(
    version: int,
    is_old: bool,
    devices: Callable[..., Sequence[CudaDevice]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (device,) = devices(version)
    if not is_old:
        assert device == CudaDevice("", "0.0", (12, 4))
        return
    set_gpu(monkeypatch, device)
    says = r"needs an NVIDIA GPU, but its driver is for CUDA 1.\..; .*NVIDIA driver 550, JetPack"
    with pytest.raises(BackendError, match=says):
        cuda.required_gpu("tensorrt-fp16-sm86")


def test_a_gpu_is_chosen_by_its_number(devices: Callable[..., Sequence[CudaDevice]]) -> None:
    devices(13000, count=3)
    for number in range(3):
        assert cuda.required_gpu("x", number).compute_capability == f"{number}.{number}"
    with pytest.raises(BackendError, match=r"no CUDA device 3: they are 0 to 2 -> .*`device`"):
        cuda.required_gpu("x", 3)


NAMES = """
    DEINITIALIZED DEVICE_UNAVAILABLE INVALID_CONTEXT ECC_UNCORRECTABLE NVLINK_UNCORRECTABLE
    CONTAINED ILLEGAL_ADDRESS LAUNCH_TIMEOUT CONTEXT_IS_DESTROYED ASSERT HARDWARE_STACK_ERROR
    ILLEGAL_INSTRUCTION MISALIGNED_ADDRESS INVALID_ADDRESS_SPACE INVALID_PC LAUNCH_FAILED
    TENSOR_MEMORY_LEAK MPS_CONNECTION_FAILED MPS_RPC_FAILURE MPS_SERVER_NOT_READY
    MPS_MAX_CLIENTS_REACHED MPS_MAX_CONNECTIONS_REACHED MPS_CLIENT_TERMINATED UNKNOWN
"""


def test_some_errors_end_the_use_of_a_device() -> None:
    """All others refuse one call, such as those while another thread captures a graph."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    names = {f"CUDA_ERROR_{name}" for name in NAMES.split()}
    codes = {getattr(driver.CUresult, name).value for name in names}
    assert codes == cuda.FINAL


@pytest.mark.parametrize("version", [12, 13, 14])
@pytest.mark.parametrize("extra", ["gpu", "tensorrt", "tensorrt-rtx"])
def test_hints_name_extras_that_exist(
    extra: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpu(monkeypatch, CudaDevice("", "8.6", (version, 4)))
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (named,) = re.findall(r"\[([^]]*)\]'", cuda.packages(extra))
    assert set(named.split(",")) <= project["optional-dependencies"].keys()
    assert ("cu13" in cuda.packages(extra)) == (version > 12)


def test_the_bindings_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[cuda\]'"):
        cuda.Cuda(0)


def test_modules_of_a_jetson_differ_in_their_multiprocessors() -> None:
    models = {CudaDevice("Orin", "8.7", (12, 6), multiprocessors=count).model for count in (8, 16)}
    assert models == {"Orin, 8 multiprocessors", "Orin, 16 multiprocessors"}
