"""What one thread says of texts, under every operating point and at full depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpabee.runtime import Budget, Engine, ExitRule, Prediction
from fpabee.runtime.agreement import exits_near_ties, near_ties
from fpabee.runtime.encoding import Text

TOLERANCE = 1e-4
"""Largest difference of a probability."""

FULL_DEPTH = "full depth"


@dataclass(frozen=True)
class Answer:
    """What one thread says of a text under a rule.

    Attributes:
        labels: the predicted labels.
        exit: the exit that answered.
        probabilities: of all labels.
        near: whether a difference within tolerance may change the exit or the labels.
    """

    labels: tuple[str, ...]
    exit: int
    probabilities: tuple[float, ...]
    near: bool

    def agrees(self, found: Prediction) -> bool:
        """Whether a prediction is this one."""
        return (
            found.exit == self.exit
            and found.labels == self.labels
            and np.allclose(found.probabilities, self.probabilities, rtol=0, atol=TOLERANCE)
        )


@dataclass(frozen=True)
class Reference:
    """Texts, and the answers of one thread.

    Attributes:
        texts: the texts.
        rules: rules by name: the operating points, and full depth.
        answers: by rule, one for each text.
    """

    texts: tuple[Text, ...]
    rules: dict[str, ExitRule]
    answers: dict[str, tuple[Answer, ...]]


def reference_of(engines: Path, texts: Sequence[Text]) -> Reference:
    """The answers of one thread, for every operating point and at full depth.

    Raises:
        FpabeeError: the folder cannot be run.
    """
    with Engine.load(engines, threads=1) as engine:
        points = engine.manifest.targets[engine.target].operating_points
        rules = {name: ExitRule.from_dict(point.rule) for name, point in points.items()}
        rules[FULL_DEPTH] = Budget(exit=len(engine.manifest.segments))
        logits = engine.trace(texts).logits
        task = engine.manifest.task
        ties = near_ties(logits, task, TOLERANCE)
        answers = {}
        for name, rule in rules.items():
            unsure = exits_near_ties(logits, rule, task, TOLERANCE)
            answers[name] = tuple(
                Answer(p.labels, p.exit, p.probabilities, bool(near or ties[p.exit - 1, row]))
                for row, (p, near) in enumerate(
                    zip(engine.predict(texts, rule=rule), unsure, strict=True)
                )
            )
        return Reference(tuple(texts), rules, answers)
