"""Training: an encoder and labelled rows become a multi-exit model.

Importing this package loads neither torch nor transformers; using `train` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...runtime.machine import require
from .options import TrainOptions
from .report import TrainReport

if TYPE_CHECKING:
    from .workflow import train

__all__ = ["TrainOptions", "TrainReport", "train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("train")
    from .workflow import train

    return train
