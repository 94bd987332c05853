"""Rankings: the smallest margin whose promise about the best documents holds on new queries.

The unit of a promise is the query: at most a share of the queries get another set of best documents
than from the model that was converted. `query_logits` has the list of settings, which is known
before any query is seen, and `guarantee` says how it is tested.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.manifest import Target, with_operating_points
from ..runtime.artifact.operating_point import Certificate, OperatingPoint
from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.files import Row
from ..runtime.files.queries import Query
from ..runtime.files.rows import data_sha256
from ..runtime.first_stage import FirstStage
from ..runtime.machine import hardware
from ..runtime.rules.measures import Floats
from ..runtime.rules.rules import Budget, ExitRule
from .costs import time_in_turns
from .goals import Bound
from .guarantee import (
    Certified,
    most_changes,
    most_losses,
    rows_needed,
    share_interval,
    useful_rows,
)
from .progress import Progress, silent
from .query_logits import QueryLogits, Stops, changed_queries, settings, stops_of
from .trace import trace_rows

METRIC = "unchanged_top"
"""The share of queries whose best documents are those of the model that was converted."""

# Sizes of batches of a packed file that are simulated.
_BATCHES = (8, 32)
# So many queries are timed, in turns, and so often.
_TIMED_QUERIES = 5
_TURNS = 5


def certify(rows: QueryLogits, errors: Floats, top: int, bound: Bound) -> Certified:
    """The smallest margin that keeps the promise of a bound, see `guarantee`.

    Args:
        rows: logits of queries that neither trained nor chose anything.
        errors: see `errors_near_top`.
        top: how many documents are wanted.
        bound: with `changed_answers`, the largest share of queries whose best documents change.
    """
    assert bound.changed_answers is not None
    share = bound.changed_answers
    level = 1 - bound.confidence
    order = _shuffled(rows)
    tested = order[: useful_rows(len(order), share, level)]
    most = int(most_losses(len(tested), share, level)[0])
    passed: ExitRule | None = None
    failed = f"{len(tested)} queries are too few"
    rules = (Budget(exit=rows.exits[-1]), *settings(errors, top, rows.first_exit))
    for setting in rules if most >= 0 else ():
        lost = int(stops_of(setting, rows, top).changed[tested].sum())
        if lost > most:
            what = "the next setting" if passed else "full depth"
            failed = f"{what} changes {lost} of {len(tested)} queries, and {most} may change"
            break
        passed = setting
    if passed is None:
        least, good = rows_needed(share, level)
        needs = f"{least:,} queries are the least, and {good:,} give a good chance"
        return Certified(None, None, f"{failed}; {needs}")
    full_depth = stops_of(Budget(exit=rows.exits[-1]), rows, top)
    certificate = Certificate(
        confidence=100 * bound.confidence,
        promises=tuple(msgspec.structs.replace(each, rows=len(tested)) for each in bound.promises),
        full_depth_changes=most_changes(full_depth.changed, bound.confidence),
    )
    return Certified(passed, certificate)


def _shuffled(rows: QueryLogits) -> NDArray[np.intp]:
    """The numbers of the queries in random order, which depends only on which queries there are."""
    hashes = [
        hashlib.sha256(np.ascontiguousarray(rows.logits[:, start:end]).tobytes()).digest()
        for start, end in itertools.pairwise(rows.starts)
    ]
    order = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.intp)
    every = hashlib.sha256(b"".join(sorted(hashes))).digest()
    return order[np.random.default_rng(int.from_bytes(every, "big")).permutation(len(order))]


@dataclass(frozen=True)
class RankingOutcome:
    """What a rule gave on some queries.

    Attributes:
        queries: how many queries there were.
        changed: how many of them got another set of best documents.
        changed_at_full_depth: how many did with all layers, because of rounding.
        mean_depth: mean number of layers that ran for a document.
        exits: how many documents stopped at each exit.
    """

    queries: int
    changed: int
    changed_at_full_depth: int
    mean_depth: float
    exits: tuple[int, ...]


@dataclass(frozen=True)
class QueryTimes:
    """How long queries take.

    Attributes:
        documents: how many documents the queries have.
        milliseconds: of a query with the rule.
        full_depth_milliseconds: of the same query with all layers.
    """

    documents: int
    milliseconds: float
    full_depth_milliseconds: float

    @property
    def times_faster(self) -> float:
        """Full depth over the rule."""
        return self.full_depth_milliseconds / self.milliseconds


@dataclass(frozen=True)
class RankingPoint:
    """The operating point of a ranking on one target.

    Attributes:
        target: the target.
        name: of the operating point.
        top: how many documents are wanted.
        rule: its rule; all layers if nothing is certified.
        chosen_on: what the rule gives on the queries that certified it.
        held_out: what it gives on queries that decided nothing.
        without_scores: what it gives on these queries if their scores are not given.
        batches: by the size of batches, the same if their documents are compared in batches of this
            size, as in a packed file.
        times: of a query, measured in turns on this machine.
        layers: of the whole model.
        certificate: the guarantee; None if the queries confirm none.
        refusal: what was counted if they do not; else empty.
    """

    target: str
    name: str
    top: int
    rule: ExitRule
    chosen_on: RankingOutcome
    held_out: RankingOutcome
    without_scores: RankingOutcome
    batches: dict[int, RankingOutcome]
    times: QueryTimes
    layers: int
    certificate: Certificate | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Queries:
    """Queries, and what the model that was converted says.

    Attributes:
        queries: the queries.
        reference: `[rows]` float32, its logits for the documents, one query after another.
    """

    queries: Sequence[Query]
    reference: NDArray[np.float32]

    @property
    def rows(self) -> list[Row]:
        """Each query with each of its documents."""
        return [
            Row(query.text, document, where=query.where)
            for query in self.queries
            for document in query.documents
        ]

    @property
    def starts(self) -> NDArray[np.intp]:
        """Where the documents of each query begin, see `QueryLogits`."""
        return np.cumsum([0, *(len(query.documents) for query in self.queries)])

    def traced(self, logits: NDArray[np.float32], first_stage: FirstStage | None) -> QueryLogits:
        """The logits of all exits, also of exit 0, which a trace does not know.

        Args:
            logits: `[exits, rows]` of a trace.
            first_stage: exit 0 of the model; None: the trace begins at exit 1.
        """
        if first_stage is not None:
            logits = np.concatenate([self.predicted(first_stage)[None], logits[1:]])
        first_exit = 1 if first_stage is None else 0
        return QueryLogits(logits, self.starts, self.reference, first_exit)

    def predicted(self, first_stage: FirstStage) -> NDArray[np.float32]:
        """What the scores of the documents predict: `[rows]`; 0 for queries without scores."""
        each = [
            first_stage.predict(query.scores) if query.scores else np.zeros(len(query.documents))
            for query in self.queries
        ]
        return np.concatenate([np.zeros(0), *each]).astype(np.float32)


def calibrate_ranking(
    folder: Path,
    target: str,
    certifying: Queries,
    report: Queries,
    errors: Floats,
    top: int,
    bound: Bound,
    threads: int | None = None,
    progress: Progress = silent,
) -> RankingPoint:
    """Certify a target for rankings, and write its operating point into the manifest.

    A point that promises nothing is not written: not even full depth may rank like the model.

    Args:
        folder: the engines folder.
        target: one of its targets.
        certifying: queries that neither trained nor chose anything.
        report: other such queries, to report on.
        errors: see `errors_near_top`.
        top: how many documents are wanted.
        bound: with `changed_answers`, the largest share of queries whose best documents change.
        threads: CPU threads; None: all.
        progress: called with (what, done, total).

    Raises:
        FpabeeError: as in `calibrate`.
    """
    full_depth = ExitRule.from_dict(EnginesFolder.read(folder).manifest.default_rule)
    with Engine.load(folder, target, threads=threads, rule=full_depth) as engine:
        layers = engine.manifest.exit_layers
        rows, held = (
            part.traced(
                trace_rows(engine, part.rows, folder / "calibration", False, progress).logits[
                    ..., 0
                ],
                engine.core.first_stage,
            )
            for part in (certifying, report)
        )
        progress(f"choose {bound.point}", 0, 1)
        certified = certify(rows, errors, top, bound)
        rule = certified.rule or full_depth
        point = RankingPoint(
            target=target,
            name=bound.point,
            top=top,
            rule=rule,
            chosen_on=_outcome(rule, rows, top, layers),
            held_out=_outcome(rule, held, top, layers),
            without_scores=_outcome(rule, held.without_scores, top, layers),
            batches={
                size: _outcome(rule, held.without_scores, top, layers, size) for size in _BATCHES
            },
            times=_times(engine, report.queries or certifying.queries, rule, progress),
            layers=layers[-1],
            certificate=certified.certificate,
            refusal=certified.failed,
        )
        on_gpu = engine.manifest.targets[target].on_gpu
        machine = hardware(on_gpu, threads)
    if point.certificate is not None:
        data = data_sha256(certifying.rows, labels=False)
        engines = EnginesFolder.read(folder)
        old = engines.manifest.targets[target]
        points = old.operating_points | {point.name: _record(point, old, data, machine)}
        engines.with_target(target, with_operating_points(old, points, point.name)).write()
    return point


def _outcome(
    rule: ExitRule, rows: QueryLogits, top: int, layers: Sequence[int], batch: int | None = None
) -> RankingOutcome:
    stops = stops_of(rule, rows, top)
    if batch is not None:
        exits = stops_of(rule, rows.in_batches(batch), top).exits
        stops = Stops(exits, changed_queries(rows, exits, top))
    full_depth = stops_of(Budget(exit=rows.exits[-1]), rows, top)
    places = stops.exits - rows.exits.stop + len(layers)
    return RankingOutcome(
        queries=len(rows),
        changed=int(stops.changed.sum()),
        changed_at_full_depth=int(full_depth.changed.sum()),
        mean_depth=float(np.asarray(layers)[places].mean()) if len(places) else 0.0,
        exits=tuple(np.bincount(places, minlength=len(layers)).tolist()),
    )


def _times(
    engine: Engine, queries: Sequence[Query], rule: ExitRule, progress: Progress = silent
) -> QueryTimes:
    """The time of some queries with the most documents, with a rule and at full depth in turns.

    Raises:
        InputError: no query can be ranked.
    """
    core = engine.core
    units: list[Sequence[EncodedRow]] = []
    for query in sorted(queries, key=lambda query: len(query.documents), reverse=True):
        rows = core.encode(query.pairs)
        if core.is_query_possible(rows):
            units.append(core.with_scores(rows, query.scores))
        if len(units) == _TIMED_QUERIES:
            break
    if not units:
        core.check_query(rows)
    runners = (core.runner(rule), core.full_depth)
    runs = [partial(core.rank, runner=runner) for runner in runners]
    turns = []
    for turn in range(1 + _TURNS):
        progress("time queries", turn, 1 + _TURNS)
        turns.append(time_in_turns(units, runs, 1))
    seconds = np.concatenate(turns[1:])  # the first one prepares the shapes
    with_rule, at_full_depth = 1000 * np.median(seconds, axis=(0, 1))
    return QueryTimes(len(units[0]), float(with_rule), float(at_full_depth))


def _record(point: RankingPoint, target: Target, data: str, machine: str) -> OperatingPoint:
    held = point.held_out
    full = 1 - held.changed_at_full_depth / held.queries
    low, high = share_interval(held.changed, held.queries)
    return OperatingPoint(
        rule=point.rule.to_dict(),
        goal=None,
        metric=METRIC,
        score=1 - held.changed / held.queries,
        full_depth_score=full,
        drop_interval=(100 * (full - 1 + low), 100 * (full - 1 + high)),
        held_out="queries that decided nothing",
        rows=held.queries,
        data_sha256=data,
        mean_depth=point.chosen_on.mean_depth,
        exits=point.chosen_on.exits,
        measured_speedup={"1": round(point.times.times_faster, 3)},
        versions={**target.versions, "fpabee": __version__},
        hardware=machine,
        certificate=point.certificate,
    )
