"""The exporter: it turns a trained multi-exit PyTorch model into an engines folder.

`export` writes the folder, and checks it first. Importing this package loads neither torch nor
transformers; using a name of it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.machine import require

if TYPE_CHECKING:
    from .pipeline import ExportOptions, ExportResult, export

__all__ = ["ExportOptions", "ExportResult", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("export")
    from . import pipeline

    return getattr(pipeline, name)
