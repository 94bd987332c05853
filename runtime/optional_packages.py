"""Say in one line which optional packages are missing."""

from __future__ import annotations

from importlib import util

from .errors import MissingExtraError

_EXPORT = "fpabee[export,cpu]"
# What needs them: the packages, and what installs them.
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


def require(extra: str) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        MissingExtraError: which are missing, and the command that installs them.
    """
    packages, installed_by = _PACKAGES[extra]
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, not installed here", f"pip install '{installed_by}'"
        )
