"""Say in one line which optional packages are missing."""

from __future__ import annotations

from importlib import util

from ..runtime.errors import MissingExtraError

_PACKAGES = {
    "export": ("torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub"),
    "bench": ("onnx",),
    "merge": ("onnx", "onnxruntime"),
    "half": ("onnx", "onnxruntime"),
}


def require(extra: str) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        MissingExtraError: which are missing, and the command that installs them.
    """
    missing = [name for name in _PACKAGES[extra] if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, not installed here",
            "pip install 'fpabee[export,cpu]'",
        )
