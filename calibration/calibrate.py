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
from ..runtime.errors import InputError
from ..runtime.files import Row, read_rows
from ..runtime.metrics import Labels
from ..runtime.progress import Progress
from ..runtime.rules.rules import RULES, Budget, ExitRule
from .choose import PARTS, Selector, every_setting
from .costs import CostModel, measure_costs, measure_speedup
from .goals import CalibrationOptions
from .label_thresholds import check_label_thresholds, tune_label_thresholds, with_label_thresholds
from .outcome import Outcome, exits_of, outcome
from .result import Calibration, Point, RuleComparison, with_points
from .risk import Bound, RiskOf, check_row_mean, control
from .scoring import AGREEMENT, METRICS, Rows, Scorer, check_metric
from .settings import PER_EXIT, Candidate
from .stopping_costs import StoppingCosts
from .trace import data_sha256, expected_labels, trace_rows

SHOWN_RULES = ("fpabee", "pabee", "entropy")
"""Rules whose best is always reported."""

CROSS_FITTED = f"{PARTS}-fold cross-fitting"
"""How points are judged without other rows."""

LEAST_ROWS = 10 * PARTS
"""Fewer rows are refused."""


def calibrate(
    folder: str | Path,
    data: str | Path | Sequence[Row],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose operating points of a target and write them into the manifest.

    The rows run once, at full depth; every rule and setting is then simulated on their logits.
    Texts, labels and logits are kept in `calibration/` in the folder, so that the next wish on
    the same rows needs no second trace. Segments and chosen settings are timed each time: let
    nothing else run on the machine.

    Args:
        folder: the engines folder.
        data: at least 50 labelled rows from the source that will be classified, or a file of
            them in any format of `runtime.read_rows`.
        options: default: three points, `DEFAULT_GOALS`.
        progress: called with (what, done, total).

    Returns:
        The points, and what they were chosen from.

    Raises:
        InputError: rows that cannot be used, or a wish that cannot be granted; the manifest
            stays as it is.
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
    path, chosen = Path(folder), options or CalibrationOptions()
    report = progress or (lambda what, done, total: None)

    def read(source: str | Path) -> list[Row]:
        return list(read_rows(source, chosen.reading))

    rows = read(data) if isinstance(data, str | Path) else list(data)
    test = read(chosen.test) if chosen.test else None
    with Engine.load(path, target=chosen.target, threads=chosen.threads) as engine:
        session = _Session(engine, path, chosen, report)
        result = session.run(rows, test)
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
        kinds = METRICS[engine.manifest.task.problem_type]
        disagreement = options.bound is not None and options.bound.risk_of is RiskOf.DISAGREEMENT
        if options.unlabelled or disagreement:
            self.metric = options.metric or AGREEMENT
        else:
            self.metric = options.metric or kinds[0]
        self.costs: tuple[CostModel, ...] = ()
        target = engine.manifest.targets[engine.target]
        if options.bound is not None and not target.row_invariant:
            raise InputError(
                f"on target {engine.target} a row's answer depends on its neighbours, so no risk "
                "of a row can be bounded",
                "choose another --target, or wish for --max-drop",
            )

    def run(self, rows: Sequence[Row], test: Sequence[Row] | None) -> Calibration:
        """Trace, measure, choose, report."""
        self._check(rows, test)
        seen = self._trace(rows)
        held = None if test is None else self._trace(test)
        label_thresholds = None
        if self.options.tune_label_thresholds:
            default = METRICS[seen.problem_type][0]
            label_thresholds = tune_label_thresholds(
                seen, default if self.metric == AGREEMENT else self.metric
            )
            seen = with_label_thresholds(seen, label_thresholds.values)
            held = None if held is None else with_label_thresholds(held, label_thresholds.values)
        self.costs = self._measure(seen)
        stopping_costs = StoppingCosts(seen, self.metric, self.costs[-1].row_costs(seen.lengths))
        self.progress("sweep", 0, 1)
        started = time.perf_counter()
        selector = self._selector(stopping_costs)
        self.progress(f"sweep: {time.perf_counter() - started:.1f} s", 1, 1)
        encoded = self.engine.encode([row.content for row in rows])
        asked = self._asked()
        points = []
        for number, (name, goal) in enumerate(asked.items()):
            self.progress(f"choose {name}", number, len(asked))
            points.append(self._point(name, goal, selector, held, encoded))
        default = self.options.default if self.options.default in asked else points[0].name
        comparisons = self._comparisons(selector, asked[default], held)
        return Calibration(
            folder=self.folder,
            target=self.engine.target,
            held_out=self._held_out_name(),
            rows=seen,
            texts=rows,
            test=held,
            points=tuple(points),
            default=default,
            comparisons=comparisons,
            costs=self.costs,
            selector=selector,
            label_thresholds=label_thresholds,
            layers=self.layers,
        )

    def _check(self, rows: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Refuse what cannot be calibrated before the model is run for it."""
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
                "the test rows are those that choose: they would look better than new rows",
                "give --test other rows, or leave it out",
            )

    def _held_out_name(self) -> str:
        if self.options.test is not None:
            return Path(self.options.test).name
        return "rows that tested the bound" if self.options.bound else CROSS_FITTED

    def _trace(self, rows: Sequence[Row]) -> Rows:
        place = Path(self.options.output or self.folder / "calibration")
        labels = not self.options.unlabelled
        return trace_rows(self.engine, rows, place, labels, self.progress)

    def _measure(self, rows: Rows) -> tuple[CostModel, ...]:
        models = []
        sizes = sorted({1, self.options.batch_size})
        for number, batch in enumerate(sizes):
            self.progress(f"time segments, batch {batch}", number, len(sizes))
            models.append(measure_costs(self.engine, rows.lengths, batch))
        return tuple(models)

    def _selector(self, stopping_costs: StoppingCosts) -> Selector:
        names = dict.fromkeys([*(self.options.rules or RULES), *SHOWN_RULES])
        return every_setting(stopping_costs, list(names), self.options.measures, self.options.seed)

    def _asked(self) -> dict[str, Goal | Bound]:
        if self.options.bound is not None:
            return {self.options.name: self.options.bound}
        return dict(self.options.goals)

    def _kinds(self, selector: Selector) -> list[str]:
        """What may be chosen from; other kinds are there to be shown beside it."""
        names = self.options.rules or tuple(RULES)
        return [kind for kind in selector.kinds if kind.removesuffix(PER_EXIT) in names]

    def _point(
        self,
        name: str,
        goal: Goal | Bound,
        selector: Selector,
        held: Rows | None,
        encoded: Sequence[EncodedRow],
    ) -> Point:
        rows, kinds = selector.stopping_costs.rows, self._kinds(selector)
        certificate = None
        if isinstance(goal, Bound):
            found = control(selector, kinds, goal)
            candidate, certificate = found.candidate, found.certificate
            tested = rows.take(found.tested)
            judged = self._outcome(tested if held is None else held, candidate.rule)
        else:
            candidate = selector.choose(goal, kinds) or Candidate(Budget(exit=rows.exits))
            judged = self._held_out(candidate, goal, kinds, selector, held)
        measured = {
            str(model.batch): measure_speedup(self.engine, encoded, candidate.rule, model.batch)
            for model in self.costs
        }
        on_all = self._outcome(rows, candidate.rule)
        return Point(
            name, goal, candidate.kind, candidate.rule, on_all, judged, measured, certificate
        )

    def _held_out(
        self,
        candidate: Candidate,
        goal: Goal,
        kinds: Collection[str],
        selector: Selector,
        held: Rows | None,
    ) -> Outcome:
        """What a choice gives on rows that did not make it."""
        if held is not None:
            return self._outcome(held, candidate.rule)
        rows = selector.stopping_costs.rows
        costs = self.costs[-1].row_costs(rows.lengths)
        exits = selector.held_out(goal, kinds)
        return outcome(selector.stopping_costs.scorer, exits, rows.lengths, costs, self.layers)

    def _outcome(self, rows: Rows, rule: ExitRule) -> Outcome:
        scorer, costs = Scorer(rows, self.metric), self.costs[-1].row_costs(rows.lengths)
        return outcome(scorer, exits_of(rule, rows), rows.lengths, costs, self.layers)

    def _comparisons(
        self, selector: Selector, goal: Goal | Bound, held: Rows | None
    ) -> tuple[RuleComparison, ...]:
        """The best of every kind of rule, the fastest first."""
        if isinstance(goal, Bound):
            goal = Goal(max_drop=100 * goal.risk)
        found = []
        for number, kind in enumerate(selector.kinds):
            self.progress(f"compare {kind}", number, len(selector.kinds))
            try:
                candidate = selector.choose(goal, [kind])
                if candidate is not None:
                    judged = self._held_out(candidate, goal, [kind], selector, held)
                    found.append(RuleComparison(kind, candidate.rule, judged))
            except InputError:  # not as fast as was wished for
                continue
        return tuple(sorted(found, key=lambda comparison: -comparison.held_out.estimated))


def _check_rows(count: int, expected: Labels | None) -> None:
    """Refuse rows that nothing can be learnt from."""
    if count < LEAST_ROWS:
        raise InputError(
            f"{count} rows are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; a few hundred tell half a point from chance",
        )
    if expected is not None and len(np.unique(expected, axis=0)) < 2:
        raise InputError(
            "all rows have the same label, so any rule that says it looks perfect",
            "give rows of every label, as they will come",
        )
