"""Options for what is promised on new texts, and the bound that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import rich_click as click

from ..calibration.goals import Bound
from ..runtime.artifact.operating_point import Certificate
from . import options
from .console import echo_wrapped

PROMISES = {
    "drop": "--risk",
    "changed_answers": "--changed",
    "missed": "--missed",
    "false_alarms": "--false-alarms",
}
"""The option of everything that can be promised, by its name in `Bound`."""

thresholds = options.option(
    "--threshold thresholds",
    "LABEL=P",
    "A label is flagged above this probability. May be repeated.",
    multiple=True,
)
confidence = options.number("--confidence", "Confidence of the guarantee in percent. Default: 95.")


def say_condition(certificates: Iterable[Certificate | None], what: str = "texts") -> None:
    """Print when guarantees hold, if there are any.

    Args:
        certificates: of operating points.
        what: what they were tested on.
    """
    if any(certificates):
        echo_wrapped(
            f"a guarantee is about new {what}, and holds only if neither the model nor its exits "
            f"were trained on the {what} given here"
        )


def taken_shares(settings: dict[str, Any]) -> dict[str, float]:
    """The promises as shares, by their names in `Bound`; takes them out of the settings."""
    percent = {kind: settings.pop(kind, None) for kind in PROMISES}
    return {kind: value / 100 for kind, value in percent.items() if value is not None}


def bound_of(
    shares: Mapping[str, float], thresholds: Sequence[str], confidence: float | None
) -> Bound:
    """The bound that options ask for.

    Args:
        shares: what is promised, see `taken_shares`.
        thresholds: the texts of `--threshold`.
        confidence: in percent; None: 95.

    Raises:
        click.UsageError: a threshold cannot be read, options do not go together, or a number is out
            of its range.
    """
    options.only_with("missed false_alarms", thresholds, "--threshold")
    with options.wrong_usage():
        return Bound(
            confidence=0.95 if confidence is None else confidence / 100,
            thresholds=options.once("--threshold", map(_threshold, thresholds)),
            **shares,
        )


def _threshold(text: str) -> tuple[str, float]:
    """The two parts of `LABEL=P`."""
    label, equals, number = text.rpartition("=")
    with suppress(ValueError):
        if equals:
            return label, float(number)
    raise click.UsageError(f"{text!r} is not LABEL=P, such as attack=0.7")
