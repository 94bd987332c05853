"""Rules and drops in a few words, for tables."""

from __future__ import annotations

from ..runtime.rules.base import ExitRule
from .outcome import Outcome


def drop_in_words(held: Outcome) -> str:
    """A drop in points with its interval: `+0.23 (-0.80 to +1.15)`."""
    return f"{held.drop:+.2f} ({held.interval[0]:+.2f} to {held.interval[1]:+.2f})"


def rule_in_words(rule: ExitRule) -> str:
    """A rule in a few words: `fpabee jskd 0.13, patience 2`."""
    settings = dict(rule.to_dict())
    words = [str(settings.pop("name")), str(settings.pop("measure", ""))]
    threshold = settings.pop("threshold", None)
    if isinstance(threshold, tuple):
        words.append("threshold per exit")
    elif threshold is not None:
        words.append(f"{threshold:.4g}")
    rest = [f"{key.replace('_', ' ')} {value}" for key, value in settings.items()]
    rest = [text for text in rest if text != "patience 1"]
    return ", ".join([" ".join(word for word in words if word), *rest])
