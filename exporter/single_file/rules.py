"""Exit rules as nodes of a graph: which rows stop at an exit, and what they answer.

The formulas are those of `runtime.rules`, in float64 as there, or in a plan in float32, because
TensorRT has no float64. A row keeps the logits of its own exit, so what is computed for a row that
has stopped does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.manifest import ProblemType, Task
from ...runtime.errors import RuleError
from ...runtime.rules.measures import Outputs, Sigmoid, Softmax
from ...runtime.rules.rules import (
    EVERY_RULE,
    Confidence,
    ExitRule,
    ThresholdRule,
    Uncertainty,
)
from ...runtime.tasks import task_of
from ...runtime.tasks.task import HALF

SETTINGS = "fpabee."
"""The names of the initializers that hold settings begin with this, see `settings_of`."""

State = dict[str, Any]
"""Tensors that are carried from exit to exit. Those of the rule are:

    logits   [batch, labels] float32, of the exit that a row has reached
    exit     [batch] int64, in a plan int32, that exit
    stopped  [batch] bool, whether the row has stopped there
    done     [] bool, whether all rows have stopped
    streak   [batch], as `exit`, only if the rule has a patience: consecutive signals so far
"""


def settings_of(rule: ExitRule, task: Task, exits: range) -> dict[str, NDArray[Any]]:
    """The settings of a rule, by the names that they have as initializers or inputs of a graph.

        fpabee.thresholds           [exits] float64, from exit 1: a row gives its signal where the
                                    score of the rule is below; for confidence it is 1 - max p
        fpabee.patience             how many consecutive signals stop a row
        fpabee.exit                 of the rule `budget`
        fpabee.top                  of the rule `top-k`
        fpabee.min_exit             as in `ExitRule`
        fpabee.max_exit             as in `ExitRule`
        fpabee.exit_0_uncertainty   a row stops at exit 0 where 1 - max p is below
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
    if type(rule) not in EVERY_RULE.values():
        raise RuleError(
            f"rule {rule.name} is a rule of your own, which has no form as a graph",
            f"choose from {', '.join(task_of(task).rules)}",
        )
    rule.check_exits(exits)
    last = exits[-1]
    settings: dict[str, Any] = {
        name: getattr(rule, name) for name in ("patience", "exit", "top") if hasattr(rule, name)
    }
    settings["min_exit"] = rule.min_exit
    settings["max_exit"] = last if rule.max_exit is None else rule.max_exit
    if 0 in exits:
        most = -np.inf if rule.exit_0_threshold is None else 1 - rule.exit_0_threshold
        settings["exit_0_uncertainty"] = np.inf if rule.ends_at_exit_0 else most
    if isinstance(rule, ThresholdRule):
        settings["thresholds"] = np.broadcast_to(rule.stop_thresholds, last).astype(np.float64)
    if deciding := _deciding(rule):
        settings["decision_thresholds"] = list(deciding.values())
    if rule.uses_labels and task_of(task).flags:
        settings["label_thresholds"] = task.label_thresholds or [HALF] * len(task.labels)
    return {SETTINGS + name: np.asarray(value) for name, value in settings.items()}


