"""How long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a description of the current step, how much of it is done, and the total."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing: the default wherever progress can be reported."""
