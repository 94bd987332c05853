"""Calibrate: trace labelled rows once, choose operating points, write them into the manifest."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from .. import __version__
from ..runtime.distributions import Measure
from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.errors import InputError
from ..runtime.exit_rules import RULES, Budget, ExitRule
from ..runtime.manifest import Manifest, Target, read_manifest, write_manifest
from ..runtime.metrics import Labels
from ..runtime.operating_point import Certificate, OperatingPoint, Wish
from ..runtime.text_io import Columns, Row, TextFormat, read_rows
from .costs import CostModel, measure_costs, measure_speedup, with_head_shares
from .cuts import TunedCuts, check_cuts, tune_cuts, with_cuts
from .outcome import Outcome, exits_of, outcome
from .risk import Bound, RiskOf, check_row_mean, control
from .scoring import AGREEMENT, METRICS, Rows, Scorer, check_metric
from .select import PARTS, Selector, every_setting
from .settings import PER_EXIT, Candidate
from .trace import Progress, data_sha256, expected_labels, trace_rows
from .weighing import Weighing

DEFAULT_WISHES = {
    "safe": Wish(max_drop=0.5, surely=True),
    "balanced": Wish(max_drop=0.5),
    "fast": Wish(max_drop=2.0),
}
"""The operating points that come when nothing is wished for; `balanced` becomes the default."""

SHOWN_RULES = ("fpabee", "pabee", "entropy")
"""Rules whose best is always reported."""

LEAST_ROWS = 10 * PARTS
"""Fewer rows are refused."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate for.

    Attributes:
        wishes: operating points by name; default: `DEFAULT_WISHES`.
        bound: a guarantee instead of wishes; then `name` names the one point.
        name: of the point of a bound.
        default: the point that runs when none is named; if there is none of that name, the first.
        metric: single-label: `accuracy`, `macro_f1`, `matthews`; multi-label: `exact_match`,
            `micro_f1`, `macro_f1`; both: `agreement` with full depth. None: the first of these,
            or agreement if labels are left aside.
        rules: names of exit rules to choose from, see `runtime.RULES`; empty: all.
        measures: similarity measures of `fpabee` and `either`.
        target: a built target; None: the manifest's default.
        test: a file of more rows, which points are reported on instead of being cross-fitted.
        unlabelled: leave labels aside and hold the rule against full depth.
        tune_cuts: also choose decision cuts (multi-label).
        batch_size: rows at a time that times are measured at and chosen by.
        output: folder for traces; None: `calibration/` in the engines folder.
        threads: CPU threads; None: as in `runtime.Engine.load`.
        seed: deals rows into the parts for cross-fitting.

    Example:
        ```python
        from fpabee.calibration import Bound, CalibrationOptions, RiskOf, Wish

        wishes = {"close": Wish(max_drop=0.5), "twice": Wish(speedup=2.0)}
        two_points = CalibrationOptions(wishes=wishes, default="close")

        bound = Bound(risk=0.02, confidence=0.95, risk_of=RiskOf.DISAGREEMENT)
        no_labels = CalibrationOptions(bound=bound, name="sure", unlabelled=True)
        ```
    """

    wishes: dict[str, Wish] = field(default_factory=lambda: dict(DEFAULT_WISHES))
    bound: Bound | None = None
    name: str = "risk"
    default: str = "balanced"
    metric: str | None = None
    rules: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = tuple(Measure)
    target: str | None = None
    test: Path | None = None
    columns: Columns = field(default_factory=Columns)
    text_format: TextFormat | None = None
    unlabelled: bool = False
    tune_cuts: bool = False
    batch_size: int = 32
    output: Path | None = None
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One operating point.

    Attributes:
        name: its name.
        wish: what was asked for.
        kind: the name of its rule, with ` per exit` after it if it has a fitted threshold for
            each exit.
        rule: the rule.
        chosen_on: what it gives on the rows that chose it.
        held_out: what it gives on others.
        measured: ratio of run times on the target, full depth over this, by batch size in rows.
        certificate: a bound on the risk, if one was asked for.
    """

    name: str
    wish: Wish | Bound
    kind: str
    rule: ExitRule
    chosen_on: Outcome
    held_out: Outcome
    measured: dict[str, float]
    certificate: Certificate | None = None

    @property
    def optimism(self) -> float:
        """Points by which the drop looks smaller on the rows that chose the rule."""
        return self.held_out.drop - self.chosen_on.drop


@dataclass(frozen=True)
class Contender:
    """The best setting of one kind of rule, for the wish of the default point.

    Attributes:
        kind: as `Point.kind`.
        rule: the rule.
        held_out: what it gives on rows that did not choose it.
    """

    kind: str
    rule: ExitRule
    held_out: Outcome


