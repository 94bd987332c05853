"""Check numbers that a program passes to the runtime."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .errors import FpabeeError, InputError


def whole_number(
    name: str, value: Any, error: type[FpabeeError], most: int | None = None, least: int = 1
) -> int:
    """Check that an argument is a whole number; a NumPy integer is one, too.

    Args:
        name: name of the argument.
        value: value of the argument.
        error: the error to raise if it is anything else.
        most: the largest number allowed; None: any.
        least: the smallest number allowed.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        upto = "" if most is None else f" to {most}"
        raise error(f"{name} is {value!r}", f"give a whole number from {least}{upto}")
    return int(value)


def seconds_of(name: str, milliseconds: Any) -> float:
    """Convert milliseconds to seconds.

    Args:
        name: name of the argument.
        milliseconds: any number, possibly a numpy one.

    Raises:
        InputError: it is not a number.
    """
    is_number = isinstance(milliseconds, Real) and not isinstance(milliseconds, bool)
    if not is_number or milliseconds != milliseconds:  # NaN
        raise InputError(
            f"{name} is {milliseconds!r}", "give milliseconds as a number, or leave it out"
        )
    try:
        return float(milliseconds) / 1000
    except OverflowError:  # a whole number that is larger than any float
        return math.inf if milliseconds > 0 else -math.inf
