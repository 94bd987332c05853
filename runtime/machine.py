"""The CPU, the GPU and the packages of this machine, also for bug reports and measurements."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import platform
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata, util
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from .. import __version__
from .errors import MissingExtraError

_PACKAGES = (
    "numpy tokenizers msgspec onnxruntime onnxruntime-gpu openvino tensorrt tensorrt-cu12 "
    "tensorrt-cu13 tensorrt-rtx-cu12 tensorrt-rtx-cu13 cuda-bindings onnx torch transformers"
)
# Features that speed up matrix products in float32, bfloat16 and int8, on x86 and ARM.
_CPU_FEATURES = "avx2 avx512f avx512_vnni avx512_bf16 amx_tile asimddp i8mm bf16 sve sve2 sme"
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}
_OLDEST_CUDA = (12, 4)  # our kernel is made for it
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@cache
def cpu_info() -> dict[str, str]:
    """The report of Linux on the first core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines()[:40] if file.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def multiplies_int8() -> bool:
    """Whether products of int8 are exact. Where this cannot be found out, it is assumed.

    Without VNNI instructions, x86 adds two products of unsigned and signed int8 in 16 bits. Large
    sums are cut off, so a model would give other answers than on the machine that checked it.
    """
    flags = cpu_info().get("flags", "").split()
    return platform.machine() not in ("x86_64", "AMD64") or not flags or not _VNNI.isdisjoint(flags)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class CudaDevice:
    """A GPU, or why there is none.

    Attributes:
        name: the driver's name for it.
        compute_capability: such as `8.6`.
        cuda: the newest CUDA version that the driver runs, such as (12, 6).
        error: why no GPU can be used; empty if one can.
        process: the process that has asked, the only one that can use the GPU: CUDA does not work
            in processes that are forked from it.
        multiprocessors: how many it has; 0: not known.
    """

    name: str = ""
    compute_capability: str = ""
    cuda: tuple[int, int] = (0, 0)
    error: str = ""
    process: int = field(default_factory=os.getpid, compare=False)
    multiprocessors: int = 0

    @property
    def model(self) -> str:
        """Its name and multiprocessors: all modules of the Jetson Orin have the same name."""
        if not self.multiprocessors:
            return self.name
        return f"{self.name}, {self.multiprocessors} multiprocessors"


def cuda_device(number: int = 0) -> CudaDevice:
    """A CUDA device of this process, as its driver says, without any CUDA package.

    TensorRT's classes can crash the interpreter on a machine without a GPU, so this comes first.

    Args:
        number: the device, from 0, among those that `CUDA_VISIBLE_DEVICES` leaves.
    """
    devices = cuda_devices()
    if number < len(devices):
        return devices[number]
    numbers = "the only one is 0" if len(devices) == 1 else f"they are 0 to {len(devices) - 1}"
    missing = f"there is no CUDA device {number}: {numbers}"
    return replace(devices[0], error=devices[0].error or missing)


@cache
def cuda_devices() -> tuple[CudaDevice, ...]:
    """All CUDA devices of this process; if none can be used, one that says why."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return (CudaDevice(error="no NVIDIA driver is installed"),)
    status = driver.cuInit(0)
    count = ctypes.c_int()
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return (CudaDevice(error=f"the NVIDIA driver finds no GPU (error {status})"),)
    if count.value == 0:
        return (CudaDevice(error="there is no CUDA device"),)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    if cuda < _OLDEST_CUDA:
        old = (
            f"its driver is for CUDA {cuda[0]}.{cuda[1]}; install one for CUDA 12.4 or later "
            "(NVIDIA driver 550, JetPack 6.1)"
        )
        return (CudaDevice(error=old),)
    return tuple(_described(driver, number, cuda) for number in range(count.value))


def _described(driver: ctypes.CDLL, number: int, cuda: tuple[int, int]) -> CudaDevice:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    text = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(text, len(text), device)
    values = []
    for attribute in (*_COMPUTE_CAPABILITY, _MULTIPROCESSORS):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        values.append(value.value)
    major, minor, multiprocessors = values
    return CudaDevice(
        name=text.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        cuda=cuda,
        multiprocessors=multiprocessors,
    )


def environment() -> dict[str, str]:
    """Versions and devices by name."""
    device = cuda_device()
    versions = {"fpabee": __version__, "python": platform.python_version()}
    for name in _PACKAGES.split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "gpu": device.error
        or f"{device.name}, compute capability {device.compute_capability}, "
        f"driver for CUDA {device.cuda[0]}.{device.cuda[1]}",
    }


def providers() -> str:
    """The execution providers of the installed ONNX Runtime, or why there are none."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"none: {error}"
    # If two of its packages overwrote each other, the module is empty.
    names: list[str] = getattr(onnxruntime, "get_available_providers", list)()
    return ", ".join(names) or "none: onnxruntime is damaged, install it again"


