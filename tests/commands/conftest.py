"""What commands are tested with: engines folders and doubles of the packages below them."""

from __future__ import annotations

from ..exporter.conftest import double, golden_engines, ready_graphs
from ..runtime.conftest import bert, run, serve, short_target, without_special_tokens

__all__ = [
    "bert",
    "double",
    "golden_engines",
    "ready_graphs",
    "run",
    "serve",
    "short_target",
    "without_special_tokens",
]
