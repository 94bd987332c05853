"""Check that optional packages are installed."""

from __future__ import annotations

from importlib import util

from .errors import MissingExtraError

_EXPORT = "fpabee[export,cpu]"
# For each feature: the packages that it needs, and the requirement that installs them.
_PACKAGES = {
    "export": (
        ("torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub"),
        _EXPORT,
    ),
    "bench": (("onnx",), _EXPORT),
    "half": (("onnx", "onnxruntime"), _EXPORT),
    "merge": (("onnx", "onnxruntime"), _EXPORT),
    "train": (
        ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub"),
        "fpabee[train]",
    ),
    "plot": (("matplotlib", "jinja2"), "fpabee[plot]"),
}


def require(feature: str) -> None:
    """Check that the packages of a feature are installed.

    Raises:
        MissingExtraError: names the missing packages and the command that installs them.
    """
    packages, requirement = _PACKAGES[feature]
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, not installed here", f"pip install '{requirement}'"
        )