def cpu_name() -> str:
    """The model of this machine's processor and the features that make it fast, as far as known."""
    name = cpu_info().get("model name") or platform.processor() or platform.machine()
    features = _cpu_features()
    return f"{name} ({' '.join(features)})" if features else name


def _cpu_features() -> list[str]:
    info = cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    return [feature for feature in _CPU_FEATURES.split() if feature in flags]


def kind_of_machine(library: str, on_gpu: bool = False, device: int = 0) -> str:
    """The kind of this machine to an inference library: system, processor or GPU, and library.

    Two machines of one kind give the same logits, up to the order in which they add.

    Args:
        library: as a target names its backend, such as `tensorrt-rtx`; it must be installed.
        on_gpu: whether the library runs on a GPU.
        device: the number of the GPU.
    """
    processor = " ".join([platform.machine(), *_cpu_features()])
    if on_gpu:
        gpu = cuda_device(device)
        driver = ".".join(map(str, gpu.cuda))
        processor = f"{gpu.name} {gpu.compute_capability} with a driver for CUDA {driver}"
    module = importlib.import_module(library.replace("-", "_"))
    version = getattr(module, "__version__", "unknown")
    return f"{platform.system()}, {processor}, {library} {version}"


def cache_folder() -> Path:
    """Where fpabee keeps what can be made again, in the user's cache directory; it need not exist.

    Raises:
        OSError: the user has no home directory.
    """
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fpabee"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "this user has no home directory") from error


def hardware(on_gpu: bool, threads: int | None) -> str:
    """The hardware that runs a target here: the GPU, or the CPU and the number of threads."""
    return cuda_device().name if on_gpu else f"{cpu_name()}, {threads or usable_cores()} threads"


class _DirInfo(msgspec.Struct, frozen=True):
    editable: bool = False


class _Origin(msgspec.Struct, frozen=True):
    """The part of direct_url.json that is read, see PEP 610."""

    url: str = ""
    dir_info: _DirInfo = _DirInfo()


@cache
def _origin() -> _Origin:
    """Where this fpabee was installed from, unless that is an index of packages."""
    # Only hints need it, so a damaged file is like none.
    with suppress(metadata.PackageNotFoundError, msgspec.DecodeError):
        text = metadata.distribution("fpabee").read_text("direct_url.json")
        return msgspec.json.decode(text or "{}", type=_Origin)
    return _Origin()


def package(extras: str) -> str:
    """The argument of `pip install` for fpabee with extras, such as `'fpabee[cpu]'`.

    It names the folder or the file that this fpabee was installed from, if it was.

    Args:
        extras: separated by commas.
    """
    address = urlsplit(_origin().url)
    source = unquote(address.path) if address.scheme == "file" else "fpabee"
    option = "-e " if _origin().dir_info.editable else ""
    return option + shlex.quote(f"{source}[{extras}]")


# For each feature: the packages that it needs, and what installs them; brackets hold our extras.
_FEATURES = {
    "export": ("torch transformers onnx onnxscript safetensors huggingface_hub", "[export,cpu]"),
    "graphs": ("huggingface_hub onnx onnx_ir onnxscript onnxruntime", "[cpu,graphs]"),
    "quantize": ("nncf onnx onnxruntime", "[export,cpu,quantize]"),
    "train": ("torch transformers safetensors huggingface_hub jinja2", "[train]"),
    "peft": ("peft", "peft"),
    "parquet": ("pyarrow", "[parquet]"),
    "ray": ("ray pyarrow", "[ray]"),
    "hub": ("huggingface_hub", "huggingface-hub"),
    "serve": ("prometheus_client starlette uvicorn", "[serve]"),
    "plot": ("matplotlib jinja2", "matplotlib jinja2"),
}


def require(feature: str, what: str = "this") -> None:
    """Check that the packages of a feature are installed.

    Args:
        feature: the feature.
        what: what needs it, for the message.

    Raises:
        MissingExtraError: names the missing packages and the command that installs them.
    """
    packages, install = _FEATURES[feature]
    missing = [name for name in packages.split() if util.find_spec(name) is None]
    if missing:
        if install.startswith("["):
            install = package(install.strip("[]"))
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, not installed here",
            f"pip install {install}",
        )
