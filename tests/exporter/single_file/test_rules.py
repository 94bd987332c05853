"""Rules as graphs over given logits, without an encoder: the exits of `simulate`, exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fpabee.exporter.onnx_file import OPSET
from fpabee.exporter.single_file.check import _other_thresholds
from fpabee.exporter.single_file.nodes import Tensor, Writer
from fpabee.exporter.single_file.rules import RuleNodes, State, settings_of
from fpabee.runtime import (
    Budget,
    Confidence,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Measure,
    Pabee,
    Pcee,
    ProblemType,
    RuleError,
    simulate,
)
from fpabee.runtime.artifact.manifest import Task
from fpabee.runtime.backends.onnxruntime import session_options
from fpabee.runtime.rules.rules import RULES

SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL
GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "exit_rules.json").read_text(encoding="utf-8")
)
LABELS = 4


@dataclasses.dataclass
class Case:
    """A rule on logits `[exits, rows, labels]`, the first of which are those of an exit."""

    rule: ExitRule
    task: ProblemType
    logits: NDArray[np.float32]
    first_exit: int = 1
    label_thresholds: tuple[float, ...] = ()

    def graph(self, name: str) -> ir.Graph:
        count, _, labels = self.logits.shape
        task = Task(
            problem_type=self.task,
            labels=tuple(map(str, range(labels))),
            label_thresholds=self.label_thresholds,
        )
        writer = Writer(name)
        exits = range(self.first_exit, self.first_exit + count)
        settings = settings_of(self.rule, task, exits).items()
        tensors = {key: writer.initializer(key, value) for key, value in settings}
        nodes = RuleNodes(tensors, self.rule, task, exits)
        value = ir.val("given", ir.DataType.FLOAT, (count, "batch", labels))
        writer.graph.inputs.append(value)
        state: State = {}
        for place, number in enumerate(exits):
            logits = Tensor(writer, value)[place]
            if number:
                state = nodes.step(number, logits, state)
            else:
                state = nodes.step_before_layer_1(number, logits)
        writer.graph.outputs.extend(state[name].value for name in ("logits", "exit"))
        return writer.graph

    def is_right(self, logits: NDArray[np.float32], exits: NDArray[np.int64]) -> bool:
        """Whether these are the logits and exits of each row at its exit."""
        expected = simulate(
            self.logits, self.rule, self.task, self.label_thresholds, self.first_exit
        ).exits
        places = expected - self.first_exit
        at_exit = self.logits[places, np.arange(len(places))]
        return np.array_equal(exits, expected) and np.array_equal(logits, at_exit)


def run(cases: list[Case]) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The logits and exits of each case; all of them are one graph, because that is faster."""
    whole = onnx.GraphProto(name="rules")
    for number, case in enumerate(cases):
        part = ir.to_proto(case.graph("rule"))
        onnx.compose.add_prefix_graph(part, f"{number}/", inplace=True)
        for field in ("node", "initializer", "input", "output"):
            getattr(whole, field).extend(getattr(part, field))
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(whole, opset_imports=opset, ir_version=10)
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {f"{number}/given": case.logits for number, case in enumerate(cases)}
    found = session.run(None, given)
    return list(zip(found[::2], found[1::2], strict=True))


def exits_of(cases: list[Case]) -> list[NDArray[np.int64]]:
    """The exits of each case, which must be right."""
    found = run(cases)
    pairs = zip(cases, found, strict=True)
    assert [case.rule for case, each in pairs if not case.is_right(*each)] == []
    return [exits for _, exits in found]


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_golden_vectors(step: int) -> None:
    vectors = GOLDEN[::step]
    cases = [
        Case(
            ExitRule.from_dict(vector["rule"]),
            ProblemType(vector["task"]),
            np.asarray(vector["logits"], np.float32)[:, None],
        )
        for vector in vectors
    ]
    assert [exits.item() for exits in exits_of(cases)] == [vector["exit"] for vector in vectors]
    assert {case.rule.name for case in cases} == set(RULES)


