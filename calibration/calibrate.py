"""Calibrate: trace labelled rows once, choose operating points, write them into the manifest."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.artifact.operating_point import Goal
from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.errors import InputError, Remedy
from ..runtime.files import Row, read_rows
from ..runtime.metrics import Labels
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import RULES, Budget, ExitRule
from .choose import PARTS, Selector, every_setting
from .costs import CostModel, measure_costs, measure_speedup
from .goals import CalibrationOptions
from .label_thresholds import check_label_thresholds, tune_label_thresholds, with_label_thresholds
from .outcome import Outcome, exits_of, outcome
from .result import Calibration, Point, RuleComparison, with_points
from .risk import Bound, RiskOf, check_row_mean, control
from .scoring import AGREEMENT, METRICS, LabelledLogits, Scorer, check_metric
from .settings import PER_EXIT, Candidate
from .stopping_costs import StoppingCosts
from .trace import data_sha256, expected_labels, trace_rows

SHOWN_RULES = ("fpabee", "pabee", "entropy")
"""Rules whose best setting is always reported."""

CROSS_FITTED = f"{PARTS}-fold cross-fitting"
"""How points are judged without other rows."""

LEAST_ROWS = 10 * PARTS
"""The least number of rows that is accepted."""


def calibrate(
    folder: str | Path,
    data: str | Path | Sequence[Row],
    options: CalibrationOptions | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Choose operating points of a target and write them into the manifest.

    The rows run once, at full depth; every rule and setting is then simulated on their logits.
    Texts, labels and logits are kept in `calibration/` in the folder, so that the next goal on the
    same rows needs no second trace. Segments and chosen settings are timed every time, so nothing
    else should run on the machine.

    Args:
        folder: the engines folder.
        data: at least 50 labelled rows like those that will be classified, or a file of them in
            any format of `runtime.read_rows`.
        options: what to calibrate for; the default is the three points of `DEFAULT_GOALS`.
        progress: reports the current step.

    Returns:
        The points, and what they were chosen from.

    Raises:
        InputError: the rows cannot be used, or a goal cannot be met; the manifest stays unchanged.
        ArtifactError: the folder is damaged, or cannot be written.
        BackendError: the target cannot run here.

    Example:
        ```python
        from fpabee.calibration import calibrate
        from fpabee.runtime import Engine

        result = calibrate("engines/", "dev.jsonl")
        for point in result.points:
            low, high = point.held_out.interval
            print(f"{point.name}: {point.held_out.drop:.2f} points lost ({low:.2f} to {high:.2f})")

        with Engine.load("engines/", operating_point="fast") as engine:
            print(engine.predict(["turn on the lights"]))
        ```
    """
    path, options = Path(folder), options or CalibrationOptions()
    reading = options.reading
    rows = list(read_rows(data, reading) if isinstance(data, str | Path) else data)
    test = list(read_rows(options.test, reading)) if options.test else None
    with Engine.load(path, target=options.target, threads=options.threads) as engine:
        result = _Session(engine, path, options, progress).run(rows, test)
    write_manifest(path, with_points(read_manifest(path), result, data_sha256(rows)))
    return result


