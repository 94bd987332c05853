"""The interface of tasks: the meaning of the logits of a kind of model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..artifact import manifest
from ..artifact.exits import Exits
from ..errors import InputError, RowError, RuleError
from ..predictions import Prediction
from ..quality import Labels
from ..rules.measures import TINY, Array, Floats, Integers, Mask, Outputs, outputs_of
from ..rules.rules import ExitRule
from ..rules.runner import RuleRunner, Simulation
from ..rules.settling import Runner, Settled

HALF = 0.5
"""The probability above which a label is predicted that has no threshold of its own."""

Tolerance = float | NDArray[np.floating[Any]]
"""By how much each logit may move: one number, or `[exits, rows]`."""


class Task(ABC):
    """A kind of model: what its logits mean, and what its callers give and get.

    A *unit* is what a caller gives and what a promise counts: a text, or a query with documents. An
    *item* is what the model gives logits for, and what has an exit.

    Args:
        record: the task, as the manifest describes it.

    Attributes:
        unit: what units are called, such as `texts`.
        item: what items are called, in the singular.
        does: what the model does, such as `classifies texts`.
        models: what such models are called, such as `classifiers`.
        method: the method of `Engine` that asks it.
        flags: whether any number of labels is given, so that each of them is a yes or no.
        compares: whether the exit of an item, and what it answers, depend on the others of its
            unit.
        has_one_logit: whether an item has a single logit, and so the model a single label.
        rules: the rules that fit, by name.
        record: the task, as the manifest describes it.
        labels: the names of the labels, in the order of the logits.
        outputs: makes the outputs of rows at an exit, from their logits `[rows, labels]`.
    """

    unit: ClassVar[str]
    item: ClassVar[str]
    does: ClassVar[str]
    models: ClassVar[str]
    method: ClassVar[str]
    flags: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    has_one_logit: ClassVar[bool] = False
    rules: ClassVar[Mapping[str, type[ExitRule]]]

    def __init__(self, record: manifest.Task) -> None:
        self.record = record
        self.labels = record.labels
        self.outputs: Callable[[Floats], Outputs] = outputs_of(
            record.problem_type, record.label_thresholds
        )

    @abstractmethod
    def runner(self, rule: ExitRule, exits: range) -> Runner[Any]:
        """The runner that decides which rows of groups stop.

        Args:
            rule: the rule.
            exits: the numbers of the exits of the model.

        Raises:
            RuleError: as in `rule_runner`, or nothing would run all layers although it must.
        """

    def rule_runner(self, rule: ExitRule, exits: range) -> RuleRunner:
        """The runner that applies a rule to rows that see the same exits.

        Args:
            rule: the rule.
            exits: the numbers of the exits of the model.

        Raises:
            RuleError: `rule` is not a rule, is one for another task, or does not fit the exits.
        """
        if not isinstance(rule, ExitRule):
            raise RuleError(
                f"the rule is {rule!r}, a {type(rule).__name__}",
                "give a rule such as FPabee(threshold=0.2), or ExitRule.from_dict(...)",
            )
        self._check_rule(rule)
        return RuleRunner(rule, exits, self.outputs)

    @property
    def name(self) -> str:
        """Its name for readers."""
        return self.record.problem_type.value

    @abstractmethod
    def default_rule(self, exits: range) -> ExitRule:
        """The rule of a model that was not calibrated.

        Args:
            exits: the numbers of its exits.
        """

    @abstractmethod
    def _check_rule(self, rule: ExitRule) -> None:
        """Refuse rules of other tasks.

        Raises:
            RuleError: it is one.
        """

    def simulate(self, logits: Floats, rule: ExitRule, first_exit: int = 1) -> Simulation:
        """Apply a rule to a trace: exactly the exits of a live run that gives these logits.

        Args:
            logits: `[exits, rows, labels]` at full depth, see `simulate`.
            rule: the rule.
            first_exit: the exit of the first logits.

        Raises:
            RuleError: the rule does not fit.
        """
        exits = range(first_exit, first_exit + len(logits))
        return self.rule_runner(rule, exits).simulate(logits)

    def answers(self, logits: Floats) -> Integers:
        """The answers at every exit: `[exits, rows]`, or with several labels a row `[..., labels]`.

        Args:
            logits: `[exits, rows, labels]`.
        """
        return np.stack([self.outputs(each).answers for each in logits])

    @abstractmethod
    def near_ties(self, logits: Floats, tolerance: Tolerance) -> Mask:
        """Where answers may change if each logit moves by the tolerance: `[exits, rows]`.

        Args:
            logits: `[exits, rows, labels]`.
            tolerance: by how much.
        """

    def log_likelihoods(self, logits: Floats, answers: Integers) -> Array:
        """Log probability `[..., rows]` of answers; several labels count as independent.

        Args:
            logits: `[rows, labels]` that give the probabilities.
            answers: int64 `[..., rows]`, or `[..., rows, labels]` of 0 and 1.
        """
        logs = np.log(np.maximum(self.outputs(logits).distributions, TINY))
        return np.asarray(np.where(answers == 1, logs[..., 0], logs[..., 1]).sum(axis=-1))

    def largest_entropy(self) -> float:
        """The largest entropy that there can be, in nats."""
        return len(self.labels) * math.log(2)

    def same(self, some: Integers, others: Integers) -> Mask:
        """Where answers are the same, with several labels the whole sets: `[..., rows]`."""
        return np.asarray((some == others).all(axis=-1))

    def same_decisions(
        self, some: Integers, others: Integers, label_thresholds: Sequence[float] = ()
    ) -> Mask:
        """Where decisions are the same: `[..., rows]`.

        Args:
            some: decisions, see `Outputs.decisions`.
            others: decisions to compare them with.
            label_thresholds: what both were decided by; empty: they are answers.
        """
        # Thresholds flag any number of labels, whatever the answers of the task are.
        return Task.same(self, some, others) if label_thresholds else self.same(some, others)

    @abstractmethod
    def results(self, settled: Settled, missed: Mask, exits: Exits) -> Sequence[Prediction | None]:
        """The answer of each row by itself.

        Args:
            settled: the rows, each an `EncodedRow`.
            missed: `[rows]` whether the deadline was missed.
            exits: those of the model.
        """

    def encode(self, names: Sequence[Sequence[str]], places: Sequence[str] = ()) -> Labels:
        """Convert label names to numbers.

        Args:
            names: the label names of each row.
            places: how to refer to each row in messages; default: by its number.

        Returns:
            int64: with one label for each row `[rows]` indices, else `[rows, labels]` of 0 and 1.

        Raises:
            RowError: the model does not have a label, or a row does not have exactly one although
                it must.
        """
        index = {name: number for number, name in enumerate(self.labels)}
        encoded = np.zeros((len(names), len(self.labels)), np.int64)
        for number, row in enumerate(names):
            place = places[number] if places else f"row {number + 1}"
            unknown = [name for name in row if name not in index]
            if unknown:
                raise RowError(
                    f"{place} has label {unknown[0]!r}, which the model does not know",
                    f"the model's labels are: {', '.join(self.labels)}",
                )
            self._check_count(row, place)
            encoded[number, [index[name] for name in row]] = 1
        return encoded

    def _check_count(self, names: Sequence[str], place: str) -> None:  # noqa: B027 - any number is right
        """Refuse a row with too many labels, or too few.

        Raises:
            RowError: it has.
        """

    @property
    def predicted_above(self) -> tuple[float, ...]:
        """The probability above which each label is predicted; 1 if the largest one decides."""
        usual = HALF if self.flags else 1.0
        return self.record.label_thresholds or (usual,) * len(self.labels)

    def decision_thresholds(self, thresholds: Mapping[str, float]) -> tuple[float, ...]:
        """The probability above which each label is flagged, if that is what is decided.

        Args:
            thresholds: the probability by label.

        Returns:
            `[labels]`, 1 for labels that decide nothing; empty if the answer is the decision.

        Raises:
            InputError: the model does not have a named label.
        """
        for label in thresholds:
            if label not in self.labels:
                raise InputError(
                    f"the model has no label {label!r}", f"choose from {', '.join(self.labels)}"
                )
        if not thresholds and not self.record.label_thresholds:
            return ()
        return tuple(map(thresholds.get, self.labels, self.predicted_above))
