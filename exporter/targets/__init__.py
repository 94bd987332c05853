"""Targets: the ways to run an engines folder, each a library and a precision.

`build_targets` adds them by name, each checked. `builders` says what builds each of them. Importing
this package loads no inference library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import BuildResult, build_targets
    from .plans import PlanOptions

__all__ = ["BuildResult", "PlanOptions", "build_targets"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not above, because the workers of this package are modules that `build` imports.
    from . import build

    return getattr(build, name)