class _Session:
    """One calibration."""

    def __init__(
        self, engine: Engine, folder: Path, options: CalibrationOptions, progress: Progress
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.options = options
        self.progress = progress
        self.layers = engine.manifest.exit_layers
        bound = options.bound
        if bound is not None and not engine.manifest.targets[engine.target].row_invariant:
            raise InputError(
                f"on target {engine.target} the answer of a row depends on the other rows of its "
                "batch, so the risk of a row cannot be bounded",
                Remedy("choose another {target}, or give {max_drop} instead"),
            )
        self.metric = options.metric or METRICS[engine.manifest.task.problem_type][0]
        disagreement = bound is not None and bound.risk_of is RiskOf.DISAGREEMENT
        if options.metric is None and (options.unlabelled or disagreement):
            self.metric = AGREEMENT

    def run(self, rows: Sequence[Row], test: Sequence[Row] | None) -> Calibration:
        """Trace, measure, choose, report."""
        options = self.options
        self._check(rows, test)
        seen = self._trace(rows)
        held = None if test is None else self._trace(test)
        label_thresholds = None
        if options.tune_label_thresholds:
            metric = METRICS[seen.problem_type][0] if self.metric == AGREEMENT else self.metric
            label_thresholds = tune_label_thresholds(seen, metric)
            seen = with_label_thresholds(seen, label_thresholds.values)
            held = None if held is None else with_label_thresholds(held, label_thresholds.values)
        costs = self._measure(seen)
        self.progress("sweep", 0, 1)
        started = time.perf_counter()
        stopping_costs = StoppingCosts(seen, self.metric, costs[-1].row_costs(seen.lengths))
        names = list(dict.fromkeys([*(options.rules or RULES), *SHOWN_RULES]))
        selector = every_setting(stopping_costs, names, options.measures, options.seed)
        self.progress(f"sweep: {time.perf_counter() - started:.1f} s", 1, 1)
        judge = _Judge(selector, costs[-1], held, self.layers)
        encoded = self.engine.encode([row.content for row in rows])
        points = []
        for number, (name, goal) in enumerate(options.asked.items()):
            self.progress(f"choose {name}", number, len(options.asked))
            points.append(self._point(name, goal, judge, costs, encoded))
        default = options.default if options.default in options.asked else points[0].name
        return Calibration(
            folder=self.folder,
            target=self.engine.target,
            held_out=self._held_out_name(),
            rows=seen,
            texts=rows,
            test=held,
            points=tuple(points),
            default=default,
            comparisons=self._comparisons(judge, options.asked[default]),
            costs=costs,
            selector=selector,
            label_thresholds=label_thresholds,
            layers=self.layers,
        )

    def _check(self, rows: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Refuse what cannot be calibrated before the model runs."""
        options, task = self.options, self.engine.manifest.task
        labelled = not options.unlabelled
        check_metric(self.metric, task.problem_type, labelled)
        if options.tune_label_thresholds:
            check_label_thresholds(task.problem_type, labelled)
        if options.bound is not None and options.bound.risk_of is RiskOf.DROP:
            check_row_mean(self.metric)
        _check_rows(len(rows), expected_labels(rows, task) if labelled else None)
        if test is None:
            return
        if labelled:
            expected_labels(test, task)
        if data_sha256(test, labels=False) == data_sha256(rows, labels=False):
            raise InputError(
                "the test rows are the rows that choose, so they would look better than new rows",
                Remedy("give {test} other rows, or leave it out"),
            )

    def _trace(self, rows: Sequence[Row]) -> LabelledLogits:
        place = Path(self.options.output or self.folder / "calibration")
        return trace_rows(self.engine, rows, place, not self.options.unlabelled, self.progress)

    def _measure(self, rows: LabelledLogits) -> tuple[CostModel, ...]:
        models = []
        sizes = sorted({1, self.options.batch_size})
        for number, batch in enumerate(sizes):
            self.progress(f"time segments, batch {batch}", number, len(sizes))
            models.append(measure_costs(self.engine, rows.lengths, batch))
        return tuple(models)

    def _point(
        self,
        name: str,
        goal: Goal | Bound,
        judge: _Judge,
        costs: Sequence[CostModel],
        encoded: Sequence[EncodedRow],
    ) -> Point:
        # Other kinds of rules may be among the settings, to be shown beside these.
        names = self.options.rules or tuple(RULES)
        kinds = [kind for kind in judge.selector.kinds if kind.removesuffix(PER_EXIT) in names]
        certificate = None
        if isinstance(goal, Bound):
            found = control(judge.selector, kinds, goal)
            candidate, certificate = found.candidate, found.certificate
            tested = judge.rows.take(found.tested) if judge.held is None else judge.held
            held_out = judge.rule_on(candidate.rule, tested)
        else:
            chosen = judge.selector.choose(goal, kinds)
            candidate = chosen or Candidate(Budget(exit=judge.rows.exits))
            held_out = judge.choice(candidate, goal, kinds)
        measured = {
            str(model.batch): measure_speedup(self.engine, encoded, candidate.rule, model.batch)
            for model in costs
        }
        chosen_on = judge.rule_on(candidate.rule, judge.rows)
        return Point(
            name, goal, candidate.kind, candidate.rule, chosen_on, held_out, measured, certificate
        )

    def _held_out_name(self) -> str:
        if self.options.test is not None:
            return Path(self.options.test).name
        return "rows that tested the bound" if self.options.bound else CROSS_FITTED

    def _comparisons(self, judge: _Judge, goal: Goal | Bound) -> tuple[RuleComparison, ...]:
        """The best setting of every kind of rule, the fastest first."""
        if isinstance(goal, Bound):
            goal = goal.as_goal()
        found, kinds = [], judge.selector.kinds
        for number, kind in enumerate(kinds):
            self.progress(f"compare {kind}", number, len(kinds))
            try:
                candidate = judge.selector.choose(goal, [kind])
                if candidate is not None:
                    held_out = judge.choice(candidate, goal, [kind])
                    found.append(RuleComparison(kind, candidate.rule, held_out))
            except InputError:  # no setting of this kind is fast enough
                continue
        return tuple(sorted(found, key=lambda comparison: -comparison.held_out.estimated))


class _Judge:
    """What settings give on rows that did not choose them.

    Args:
        selector: the settings.
        costs: the times that count.
        held: rows to judge on; None means cross-fitting on the rows that choose.
        layers: the layer of each exit.
    """

    def __init__(
        self,
        selector: Selector,
        costs: CostModel,
        held: LabelledLogits | None,
        layers: Sequence[int],
    ) -> None:
        self.selector = selector
        self.rows = selector.stopping_costs.rows
        self.held = held
        self._scorer = selector.stopping_costs.scorer
        self._costs = costs
        self._layers = layers

    def choice(self, candidate: Candidate, goal: Goal, kinds: Collection[str]) -> Outcome:
        """What a candidate gives that all rows chose for a goal."""
        if self.held is not None:
            return self.rule_on(candidate.rule, self.held)
        exits, lengths = self.selector.held_out(goal, kinds), self.rows.lengths
        costs = self._costs.row_costs(lengths)
        return outcome(self._scorer, exits, lengths, costs, self._layers)

    def rule_on(self, rule: ExitRule, rows: LabelledLogits) -> Outcome:
        """What a rule gives on some rows."""
        scorer, costs = Scorer(rows, self._scorer.metric), self._costs.row_costs(rows.lengths)
        return outcome(scorer, exits_of(rule, rows), rows.lengths, costs, self._layers)


def _check_rows(count: int, expected: Labels | None) -> None:
    """Refuse rows that nothing can be learnt from."""
    if count < LEAST_ROWS:
        raise InputError(
            f"{count} rows are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; a few hundred rows tell half a point from chance",
        )
    if expected is not None and len(np.unique(expected, axis=0)) < 2:
        raise InputError(
            "all rows have the same label, so a rule that always predicts it looks perfect",
            "give rows of every label, in the proportions of real use",
        )
