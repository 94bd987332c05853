"""Exit rules as nodes of a graph: which rows stop at an exit, and what they answer.

The formulas are those of `runtime.rules`, in float64 as there. A row keeps the logits of its own
exit, so what is computed for a row that has stopped does not matter.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.manifest import ProblemType, Task
from ...runtime.errors import RuleError
from ...runtime.rules.measures import Outputs
from ...runtime.rules.rules import RULES, Confidence, Energy, Epee, ExitRule, Pabee, ThresholdRule
from .nodes import Scope, Value, where

SETTINGS = "fpabee."
"""The names of the initializers that hold settings begin with this, see `settings_of`."""

State = dict[str, Value]
"""What is carried from exit to exit.

    logits   [batch, labels] float32, of the exit that a row has reached
    exit     [batch] int64, that exit
    stopped  [batch] bool, whether the row has stopped there
    done     [] bool, whether all rows have stopped
    streak   [batch] int64, only if the rule has a patience: consecutive signals so far
"""


def settings_of(rule: ExitRule, task: Task, exits: range) -> dict[str, NDArray[Any]]:
    """The settings of a rule as a graph holds them, by the names of its initializers.

        fpabee.thresholds           [exits] float64, from exit 1: a row gives its signal where the
                                    score of the rule is below; for confidence it is 1 - max p
        fpabee.patience             how many consecutive signals stop a row
        fpabee.exit                 of the rule `budget`
        fpabee.min_exit             as in `ExitRule`
        fpabee.max_exit             as in `ExitRule`
        fpabee.exit_0_threshold     a row stops at exit 0 where 1 - max p is below
        fpabee.decision_thresholds  of the labels that decide, in the order of the labels
        fpabee.label_thresholds     [labels], of rules that compare answers in multi-label tasks

    Only those that the rule uses exist. All but the thresholds are one int64.

    Args:
        rule: the rule.
        task: the task.
        exits: the numbers of the exits.

    Raises:
        RuleError: it is a rule of your own, or it does not fit the exits.
    """
    if type(rule) not in RULES.values():
        raise RuleError(
            f"rule {rule.name} is a rule of your own, which has no form as a graph",
            f"choose from {', '.join(RULES)}",
        )
    rule.check_exits(exits)
    last = exits[-1]
    settings: dict[str, Any] = {
        name: getattr(rule, name) for name in ("patience", "exit") if hasattr(rule, name)
    }
    settings["min_exit"] = rule.min_exit
    settings["max_exit"] = last if rule.max_exit is None else rule.max_exit
    if 0 in exits:
        most = -np.inf if rule.exit_0_threshold is None else 1 - rule.exit_0_threshold
        settings["exit_0_threshold"] = np.inf if rule.ends_at_exit_0 else most
    if isinstance(rule, ThresholdRule):
        settings["thresholds"] = np.broadcast_to(rule.stop_thresholds, last).astype(np.float64)
    if deciding := _deciding(rule):
        settings["decision_thresholds"] = list(deciding.values())
    if rule.uses_labels and task.problem_type is ProblemType.MULTI_LABEL:
        settings["label_thresholds"] = task.label_thresholds or [0.5] * len(task.labels)
    return {SETTINGS + name: np.asarray(value) for name, value in settings.items()}


def _deciding(rule: ExitRule) -> dict[int, float]:
    """The thresholds of the labels that decide, by their numbers."""
    thresholds = rule.decision_thresholds if isinstance(rule, Confidence) else ()
    return {label: value for label, value in enumerate(thresholds) if value < 1}


class RuleNodes:
    """A rule in a graph. Its settings are initializers, so that a tool can change them.

    Args:
        scope: the graph, which gets the initializers.
        rule: the rule.
        task: the task.
        exits: the numbers of the exits.

    Raises:
        RuleError: see `settings_of`.
    """

    def __init__(self, scope: Scope, rule: ExitRule, task: Task, exits: range) -> None:
        self._rule, self._task, self._last = rule, task, exits[-1]
        self._settings = {
            name.removeprefix(SETTINGS): scope.constant(value, value.dtype, name)
            for name, value in settings_of(rule, task, exits).items()
        }

    def step(self, scope: Scope, number: int, logits: Value, before: State | None) -> State:
        """Apply the rule at an exit.

        Args:
            scope: the branch that runs if not all rows have stopped.
            number: the exit; a graph sees every exit in turn.
            logits: `[batch, labels]` float32 at this exit.
            before: what the exit before carried on; None at the first.

        Returns:
            What is carried on.
        """
        state = {name: value.within(scope) for name, value in (before or {}).items()}
        here = {name: value.within(scope) for name, value in self._settings.items()}
        now = self._outputs(logits, here)
        earlier = self._outputs(state["logits"], here) if state else None
        if state:
            stopped = state["stopped"]
            logits = where(stopped.add_axis(-1), state["logits"], logits)
            exits = where(stopped, state["exit"], scope.constant(number, np.int64))
        else:
            exits = _filled_rows(logits, number)
        after = {"logits": logits, "exit": exits}
        if number == self._last:
            return after
        stops = exits >= here["max_exit"]
        agrees, at_once = self._signal(number, earlier, now, exits, here)
        if "patience" in here:
            if number == 0 or agrees is None:
                after["streak"] = exits * 0
            else:
                signals = agrees.astype(np.int64)
                after["streak"] = signals * (state["streak"] + 1) if state else signals
                agrees = after["streak"] >= here["patience"]
        for signal in (agrees, at_once):
            if signal is not None:
                stops = stops | (signal & (exits >= here["min_exit"]))
        after["stopped"] = stopped | stops if state else stops
        after["done"] = after["stopped"].reduce("ReduceMin", 0)
        return after

    def _outputs(self, logits: Value, here: State) -> _Outputs:
        return _Outputs(logits, self._task.problem_type, here.get("label_thresholds"))

    def _signal(
        self, number: int, earlier: Any, now: _Outputs, exits: Value, here: State
    ) -> tuple[Any, Any]:
        """Which rows give their signal, and which stop at once; None: none do."""
        rule: Any = self._rule
        deciding = [
            (label, here["decision_thresholds"].take(place, axis=0))
            for place, label in enumerate(_deciding(rule))
        ]
        if number == 0:
            return now.uncertainty(deciding) < here["exit_0_threshold"], None
        if rule.compares_exits and earlier is None:
            return None, None
        if "exit" in here:
            return exits >= here["exit"], None
        if isinstance(rule, Pabee):
            return now.unchanged(earlier), None
        threshold = here["thresholds"].take(number - 1, axis=0)
        if isinstance(rule, Confidence):
            scores: Any = now.uncertainty(deciding)
        elif isinstance(rule, Energy):
            scores = _softmax(_with_zero(now.logits)).take(now.logits.shape[-1], axis=1)
        else:
            scores = rule.scores(earlier, now)
        if not isinstance(rule, Epee):
            return scores < threshold, None
        return None if earlier is None else now.unchanged(earlier), scores < threshold


class _Outputs(Outputs):
    """The outputs of an exit as tensors of a graph; what is not here is computed as by numpy.

    Args:
        logits: `[batch, labels]` float32.
        task: the task.
        label_thresholds: `[labels]`, for label rules in multi-label tasks.
    """

    logits: Any

    def __init__(self, logits: Value, task: ProblemType, label_thresholds: Any) -> None:
        self.logits = logits.astype(np.float64)
        self._single = task is ProblemType.SINGLE_LABEL
        self._label_thresholds = label_thresholds

    @cached_property
    def distributions(self) -> Any:
        """See `Outputs`."""
        return _softmax(self.logits if self._single else _with_zero(self.logits.add_axis(-1)))

    @cached_property
    def answers(self) -> Any:
        """See `Outputs`; bool for multi-label tasks."""
        if self._single:
            return _argmax(self.logits, keepdims=False)
        return self.distributions.take(0, axis=2) > self._label_thresholds

    def uncertainty(self, decision_thresholds: Any = ()) -> Any:
        """See `Outputs`.

        Args:
            decision_thresholds: the number and the threshold of each label that decides.
        """
        if decision_thresholds:
            margins = [abs(self._margin(*each)) for each in decision_thresholds]
            small = np.exp(-margins[0].then("Min", *margins[1:]))
            return small / (1 + small)
        p = self.distributions
        outcomes = p.scope.constant(np.arange(p.shape[-1]), np.int64)
        largest = _argmax(p, keepdims=True) == outcomes
        others = where(largest, p.scope.constant(0, np.float64), p).reduce("ReduceSum", -1)
        return others if self._single else others.reduce("ReduceMax", -1)

    def _margin(self, label: int, threshold: Value) -> Any:
        """How far the logit of a label is from a threshold, `[batch]`, see `Outputs.margins`."""
        z = self.logits
        logit = z.take(label, axis=1)
        if self._single:
            others = z.take(np.delete(np.arange(z.shape[1]), label), axis=1)
            top = others.reduce("ReduceMax", -1)
            powers = np.exp(others - top.add_axis(-1))
            logit = logit - top - np.log(powers.reduce("ReduceSum", -1))
        return logit - np.log(threshold / (1 - threshold))


def _softmax(z: Any) -> Any:
    return z.then("Softmax", axis=-1)


def _argmax(values: Any, keepdims: bool) -> Any:
    shape = (*values.shape[:-1], *[1] * keepdims)
    return values.then("ArgMax", dtype=np.int64, shape=shape, axis=-1, keepdims=int(keepdims))


def _with_zero(z: Any) -> Any:
    """The values with a zero behind the last one of the last axis."""
    pads = np.zeros(2 * z.ndim)
    pads[-1] = 1
    shape = (*z.shape[:-1], z.shape[-1] + 1)
    return z.then("Pad", z.scope.constant(pads, np.int64), shape=shape)


def _filled_rows(rows: Value, number: int) -> Value:
    """A number for each row: `[batch]` int64."""
    count = rows.then("Shape", dtype=np.int64, shape=(1,), start=0, end=1)
    return rows.scope.constant(number, np.int64).then("Expand", count, shape=rows.shape[:1])
