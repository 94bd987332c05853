"""Make something happen before each call of a method, and make logits that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fpabee.runtime.backends.host import HostExecution


def before(
    patch: pytest.MonkeyPatch, owner: object, name: str, action: Callable[..., object]
) -> None:
    """Let an action, which gets the same arguments, happen before each call of a method."""
    call = getattr(owner, name)

    def after_it(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return call(*arguments, **options)

    patch.setattr(owner, name, after_it)


def spoil_logits(patch: pytest.MonkeyPatch, rows: int | slice, at_exit: int | None = None) -> None:
    """Let a logit of some rows of each group be NaN on the CPU, at one exit or at every exit."""
    enqueue = HostExecution.enqueue

    def spoiled(execution: Any, hidden: Any) -> Any:
        logits = enqueue(execution, hidden)().copy()
        if at_exit in (None, hidden.segment):  # the segment that has run leads to it
            logits[rows, 1] = np.nan
        return lambda: logits

    patch.setattr(HostExecution, "enqueue", spoiled)
