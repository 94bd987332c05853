"""Versions, CPU and GPU of this machine, for a bug report or beside measured figures."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from .. import __version__
from .backends.cuda_probe import cuda_device

_PACKAGES = (
    "numpy",
    "tokenizers",
    "msgspec",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "onnx",
    "torch",
    "transformers",
)
# What matrix products in float32, bfloat16 and int8 gain from, on x86 and on ARM.
_CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def environment() -> dict[str, str]:
    """Versions and devices by name."""
    device = cuda_device()
    found = {"fpabee": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {
        "system": platform.platform(),
        "cpu": _cpu(),
        "gpu": device.error or f"{device.name}, compute capability {device.compute_capability}",
    }


def providers() -> str:
    """The execution providers of ONNX Runtime that is installed, or why there are none."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"none: {error}"
    # Two of its packages that overwrote each other leave a module without content.
    found: list[str] = getattr(onnxruntime, "get_available_providers", list)()
    return ", ".join(found) or "none: onnxruntime is damaged, install it again"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines()[:40] if ":" in line)
    content = {key.strip(): value.strip() for key, value in lines.items()}
    flags = content.get("flags", content.get("Features", "")).split()
    telling = [feature for feature in _CPU_FEATURES if feature in flags]
    return f"{content.get('model name', platform.machine())} ({' '.join(telling)})"
