"""The errors of fpabee.

    FpabeeError                 everything that a user can fix; commands exit with code 1
    |-- ModelError              model_dir: missing, damaged, or not a multi-exit model
    |-- ArtifactError           engines folder: missing, damaged, or of another version
    |-- InputError              texts and labels to read, and results to write
    |   `-- RowError            one row of an input; the rows after it can still be used
    |-- RuleError               an exit rule that does not exist or does not fit the model
    |-- BackendError            something that an inference library cannot do on this machine
    |   `-- MissingExtraError   an optional package is not installed
    |-- OverloadedError         the queue of a scheduler is full
    `-- CheckError              segments or a target do not reproduce the PyTorch model

Every message says what was found and what was expected, and its hint says what to change. A
message is one line, although the text that it quotes from a file or from the command line may
contain line endings, escape codes, or megabytes.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from numbers import Integral, Real
from typing import Any

_MOST_CHARACTERS = 480


EXPORT_AGAIN = "export or convert the model again"
"""For an engines folder whose content cannot be used."""
COPY_AGAIN = f"copy the engines folder again, or {EXPORT_AGAIN}"
"""For an engines folder that may have been damaged on its way."""
START_AGAIN = "start this process again"
"""For a GPU that has failed."""


class FpabeeError(Exception):
    """Base of all errors that a user can fix; commands print one line and exit with code 1.

    Args:
        message: what was found and what was expected.
        hint: what to change; may be empty. Functions and their parameters are in backticks.

    Attributes:
        message: the message, in one line.
        hint: the hint, in one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = in_one_line(message)
        self.hint = in_one_line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} -> {self.hint}" if self.hint else self.message


class ModelError(FpabeeError):
    """The model_dir is missing, damaged, or not a multi-exit model that can be compiled."""


class ArtifactError(FpabeeError):
    """The engines folder is missing, damaged, or was written by another version."""


class InputError(FpabeeError):
    """Texts or labels cannot be read, or results cannot be written."""


class RowError(InputError):
    """One row of an input cannot be read, or its label cannot be used; the rows after it can."""


class RuleError(FpabeeError):
    """An exit rule does not exist, lacks a setting, or does not fit the model."""


class BackendError(FpabeeError):
    """The inference library cannot do what was asked on this machine."""


class MissingExtraError(BackendError):
    """An optional package is not installed; the hint is the command that installs it."""


class OverloadedError(FpabeeError):
    """The unanswered rows of a scheduler, or their tokens, are as many as its queue takes."""


class CheckError(FpabeeError):
    """Segments, or a target built from them, do not reproduce the PyTorch model."""


def printable(text: str) -> str:
    """The text in one line: line endings, escape codes and other control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_one_line(text: str) -> str:
    """The text in one line of at most about 480 characters; a longer text loses its middle."""
    return _without_middle(printable(_without_middle(text)))


@functools.lru_cache(maxsize=1000)
def warn_once(logger: logging.Logger, warning: str, about: object = None) -> None:
    """Log a warning in one line, unless this process was told the same about the same thing.

    Args:
        logger: that of the module that warns.
        warning: what is the case, and what to do.
        about: what it is about, such as a folder, which may be loaded again.
    """
    logger.warning("%s", printable(warning))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its class if there is none.

    OpenVINO begins with lines that say where in its source the error was noticed.
    """
    lines = str(error).strip().splitlines()
    said = (line for line in lines if not re.search("^Exception from |Check '.*' failed at ", line))
    return next(said, type(error).__name__)


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
        InputError: it is not a number from 0.
    """
    is_number = isinstance(milliseconds, Real) and not isinstance(milliseconds, bool)
    try:
        seconds = float(milliseconds) / 1000 if is_number else math.nan
    except OverflowError:  # an integer that no float can hold
        seconds = math.nan
    if not seconds >= 0:
        raise InputError(
            f"{name} is {_without_middle(repr(milliseconds))}",
            "give milliseconds as a number from 0, or leave it out",
        )
    return seconds


def _without_middle(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
