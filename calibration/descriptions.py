"""Rules and drops in a few words, for tables."""

from __future__ import annotations

from ..runtime.rule_words import rule_in_words as rule_in_words
from .outcome import Outcome


def drop_in_words(held: Outcome) -> str:
    """A drop in points with its interval: `+0.23 (-0.80 to +1.15)`."""
    return f"{held.drop:+.2f} ({held.interval[0]:+.2f} to {held.interval[1]:+.2f})"
