"""Exit rules in a few words, for people."""

from __future__ import annotations

from ..artifact.operating_point import RuleSettings
from .rules import ExitRule


def rounded(threshold: float) -> float:
    """A threshold with four significant digits, as people can read it and manifests store it.

    From 0.9 to 1, these are digits of the distance to 1: many confidences are so close to 1 that
    four digits of their own would make them equal.
    """
    distance = 1 - threshold
    if 0 < distance < 0.1:
        return 1 - float(f"{distance:.4g}")
    return float(f"{threshold:.4g}")


def rule_in_words(rule: ExitRule) -> str:
    """A rule in a few words: `fpabee jskd 0.13, patience 2`."""
    return settings_in_words(rule.to_dict())


def settings_in_words(settings: RuleSettings) -> str:
    """The same for settings from a manifest, whose rule this version may not know."""
    rest = dict(settings)
    if rest.get("name") == "budget" and "exit_0_threshold" in rest:
        limit = _in_digits(rest["exit_0_threshold"])
        return f"cascade: exit 0 above {limit}, else exit {rest.get('exit')}"
    words = [str(rest.pop(name, "")) for name in ("name", "measure")]
    threshold = rest.pop("threshold", None)
    if isinstance(threshold, tuple):
        words.append("threshold per exit")
    elif threshold is not None:
        words.append(_in_digits(threshold))
    if label_thresholds := rest.pop("label_thresholds", None):
        assert isinstance(label_thresholds, tuple | list)
        deciding = {_in_digits(each) for each in label_thresholds if each < 1}
        rest["label thresholds"] = "/".join(sorted(deciding))
    others = [f"{key.replace('_', ' ')} {_in_digits(value)}" for key, value in rest.items()]
    others = [text for text in others if text != "patience 1"]
    return ", ".join([" ".join(filter(None, words)), *others])


def _in_digits(value: object) -> str:
    return str(rounded(value)).removesuffix(".0") if isinstance(value, float) else str(value)
