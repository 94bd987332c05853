"""Check the numbers that a program hands to the runtime."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .errors import FpabeeError, InputError


def whole_number(name: str, value: Any, error: type[FpabeeError], most: int | None = None) -> int:
    """A whole number from 1; numpy's are taken as well.

    Args:
        name: what the argument is called.
        value: what was given.
        error: what is raised where it is something else.
        most: the largest number; None: there is none.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < 1 or (most is not None and value > most):
        upto = "from 1" if most is None else f"from 1 to {most}"
        raise error(f"{name} is {value!r}", f"give a whole number {upto}")
    return int(value)


def seconds_of(name: str, milliseconds: Any) -> float:
    """Milliseconds in seconds.

    Args:
        name: what the argument is called.
        milliseconds: any number, also one of numpy.

    Raises:
        InputError: it is no number.
    """
    is_number = isinstance(milliseconds, Real) and not isinstance(milliseconds, bool)
    if not is_number or math.isnan(milliseconds):
        raise InputError(
            f"{name} is {milliseconds!r}", "give milliseconds as a number, or leave it out"
        )
    return float(milliseconds) / 1000