@dataclass(frozen=True)
class Calibration:
    """What a calibration found; `write_report` makes a page of it.

    Attributes:
        folder: the engines folder.
        target: the target that was calibrated.
        held_out: which rows points are reported on.
        rows: the rows that chose, with their trace.
        texts: the rows as they were read.
        test: the rows that points are reported on, with their trace; None: cross-fitted.
        points: the operating points.
        default: the one that runs when none is named.
        contenders: the best of every kind of rule, for the wish of the default point; the
            fastest first.
        costs: measured times: one text at a time, and `CalibrationOptions.batch_size` rows.
        selector: all settings; not public.
        cuts: tuned decision cuts; None: none were asked for.
        layers: the layer of each exit.
    """

    folder: Path
    target: str
    held_out: str
    rows: Rows
    texts: Sequence[Row]
    test: Rows | None
    points: tuple[Point, ...]
    default: str
    contenders: tuple[Contender, ...]
    costs: tuple[CostModel, ...]
    selector: Selector
    cuts: TunedCuts | None
    layers: tuple[int, ...]

    @property
    def at_full_depth(self) -> tuple[Point, ...]:
        """Points that run every layer, since no faster setting keeps to their wish."""
        last = Budget(exit=len(self.layers))
        return tuple(point for point in self.points if point.rule == last)


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
        options: default: three points, `DEFAULT_WISHES`.
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
        return list(read_rows(source, chosen.text_format, chosen.columns))

    rows = read(data) if isinstance(data, str | Path) else list(data)
    test = read(chosen.test) if chosen.test else None
    with Engine.load(path, target=chosen.target, threads=chosen.threads) as engine:
        session = _Session(engine, path, chosen, report)
        result = session.run(rows, test)
    write_manifest(path, _with_points(read_manifest(path), result, data_sha256(rows)))
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
        cuts = None
        if self.options.tune_cuts:
            default = METRICS[seen.problem_type][0]
            cuts = tune_cuts(seen, default if self.metric == AGREEMENT else self.metric)
            seen = with_cuts(seen, cuts.cuts)
            held = None if held is None else with_cuts(held, cuts.cuts)
        self.costs = self._measure(seen)
        weighing = Weighing(seen, self.metric, self.costs[-1].row_costs(seen.lengths))
        self.progress("sweep", 0, 1)
        started = time.perf_counter()
        selector = self._selector(weighing)
        self.progress(f"sweep: {time.perf_counter() - started:.1f} s", 1, 1)
        encoded = self.engine.encode([row.content for row in rows])
        asked = self._asked()
        points = []
        for number, (name, wish) in enumerate(asked.items()):
            self.progress(f"choose {name}", number, len(asked))
            points.append(self._point(name, wish, selector, held, encoded))
        default = self.options.default if self.options.default in asked else points[0].name
        contenders = self._contenders(selector, asked[default], held)
        return Calibration(
            folder=self.folder,
            target=self.engine.target,
            held_out=self._held_out_name(),
            rows=seen,
            texts=rows,
            test=held,
            points=tuple(points),
            default=default,
            contenders=contenders,
            costs=self.costs,
            selector=selector,
            cuts=cuts,
            layers=self.layers,
        )

    def _check(self, rows: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Refuse what cannot be calibrated before the model is run for it."""
        options, task = self.options, self.engine.manifest.task
        labelled = not options.unlabelled
        check_metric(self.metric, task.problem_type, labelled)
        if options.tune_cuts:
            check_cuts(task.problem_type, labelled)
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
            return self.options.test.name
        return "rows that tested the bound" if self.options.bound else f"{PARTS}-fold cross-fitting"

    def _trace(self, rows: Sequence[Row]) -> Rows:
        place = self.options.output or self.folder / "calibration"
        labels = not self.options.unlabelled
        return trace_rows(self.engine, rows, place, labels, self.progress)

    def _measure(self, rows: Rows) -> tuple[CostModel, ...]:
        models = []
        sizes = sorted({1, self.options.batch_size})
        for number, batch in enumerate(sizes):
            self.progress(f"time segments, batch {batch}", number, len(sizes))
            models.append(measure_costs(self.engine, rows.lengths, batch))
        models[0] = with_head_shares(
            models[0], self.folder, self.engine.manifest, self.engine.target
        )
        return tuple(models)

    def _selector(self, weighing: Weighing) -> Selector:
        names = dict.fromkeys([*(self.options.rules or RULES), *SHOWN_RULES])
        return every_setting(weighing, list(names), self.options.measures, self.options.seed)

    def _asked(self) -> dict[str, Wish | Bound]:
        if self.options.bound is not None:
            return {self.options.name: self.options.bound}
        return dict(self.options.wishes)

    def _kinds(self, selector: Selector) -> list[str]:
        """What may be chosen from; other kinds are there to be shown beside it."""
        names = self.options.rules or tuple(RULES)
        return [kind for kind in selector.kinds if kind.removesuffix(PER_EXIT) in names]

    def _point(
        self,
        name: str,
        wish: Wish | Bound,
        selector: Selector,
        held: Rows | None,
        encoded: Sequence[EncodedRow],
    ) -> Point:
        rows, kinds = selector.weighing.rows, self._kinds(selector)
        certificate = None
        if isinstance(wish, Bound):
            found = control(selector, kinds, wish)
            candidate, certificate = found.candidate, found.certificate
            tested = rows.take(found.tested)
            judged = self._outcome(tested if held is None else held, candidate.rule)
        else:
            candidate = selector.choose(wish, kinds) or Candidate(Budget(exit=rows.exits))
            judged = self._held_out(candidate, wish, kinds, selector, held)
        measured = {
            str(model.batch): measure_speedup(self.engine, encoded, candidate.rule, model.batch)
            for model in self.costs
        }
        on_all = self._outcome(rows, candidate.rule)
        return Point(
            name, wish, candidate.kind, candidate.rule, on_all, judged, measured, certificate
        )

    def _held_out(
        self,
        candidate: Candidate,
        wish: Wish,
        kinds: Collection[str],
        selector: Selector,
        held: Rows | None,
    ) -> Outcome:
        """What a choice gives on rows that did not make it."""
        if held is not None:
            return self._outcome(held, candidate.rule)
        rows = selector.weighing.rows
        costs = self.costs[-1].row_costs(rows.lengths)
        exits = selector.held_out(wish, kinds)
        return outcome(selector.weighing.scorer, exits, rows.lengths, costs, self.layers)

    def _outcome(self, rows: Rows, rule: ExitRule) -> Outcome:
        scorer, costs = Scorer(rows, self.metric), self.costs[-1].row_costs(rows.lengths)
        return outcome(scorer, exits_of(rule, rows), rows.lengths, costs, self.layers)

    def _contenders(
        self, selector: Selector, wish: Wish | Bound, held: Rows | None
    ) -> tuple[Contender, ...]:
        """The best of every kind of rule, the fastest first."""
        if isinstance(wish, Bound):
            wish = Wish(max_drop=100 * wish.risk)
        found = []
        for number, kind in enumerate(selector.kinds):
            self.progress(f"compare {kind}", number, len(selector.kinds))
            try:
                candidate = selector.choose(wish, [kind])
                if candidate is not None:
                    judged = self._held_out(candidate, wish, [kind], selector, held)
                    found.append(Contender(kind, candidate.rule, judged))
            except InputError:  # not as fast as was wished for
                continue
        return tuple(sorted(found, key=lambda contender: -contender.held_out.estimated))


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


def _with_points(manifest: Manifest, result: Calibration, data: str) -> Manifest:
    """The manifest with the points; new cuts are for every target, so others lose theirs."""
    targets = dict(manifest.targets)
    task = manifest.task
    cuts = result.rows.cuts
    if cuts != task.cuts:
        task = msgspec.structs.replace(task, cuts=cuts)
        targets = {name: _without_points(target) for name, target in targets.items()}
    target = targets[result.target]
    points = {point.name: _record(point, result, target, data) for point in result.points}
    targets[result.target] = msgspec.structs.replace(
        target,
        operating_points={**target.operating_points, **points},
        default_operating_point=result.default,
    )
    return msgspec.structs.replace(manifest, targets=targets, task=task)


def _without_points(target: Target) -> Target:
    return msgspec.structs.replace(target, operating_points={}, default_operating_point="")


def _record(point: Point, result: Calibration, target: Target, data: str) -> OperatingPoint:
    held_out = point.held_out
    return OperatingPoint(
        rule=point.rule.to_dict(),
        wish=point.wish if isinstance(point.wish, Wish) else None,
        metric=held_out.metric,
        score=held_out.score,
        full_depth_score=held_out.full_depth_score,
        drop_interval=held_out.interval,
        held_out=result.held_out,
        rows=held_out.rows,
        data_sha256=data,
        mean_depth=held_out.mean_depth,
        exits=held_out.exits,
        theoretical_speedup=held_out.theoretical,
        estimated_speedup=held_out.estimated,
        measured_speedup={size: round(ratio, 3) for size, ratio in point.measured.items()},
        versions={**target.versions, "fpabee": __version__},
        certificate=point.certificate,
    )
