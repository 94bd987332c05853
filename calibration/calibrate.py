"""Calibrate: trace labelled rows once, choose operating points, write them into the manifest."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.artifact.operating_point import Goal
from ..runtime.encoding import EncodedRow, Text
from ..runtime.engine import Engine
from ..runtime.errors import InputError, Remedy
from ..runtime.files import Row, read_rows
from ..runtime.progress import Progress, silent
from ..runtime.rules.base import ExitRule
from ..runtime.rules.measures import Answers
from ..runtime.rules.rules import RULES, Budget
from .choose import PARTS, PER_EXIT, Selector, every_setting
from .costs import CostModel, measure_costs, measure_speedup
from .goals import CalibrationOptions
from .label_thresholds import check_label_thresholds, tune_label_thresholds
from .outcome import Outcome, exits_of, outcome
from .result import Calibration, Point, RuleComparison, with_points
from .risk import Bound, RiskOf, check_row_mean, control
from .scoring import AGREEMENT, METRICS, LabelledLogits, Scorer, check_metric
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
    rows = list(read_rows(data, options.reading) if isinstance(data, str | Path) else data)
    test = list(read_rows(options.test, options.reading)) if options.test else None
    with Engine.load(path, target=options.target, threads=options.threads) as engine:
        metric = _metric(engine, options)
        _check(engine, options, metric, rows, test)
        place = Path(options.output or path / "calibration")
        seen = trace_rows(engine, rows, place, not options.unlabelled, progress)
        held = None
        if test is not None:
            held = trace_rows(engine, test, place, not options.unlabelled, progress)
        label_thresholds = None
        if options.tune_label_thresholds:
            tuned_by = METRICS[seen.problem_type][0] if metric == AGREEMENT else metric
            label_thresholds = tune_label_thresholds(seen, tuned_by)
            seen = replace(seen, label_thresholds=label_thresholds.values)
            held = held and replace(held, label_thresholds=label_thresholds.values)
        costs = _measure(engine, options, seen, progress)
        stopping_costs = StoppingCosts(seen, metric, costs[-1].row_costs(seen.lengths))
        selector = _sweep(stopping_costs, options, progress)
        chooser = _Chooser(engine, options, progress, selector, costs, held)
        points = chooser.points([row.content for row in rows])
        default = options.default if options.default in options.asked else points[0].name
        result = Calibration(
            folder=path,
            target=engine.target,
            held_out=_held_out_name(options),
            rows=seen,
            texts=rows,
            test=held,
            points=points,
            default=default,
            comparisons=chooser.comparisons(options.asked[default]),
            costs=costs,
            selector=selector,
            label_thresholds=label_thresholds,
            layers=engine.manifest.exit_layers,
        )
    write_manifest(path, with_points(read_manifest(path), result, data_sha256(rows)))
    return result


def _metric(engine: Engine, options: CalibrationOptions) -> str:
    """The metric that settings are judged by."""
    disagreement = options.bound is not None and options.bound.risk_of is RiskOf.DISAGREEMENT
    if options.metric is None and (options.unlabelled or disagreement):
        return AGREEMENT
    return options.metric or METRICS[engine.manifest.task.problem_type][0]


def _check(
    engine: Engine,
    options: CalibrationOptions,
    metric: str,
    rows: Sequence[Row],
    test: Sequence[Row] | None,
) -> None:
    """Refuse what cannot be calibrated before the model runs."""
    task, labelled = engine.manifest.task, not options.unlabelled
    if options.bound is not None:
        if not engine.manifest.targets[engine.target].row_invariant:
            raise InputError(
                f"on target {engine.target} the answer of a row depends on the other rows of its "
                "batch, so the risk of a row cannot be bounded",
                Remedy("choose another {target}, or give {max_drop} instead"),
            )
        if options.bound.risk_of is RiskOf.DROP:
            check_row_mean(metric)
    check_metric(metric, task.problem_type, labelled)
    if options.tune_label_thresholds:
        check_label_thresholds(task.problem_type, labelled)
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"{len(rows)} rows are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; a few hundred rows tell half a point from chance",
        )
    if labelled and len(np.unique(expected_labels(rows, task), axis=0)) < 2:
        raise InputError(
            "all rows have the same label, so a rule that always predicts it looks perfect",
            "give rows of every label, in the proportions of real use",
        )
    if test is None:
        return
    if labelled:
        expected_labels(test, task)
    if data_sha256(test, labels=False) == data_sha256(rows, labels=False):
        raise InputError(
            "the test rows are the rows that choose, so they would look better than new rows",
            Remedy("give {test} other rows, or leave it out"),
        )


def _measure(
    engine: Engine, options: CalibrationOptions, rows: LabelledLogits, progress: Progress
) -> tuple[CostModel, ...]:
    models = []
    sizes = sorted({1, options.batch_size})
    for number, batch in enumerate(sizes):
        progress(f"time segments, batch {batch}", number, len(sizes))
        models.append(measure_costs(engine, rows.lengths, batch))
    return tuple(models)


def _sweep(
    stopping_costs: StoppingCosts, options: CalibrationOptions, progress: Progress
) -> Selector:
    progress("sweep", 0, 1)
    started = time.perf_counter()
    names = list(dict.fromkeys([*(options.rules or RULES), *SHOWN_RULES]))
    selector = every_setting(stopping_costs, names, options.measures, options.seed)
    progress(f"sweep: {time.perf_counter() - started:.1f} s", 1, 1)
    return selector


def _held_out_name(options: CalibrationOptions) -> str:
    if options.test is not None:
        return Path(options.test).name
    return "rows that tested the bound" if options.bound else CROSS_FITTED


@dataclass(frozen=True)
class _Chooser:
    """Chooses settings, and judges them on rows that did not choose them.

    Attributes:
        engine: measures speed-ups.
        options: what is asked for.
        progress: reports the current step.
        selector: the settings.
        costs: measured times; the last ones count.
        held: rows to judge on; None means cross-fitting on the rows that choose.
    """

    engine: Engine
    options: CalibrationOptions
    progress: Progress
    selector: Selector
    costs: Sequence[CostModel]
    held: LabelledLogits | None

    def points(self, texts: Sequence[Text]) -> tuple[Point, ...]:
        """An operating point for everything that is asked; texts are for measuring speed-ups."""
        encoded = self.engine.encode(texts)
        found = []
        for number, (name, goal) in enumerate(self.options.asked.items()):
            self.progress(f"choose {name}", number, len(self.options.asked))
            found.append(self._point(name, goal, encoded))
        return tuple(found)

    def comparisons(self, goal: Goal | Bound) -> tuple[RuleComparison, ...]:
        """The best setting of every kind of rule, the fastest first."""
        if isinstance(goal, Bound):
            goal = goal.as_goal()
        found, kinds = [], self.selector.kinds
        for number, kind in enumerate(kinds):
            self.progress(f"compare {kind}", number, len(kinds))
            try:
                rule = self.selector.choose(goal, [kind])
                if rule is not None:
                    found.append(RuleComparison(rule, self._held_out(rule, goal, [kind])))
            except InputError:  # no setting of this kind is fast enough
                continue
        return tuple(sorted(found, key=lambda comparison: -comparison.held_out.estimated))

    def _point(self, name: str, goal: Goal | Bound, encoded: Sequence[EncodedRow]) -> Point:
        rows = self.selector.stopping_costs.rows
        # Other kinds of rules may be among the settings, to be shown beside these.
        names = self.options.rules or tuple(RULES)
        kinds = [kind for kind in self.selector.kinds if kind.removesuffix(PER_EXIT) in names]
        certificate = None
        if isinstance(goal, Bound):
            found = control(self.selector, kinds, goal)
            rule, certificate = found.rule, found.certificate
            held_out = self._judge(rule, self.held or rows.take(found.tested))
        else:
            rule = self.selector.choose(goal, kinds) or Budget(exit=rows.exits)
            held_out = self._held_out(rule, goal, kinds)
        measured = {
            str(model.batch): measure_speedup(self.engine, encoded, rule, model.batch)
            for model in self.costs
        }
        chosen_on = self._judge(rule, rows)
        return Point(name, goal, rule, chosen_on, held_out, measured, certificate)

    def _held_out(self, rule: ExitRule, goal: Goal, kinds: Collection[str]) -> Outcome:
        """What a rule gives, which was chosen for a goal, on rows that did not choose it."""
        if self.held is not None:
            return self._judge(rule, self.held)
        costs = self.selector.stopping_costs
        exits = self.selector.held_out(goal, kinds)
        return self._outcome(costs.scorer, exits, costs.rows)

    def _judge(self, rule: ExitRule, rows: LabelledLogits) -> Outcome:
        """What a rule gives on some rows."""
        scorer = Scorer(rows, self.selector.stopping_costs.scorer.metric)
        return self._outcome(scorer, exits_of(rule, rows), rows)

    def _outcome(self, scorer: Scorer, exits: Answers, rows: LabelledLogits) -> Outcome:
        costs, layers = self.costs[-1].row_costs(rows.lengths), self.engine.manifest.exit_layers
        return outcome(scorer, exits, rows.lengths, costs, layers)