def as_inputs(settings: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Settings as inputs of a plan: float32 instead of float64, and finite, as JSON wants them."""
    return {
        name: np.asarray(np.nan_to_num(value.astype(np.float32)))
        if value.dtype == np.float64
        else value
        for name, value in settings.items()
    }


def differ_in_settings_only(rule: ExitRule, other: ExitRule, task: Task, exits: range) -> bool:
    """Whether one graph serves both rules, with other settings.

    Raises:
        RuleError: see `settings_of`.
    """
    forms = [
        {
            "rule": type(each),
            "measure": getattr(each, "measure", None),
            "deciding labels": [*_deciding(each)],
            "settings": [*settings_of(each, task, exits)],
        }
        for each in (rule, other)
    ]
    return forms[0] == forms[1]


def _deciding(rule: ExitRule) -> dict[int, float]:
    """The thresholds of the labels that decide, by their numbers."""
    thresholds = rule.label_thresholds if isinstance(rule, Confidence) else ()
    return {label: value for label, value in enumerate(thresholds) if value < 1}


class RuleNodes:
    """A rule in a graph.

    Args:
        tensors: its settings, see `settings_of`, as tensors of the graph.
        rule: the rule.
        task: the task.
        exits: the numbers of the exits.
        rows: how the rows depend on each other.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        rule: ExitRule,
        task: Task,
        exits: range,
        rows: Any = None,
    ) -> None:
        settings = {name.removeprefix(SETTINGS): tensor for name, tensor in tensors.items()}
        self._problem_type = task.problem_type
        self._label_thresholds = settings.get("label_thresholds", ())
        self._settings = settings
        self._rows = rows
        self._last = exits[-1]
        # The rule's own formulas add the nodes, because its settings are tensors.
        self._rule: Any = copy(rule)
        if isinstance(rule, Confidence):
            self._rule = Uncertainty(threshold=0)
        new: dict[str, Any] = {}
        if "exit" in settings:
            new["exit"] = settings["exit"]
        if "thresholds" in settings:
            new["threshold"] = tuple(settings["thresholds"][n] for n in range(self._last))
        if deciding := _deciding(rule):
            values = settings["decision_thresholds"]
            new["label_thresholds"] = [(label, values[n]) for n, label in enumerate(deciding)]
        for name, value in new.items():
            msgspec.structs.force_setattr(self._rule, name, value)

    def step(self, number: int, logits: Any, state: State) -> State:
        """Apply the rule at an exit, in the branch that runs if not all rows have stopped.

        Args:
            number: the exit; a graph sees every exit in turn.
            logits: `[batch, labels]` float32 at this exit.
            state: what is carried from the exit before; at the first, nothing of the rule.

        Returns:
            What is carried on.
        """
        return self._step(number, logits, state, self._signals)

    def step_before_layer_1(self, number: int, logits: Any) -> State:
        """The same at an exit before layer 1, where rows stop that are certain."""
        return self._step(number, logits, {}, self._certain)

    def _step(self, number: int, logits: Any, state: State, signals_at: Any) -> State:
        settings = self._settings
        now = self._outputs(logits)
        earlier = None
        if "logits" in state:
            earlier = self._outputs(state["logits"])
            stopped: Any = state["stopped"]
            logits = np.where(stopped[:, None], state["logits"], logits)
            exits: Any = np.where(stopped, state["exit"], number)
        else:
            exits = np.full_like(logits[:, 0], number, np.int64)
        after = {"logits": logits, "exit": exits}
        if number == self._last:
            return after
        if "patience" in settings:
            after["streak"] = state["streak"] if earlier else np.zeros_like(exits)
        signals = signals_at(number, earlier, now, state, after)
        stops = exits >= settings["max_exit"]
        for each in signals:
            stops = stops | ((settings["min_exit"] <= number) & each)
        after["stopped"] = stopped | stops if earlier else stops
        after["done"] = np.logical_and.reduce(after["stopped"], axis=0)
        return after

    def _certain(self, number: int, earlier: Any, now: Any, state: State, after: State) -> Any:
        return [self._rule.uncertainty(now) < self._settings["exit_0_uncertainty"]]

    def _signals(self, number: int, earlier: Any, now: Any, state: State, after: State) -> Any:
        """The conditions that stop rows at an exit, each `[batch]` bool.

        Args:
            number: the exit.
            earlier: the outputs of the exit before; None: there is none.
            now: those of this exit.
            state: what is carried from the exit before.
            after: what is carried on, whose streak this changes.
        """
        if not earlier and self._rule.compares_exits:
            return []
        signal = self._rule.signal(number, earlier, now)
        agrees = signal.agrees
        if "patience" in self._settings:
            after["streak"] = (after["streak"] + 1) * agrees.astype(np.int64)
            agrees = after["streak"] >= self._settings["patience"]
        return [agrees] if signal.stop_now is None else [agrees, signal.stop_now]

    def _outputs(self, logits: Any) -> Outputs:
        return OUTPUTS[self._problem_type](logits, self._label_thresholds)


class RowNodes:
    """How the rows of a batch depend on each other: these do not.

    Args:
        arguments: those of `QueryNodes`, which these rows do not need.
    """

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def rule(
        self, tensors: Mapping[str, Any], rule: ExitRule, task: Task, exits: range
    ) -> RuleNodes:
        """The nodes that apply a rule to the rows; the arguments are those of `RuleNodes`."""
        return RuleNodes(tensors, rule, task, exits)

    def answers(self, logits: Any, exits: Any, last: int) -> Any:
        """The logits that the graph gives: `[batch, labels]` float32.

        Args:
            logits: `[batch, labels]` float32, of each row at its exit.
            exits: `[batch]`, that exit.
            last: the last one of the model.
        """
        return logits


class _InGraph:
    """The methods of `Outputs` that differ for tensors of a graph."""

    margin: Callable[[int, Any], Any]

    @staticmethod
    def _softmax(z: Any) -> Any:
        return z.then("Softmax", axis=-1)

    def margins(self, label_thresholds: Any) -> Any:
        """See `Outputs`; here, these are pairs of the number and threshold of a deciding label."""
        margins = [self.margin(label, threshold) for label, threshold in label_thresholds]
        return np.stack(margins, axis=-1)


class _SoftmaxInGraph(_InGraph, Softmax):
    pass


class _SigmoidInGraph(_InGraph, Sigmoid):
    pass


OUTPUTS: dict[ProblemType, Callable[[Any, Any], Outputs]] = {
    ProblemType.SINGLE_LABEL: _SoftmaxInGraph,
    ProblemType.MULTI_LABEL: _SigmoidInGraph,
    ProblemType.RANKING: _SigmoidInGraph,
}
"""The outputs of an exit as tensors of a graph, by the type of the task."""
