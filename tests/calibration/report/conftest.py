"""Calibrations of synthetic traces: nothing runs, and their figures are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.calibration import DEFAULT_GOALS, Bound, Calibration, Point, RiskOf
from fpabee.calibration.choose import Selector
from fpabee.calibration.costs import CostModel
from fpabee.calibration.outcome import Outcome, exits_of, outcome
from fpabee.calibration.result import RuleComparison
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import Budget, ExitRule, Measure, ProblemType, read_manifest
from fpabee.runtime.artifact.operating_point import Certificate, Goal
from fpabee.runtime.files import Row

NAMES = ("fpabee", "pabee", "entropy", "budget")


def _rows(rows: LabelledLogits, names: tuple[str, ...]) -> list[Row]:
    found = []
    for number in range(len(rows)):
        labels = None
        if rows.expected is not None:
            truth = np.atleast_1d(rows.expected[number])
            single = rows.problem_type is ProblemType.SINGLE_LABEL
            labels = tuple(names[i] for i in (truth if single else np.flatnonzero(truth)))
        found.append(Row(f"text {number}", None, labels, {}, number + 1))
    return found


@pytest.fixture
def make_calibration(
    engines: Mapping[str, Path], make_rows: Callable[..., LabelledLogits]
) -> Callable[..., Calibration]:
    """Makes a calibration of one of the tiny engines folders, as `calibrate` would."""

    def make(
        family: str = "bert",
        *,
        count: int = 150,
        metric: str = "",
        unlabelled: bool = False,
        with_test: bool = False,
        bound: Bound | None = None,
        name: str = "risk",
        exits: int = 3,
    ) -> Calibration:
        manifest = read_manifest(engines[family])
        task = manifest.task
        layers = manifest.exit_layers[:exits]
        shape: dict[str, Any] = {"exits": exits, "labels": len(task.labels)}
        rows = make_rows(count, problem_type=task.problem_type, **shape)
        test = make_rows(90, problem_type=task.problem_type, seed=1, **shape) if with_test else None
        texts = _rows(rows, task.labels)
        if unlabelled:
            metric = "agreement"
            rows = LabelledLogits(rows.logits, rows.lengths, None, rows.problem_type)
            texts = [Row(row.text, None, None, {}, row.line) for row in texts]
        metric = metric or METRICS[task.problem_type][0]
        costs = tuple(
            CostModel(batch, (5, 20, 39), ((batch, 2.0, 3.0),) * exits) for batch in (1, 32)
        )
        stopping_costs = StoppingCosts(rows, metric, costs[-1].row_costs(rows.lengths))
        stop = StopScores(rows)
        swept = list(stop.families(NAMES, [Measure.JSKD, Measure.KL]))
        fitted = list(stop.families(["entropy"], [], patiences=[1]))
        selector = Selector(stopping_costs, swept, fitted)

        def judged(rule: ExitRule, some: LabelledLogits) -> Outcome:
            times = costs[-1].row_costs(some.lengths)
            stops = exits_of(rule, some)
            return outcome(Scorer(some, metric), stops, some.lengths, times, layers)

        asked: dict[str, Goal | Bound] = {name: bound} if bound else dict(DEFAULT_GOALS)
        points, comparisons = [], []
        for point, goal in asked.items():
            plain = goal if isinstance(goal, Goal) else Goal(max_drop=100 * goal.risk)
            chosen = selector.choose(plain, selector.kinds) or Budget(exit=exits)
            certificate = None
            if isinstance(goal, Bound):
                certificate = Certificate(risk_of="drop", risk=5.0, confidence=95.0, rows=90)
            own = judged(chosen, rows)
            held = judged(chosen, rows if test is None else test)
            speeds = {"1": 1.5, "32": 1.25}
            points.append(Point(point, goal, chosen, own, held, speeds, certificate))
        for kind in selector.kinds:
            best = selector.choose(Goal(max_drop=2.0), [kind])
            if best is not None:
                comparisons.append(RuleComparison(best, judged(best, rows)))
        return Calibration(
            folder=engines[family],
            target=manifest.default_target,
            held_out="test.jsonl" if with_test else "5-fold cross-fitting",
            rows=rows,
            texts=texts,
            test=test,
            points=tuple(points),
            default=name if bound else "balanced",
            comparisons=tuple(comparisons),
            costs=costs,
            selector=selector,
            label_thresholds=None,
            layers=layers,
        )

    return make


@pytest.fixture
def certified() -> Bound:
    """A certified bound on the risk."""
    return Bound(0.05, 0.95, RiskOf.DROP)
