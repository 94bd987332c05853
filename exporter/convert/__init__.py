"""Conversion: a classifier and texts without labels become an engines folder with a guarantee.

`places` checks the paths, `classifier` loads the classifier, `texts` deals the texts into parts,
`altered` makes copies from which exits learn as well, `states` runs the classifier once, `heads`
trains the heads of the exits, and `workflow` does all of it; `calibration` certifies every target.
`task` says in what classifiers and rerankers differ, and `classification` and `ranking` do it.
Importing this package loads neither torch nor transformers; using `convert` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...runtime.machine import require
from .options import Conversion, ConvertOptions

if TYPE_CHECKING:
    from .workflow import convert

__all__ = ["Conversion", "ConvertOptions", "convert"]


def __getattr__(name: str) -> Any:
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("export")
    from .workflow import convert

    return convert
