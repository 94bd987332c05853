"""Check that optional packages are installed."""

from __future__ import annotations

from importlib import util

from .errors import MissingExtraError

# For each feature: the packages that it needs, and the extra of fpabee that installs them.
_PACKAGES = {
    "export": ("torch transformers onnx onnxscript safetensors huggingface_hub", "export,cpu"),
    "graphs": ("onnx onnxruntime", "export,cpu"),
    "quantize": ("nncf onnx onnxruntime", "export,cpu,quantize"),
    "train": ("torch transformers accelerate datasets safetensors huggingface_hub jinja2", "train"),
    "parquet": ("pyarrow", "parquet"),
    "ray": ("ray pyarrow", "ray"),
    "serve": ("prometheus_client starlette uvicorn", "serve"),
    "plot": ("matplotlib jinja2", "plot"),
}


def require(feature: str) -> None:
    """Check that the packages of a feature are installed.

    Raises:
        MissingExtraError: names the missing packages and the command that installs them.
    """
    packages, extra = _PACKAGES[feature]
    missing = [name for name in packages.split() if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, not installed here", f"pip install 'fpabee[{extra}]'"
        )
