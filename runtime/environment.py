"""Versions, CPU and GPU of this machine, for bug reports and next to measurements."""

from __future__ import annotations

import platform
from importlib import metadata

from .. import __version__
from .backends.cuda_probe import cuda_device
from .cpu import cpu_info

_PACKAGES = (
    "numpy tokenizers msgspec onnxruntime onnxruntime-gpu openvino tensorrt tensorrt-cu12 "
    "tensorrt-cu13 tensorrt-rtx-cu12 tensorrt-rtx-cu13 cuda-bindings onnx torch transformers"
)
# Features that speed up matrix products in float32, bfloat16 and int8, on x86 and ARM.
_CPU_FEATURES = "avx2 avx512f avx512_vnni avx512_bf16 amx_tile asimddp i8mm bf16 sve"


def environment() -> dict[str, str]:
    """Versions and devices by name."""
    device = cuda_device()
    found = {"fpabee": __version__, "python": platform.python_version()}
    for name in _PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {
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
    found: list[str] = getattr(onnxruntime, "get_available_providers", list)()
    return ", ".join(found) or "none: onnxruntime is damaged, install it again"


def cpu_name() -> str:
    """The model of this machine's processor and the features that make it fast, as far as known."""
    info = cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    flags = info.get("flags", info.get("Features", "")).split()
    found = [feature for feature in _CPU_FEATURES.split() if feature in flags]
    return f"{name} ({' '.join(found)})" if found else name
