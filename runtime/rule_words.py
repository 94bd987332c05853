"""Exit rules in a few words, for people."""

from __future__ import annotations

from .artifact.operating_point import RuleSettings
from .rules.base import ExitRule


def rule_in_words(rule: ExitRule) -> str:
    """A rule in a few words: `fpabee jskd 0.13, patience 2`."""
    return settings_in_words(rule.to_dict())


def settings_in_words(settings: RuleSettings) -> str:
    """The same for settings from a manifest, whose rule this version may not know."""
    rest = dict(settings)
    if rest.get("name") == "budget" and "exit_0_threshold" in rest:
        return f"cascade: exit 0 from {rest['exit_0_threshold']}, else exit {rest.get('exit')}"
    words = [str(rest.pop(name, "")) for name in ("name", "measure")]
    threshold = rest.pop("threshold", None)
    if isinstance(threshold, tuple):
        words.append("threshold per exit")
    elif threshold is not None:
        words.append(f"{threshold:.4g}" if isinstance(threshold, float) else str(threshold))
    others = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in rest.items()
        if not isinstance(value, tuple)
    ]
    others = [text for text in others if text != "patience 1"]
    return ", ".join([" ".join(filter(None, words)), *others])