def logits(kind: str, seed: int) -> NDArray[np.float32]:
    """Ordinary logits of neighbouring exits, ones full of ties, and saturated ones."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(1, 40, LABELS)) + random.normal(scale=0.6, size=(5, 40, LABELS))
    scale = {"ordinary": 2.0, "ties": 1.0, "saturated": 60.0}[kind]
    found = rows * scale
    return (np.round(found) if kind == "ties" else found).astype(np.float32)


_RULES: tuple[ExitRule, ...] = (
    *(FPabee(threshold=0.8, measure=measure, patience=2) for measure in Measure),
    FPabee(threshold=(0.2, 0.9, 1.2, 0.3, 0.5), min_exit=3),
    Pabee(patience=1, max_exit=4),
    Pabee(patience=3),
    Entropy(threshold=0.7, min_exit=2, max_exit=4),
    Confidence(threshold=0.9),
    Confidence(threshold=(0.999, 1 - 1e-12, 0.99, 0.8, 0.7)),
    Confidence(threshold=0.8, label_thresholds=(0.3, 1, 1, 0.7)),
    Confidence(threshold=0.9, label_thresholds=(1, 1, 0.05, 1)),
    Energy(threshold=0.2),
    Pcee(threshold=0.5, patience=2),
    Epee(threshold=0.3, patience=2),
    Budget(exit=3),
    Budget(exit=2, min_exit=4),
)


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_rules_with_all_settings(task: ProblemType) -> None:
    thresholds = (0.5, 0.9, 0.2, 0.0) if task is MULTI else ()
    kinds = itertools.product(_RULES, ("ordinary", "ties", "saturated"))
    cases = [
        Case(rule, task, logits(kind, seed), label_thresholds=thresholds)
        for seed, (rule, kind) in enumerate(kinds)
    ]
    several = [len(set(exits.tolist())) > 1 for exits in exits_of(cases)]
    assert np.mean(several) > 0.6, "most rules stop rows at several exits"


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_exit_0_is_the_first_neighbour_and_has_its_own_threshold(task: ProblemType) -> None:
    given = logits("ordinary", 1)[[0, 0, 1, 2, 3, 4]]
    rules: list[ExitRule] = [
        *(with_settings(rule, exit_0_threshold=0.7) for rule in _RULES[:-3]),
        Pabee(patience=1),  # without a threshold, no row stops at exit 0
        Pabee(patience=1, max_exit=0),
        Pabee(patience=2, exit_0_threshold=0.7, min_exit=1),
        Budget(exit=0),
        Budget(exit=0, min_exit=2),
        Budget(exit=4, exit_0_threshold=0.7),
    ]
    cases = [Case(rule, task, given, first_exit=0) for rule in rules]
    assert all(0 in exits for exits in exits_of(cases)[:8])


def test_a_threshold_close_to_1_survives_float32() -> None:
    """The graph holds 1 - threshold, because OpenVINO computes in float32."""
    openvino = pytest.importorskip("openvino")
    case = Case(Confidence(threshold=1 - 1e-9), SINGLE, logits("saturated", 3) * np.float32(0.4))
    model = ir.to_proto(ir.Model(case.graph("rule"), ir_version=10))
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    found = compiled({"given": case.logits})
    assert case.is_right(found[0], found[1])
    assert set(found[1]) == {1, 2, 3, 4, 5}


def with_settings(rule: ExitRule, **settings: Any) -> ExitRule:
    return ExitRule.from_dict(rule.to_dict() | settings)


class OfMyOwn(Entropy, tag="mine", frozen=True, kw_only=True):
    """A rule that only its author knows."""


def test_rules_that_cannot_be_a_graph_are_refused() -> None:
    task = Task(problem_type=SINGLE, labels=("a", "b"))
    with pytest.raises(RuleError, match=r"mine is a rule of your own.* -> choose from fpabee"):
        settings_of(OfMyOwn(threshold=0.1), task, range(1, 4))
    with pytest.raises(RuleError, match="max_exit is 7"):
        settings_of(Pabee(patience=1, max_exit=7), task, range(1, 4))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_other_thresholds_are_in_the_middle_of_gaps(values: list[float]) -> None:
    scores = np.array([*values, np.inf])
    distinct = np.unique(values)
    for threshold in _other_thresholds(scores):
        assert distinct[0] <= threshold <= distinct[-1]
    if len(distinct) > 1:
        assert _other_thresholds(scores)


def test_a_threshold_is_not_between_scores_that_are_nearly_equal() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.3 + 1e-9, 0.5, 0.6, 0.7, 0.7 + 1e-9, 0.9, 1.0])
    for threshold in _other_thresholds(scores):
        assert abs(scores - threshold).min() > 0.04
