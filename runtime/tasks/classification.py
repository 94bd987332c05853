"""Texts that get one of several labels, or any number of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from ..artifact.exits import Exits
from ..errors import RowError, RuleError
from ..predictions import Prediction
from ..quality import Labels
from ..rules.measures import TINY, Array, Floats, Integers, Mask, Measure, Outputs
from ..rules.rules import RULES, ExitRule, FPabee
from ..rules.runner import RuleRunner
from ..rules.settling import Settled
from .task import HALF, Task, Tolerance


class Classification(Task):
    """The common part of the two kinds of classification."""

    unit = "texts"
    item = "text"
    does = "classifies texts"
    models = "classifiers"
    method = "predict"
    rules = RULES

    def default_rule(self, exits: range) -> ExitRule:
        """Cautious: two neighbouring exits have to agree, and be nearly certain.

        For two classes, that is a mean probability of 0.98.
        """
        return FPabee(measure=Measure.JSKD, threshold=0.1, patience=1)

    def runner(self, rule: ExitRule, exits: range) -> RuleRunner:
        """Each text knows by itself when to stop; see `Task.runner`."""
        return self.rule_runner(rule, exits)

    def results(self, settled: Settled, missed: Mask, exits: Exits) -> list[Prediction]:
        """The predictions of the texts."""
        outputs = self.outputs(settled.logits)
        columns = zip(
            settled.rows.tolist(),
            self._predicted(outputs),
            outputs.probabilities.tolist(),
            settled.logits.tolist(),
            settled.exits.tolist(),
            exits.depths(settled.exits).tolist(),
            settled.limited.tolist(),
            missed.tolist(),
            strict=True,
        )
        return [
            Prediction(
                labels=tuple([self.labels[number] for number in numbers]),
                scores=tuple([probabilities[number] for number in numbers]),
                exit=exit_number,
                layer=layer,
                probabilities=tuple(probabilities),
                logits=tuple(at_exit),
                truncated=row.truncated,
                deadline_limited=is_limited,
                deadline_missed=is_missed,
            )
            for (
                row,
                numbers,
                probabilities,
                at_exit,
                exit_number,
                layer,
                is_limited,
                is_missed,
            ) in columns
        ]

    @abstractmethod
    def _predicted(self, outputs: Outputs) -> list[list[int]]:
        """The numbers of the labels that each text gets."""

    def _check_rule(self, rule: ExitRule) -> None:
        if rule.ranks:
            raise RuleError(
                f"rule {rule.name} is for rankings, and the task is "
                f"{self.record.problem_type.value}",
                f"choose from {', '.join(self.rules)}",
            )


class SingleLabel(Classification):
    """One label for each text: the softmax over the logits."""

    def near_ties(self, logits: Floats, tolerance: Tolerance) -> Mask:
        """Where the two largest logits are too close."""
        if logits.shape[-1] == 1:
            return np.asarray(np.abs(logits[..., 0]) <= tolerance)
        top = np.sort(logits, axis=-1)
        return np.asarray(top[..., -1] - top[..., -2] <= 2 * np.asarray(tolerance))

    def log_likelihoods(self, logits: Floats, answers: Integers) -> Array:
        """Log probability `[..., rows]` of class indices `[..., rows]`."""
        logs = np.log(np.maximum(self.outputs(logits).distributions, TINY))
        return np.asarray(logs[np.arange(len(logs)), answers])

    def largest_entropy(self) -> float:
        """That of equal probabilities."""
        return math.log(len(self.labels))

    def same(self, some: Integers, others: Integers) -> Mask:
        """Where the class is the same."""
        return np.asarray(some == others)

    def _predicted(self, outputs: Outputs) -> list[list[int]]:
        """The label with the largest logit."""
        return [[number] for number in outputs.answers.tolist()]

    def encode(self, names: Sequence[Sequence[str]], places: Sequence[str] = ()) -> Labels:
        """Class indices `[rows]`."""
        classes: Labels = super().encode(names, places).argmax(axis=1)
        return classes

    def _check_count(self, names: Sequence[str], place: str) -> None:
        if len(names) != 1:
            raise RowError(
                f"{place} has {len(names)} labels, but the task is single-label",
                'give each row one "label"; several labels need a model that was trained and '
                "exported with `problem_type` multi_label_classification",
            )


class MultiLabel(Classification):
    """Any number of labels for each text: the sigmoid of each logit."""

    flags = True

    def near_ties(self, logits: Floats, tolerance: Tolerance) -> Mask:
        """Where a logit is too close to the one from which its label is predicted."""
        thresholds = np.asarray(self.record.label_thresholds or HALF, np.float64)
        with np.errstate(divide="ignore"):  # no logit is near a threshold of 0 or 1
            limits = np.log(thresholds) - np.log1p(-thresholds)
        return np.asarray(np.abs(logits - limits).min(axis=-1) <= tolerance)

    def _predicted(self, outputs: Outputs) -> list[list[int]]:
        """The labels whose probabilities are above their thresholds."""
        return [np.flatnonzero(row).tolist() for row in outputs.answers]
