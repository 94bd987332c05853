"""The errors of fpabee.

    FpabeeError                 everything a user can mend; exit code 1
    |-- ModelError              model_dir: missing, damaged, or not a multi-exit model
    |-- ArtifactError           engines folder: missing, damaged, or of another version
    |-- InputError              texts and labels to read, and results to write
    |   `-- RowError            one row of an input; the rows after it can be read
    |-- RuleError               an exit rule that does not exist or does not fit
    |-- BackendError            what an inference library cannot do here
    |   `-- MissingExtraError   an optional package is not installed
    `-- VerificationError       segments or a target do not reproduce the PyTorch model

Every message says what was found, what was expected, and how to mend it, in one line: what it
quotes of a file or of the command line may hold line ends, escape codes, or megabytes.
"""

from __future__ import annotations

_MOST_CHARACTERS = 480


class FpabeeError(Exception):
    """Base of all errors that a user can mend; commands print them as one line and exit with 1.

    Attributes:
        message: what was found and what was expected.
        hint: what to do or to run; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _without_middle(printable(_without_middle(message)))
        self.hint = _without_middle(printable(_without_middle(hint)))
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
    """One row of an input cannot be read; the rows after it can."""


class RuleError(FpabeeError):
    """An exit rule does not exist, lacks a setting, or does not fit the model."""


class BackendError(FpabeeError):
    """The inference library cannot do here what was asked."""


class MissingExtraError(BackendError):
    """An optional package is not installed; the hint is the command that installs it."""


class VerificationError(FpabeeError):
    """Segments, or a target built of them, do not give what the PyTorch model gives."""


def printable(text: str) -> str:
    """The text in one line: line ends, escape codes and all else that is not printable escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _without_middle(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
