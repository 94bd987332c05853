"""Rankings: the smallest margin whose promise about the best documents holds on new queries.

The unit of a promise is the query: at most a share of the queries get another set of best documents
than from the model that was converted. A document leaves when it is behind the `top`th by a margin,
see `TopK`. The margin of an exit is its error among documents near the top, times a factor that is
the same for all exits. So there is one list of settings, from cautious to bold, which is known
before any query is seen, and `guarantee` says how it is tested.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.manifest import Target, with_operating_points
from ..runtime.artifact.operating_point import Certificate, OperatingPoint
from ..runtime.engine import Engine
from ..runtime.files import Row
from ..runtime.files.queries import Query
from ..runtime.files.rows import data_sha256
from ..runtime.first_stage import FirstStage
from ..runtime.machine import hardware
from ..runtime.ranking import changed_sets
from ..runtime.rules.measures import Array, Floats, Integers, Mask
from ..runtime.rules.rules import Budget, ExitRule, TopK, before_top
from ..runtime.rules.words import rounded
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
from .scoring import mean_saving
from .trace import trace_rows

METRIC = "unchanged_top"
"""The share of queries whose best documents are those of the model that was converted."""

NEAR_TOP = 2
"""Documents among so many times the wanted ones are near the top."""
# The margins as multiples of an exit's error, from cautious to bold.
_FACTORS = np.geomspace(16.0, 0.02, 300)
# Queries that are simulated together.
_BLOCK = 64
# The logit of made-up documents.
_LOWEST = float(np.finfo(np.float32).min)
# Sizes of batches of a packed file that are simulated.
_BATCHES = (8, 32)
# So many queries are timed, in turns, and so often.
_TIMED_QUERIES = 5
_TURNS = 5


class _Block(NamedTuple):
    """Queries of similar size, with made-up documents behind the real ones of smaller queries.

    Attributes:
        numbers: `[queries]` which queries.
        rows: `[queries, documents]` which row each document is; 0 for made-up ones.
        real: `[queries, documents]` whether a document is not made up.
        logits: `[exits, queries, documents]` float64; below all others for made-up ones.
        reference: `[queries, documents]` float64, in the same way.
    """

    numbers: NDArray[np.intp]
    rows: NDArray[np.intp]
    real: Mask
    logits: Array
    reference: Array


@dataclass(frozen=True)
class QueryLogits:
    """The logits of all exits for the documents of queries.

    Attributes:
        logits: `[exits, rows]` float32; the documents of a query follow each other.
        starts: `[queries + 1]` where the documents of each query begin.
        reference: `[rows]` float32, the logits of the model that was converted.
        first_exit: 0 if the first logits are what scores predict, see `first_stage`; else 1.
    """

    logits: NDArray[np.float32]
    starts: NDArray[np.intp]
    reference: NDArray[np.float32]
    first_exit: int = 1

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def exits(self) -> range:
        """The numbers of the exits."""
        return range(self.first_exit, self.first_exit + len(self.logits))

    @cached_property
    def without_scores(self) -> QueryLogits:
        """The same queries as they run without scores: nothing leaves at exit 0."""
        return replace(self, logits=self.logits[1 - self.first_exit :], first_exit=1)

    def take(self, queries: NDArray[np.intp]) -> QueryLogits:
        """Some of the queries, by their numbers from 0."""
        spans = [np.arange(self.starts[n], self.starts[n + 1]) for n in queries]
        rows = np.concatenate([np.zeros(0, np.intp), *spans])
        starts = np.cumsum([0, *map(len, spans)])
        return replace(
            self, logits=self.logits[:, rows], starts=starts, reference=self.reference[rows]
        )

    def in_batches(self, size: int) -> QueryLogits:
        """The same, where each batch of so many documents of a query is a query of its own."""
        spans = itertools.pairwise(self.starts.tolist())
        begins = [begin for start, end in spans for begin in range(start, end, size)]
        return replace(self, starts=np.array([*begins, self.starts[-1]], np.intp))

    @cached_property
    def blocks(self) -> list[_Block]:
        """All queries that have documents, in blocks, to which hundreds of settings are applied."""
        blocks = []
        sizes = np.diff(self.starts)
        order = np.argsort(sizes, kind="stable")
        order = order[sizes[order] > 0]
        for start in range(0, len(order), _BLOCK):
            numbers = order[start : start + _BLOCK]
            place = np.arange(sizes[numbers].max())
            real = place < sizes[numbers, None]
            rows = np.where(real, self.starts[numbers, None] + place, 0)
            block = _Block(
                numbers=numbers,
                rows=rows,
                real=real,
                logits=np.where(real, self.logits[:, rows].astype(np.float64), _LOWEST),
                reference=np.where(real, self.reference[rows].astype(np.float64), _LOWEST),
            )
            blocks.append(block)
        return blocks


class Stops(NamedTuple):
    """Where a rule stops documents, and what that changes.

    Attributes:
        exits: `[rows]` int64, the exit of each document.
        changed: `[queries]` whether the set of the best documents changed, with the scores of the
            query or without them.
    """

    exits: Integers
    changed: Mask


def stops_of(rule: ExitRule, rows: QueryLogits, top: int) -> Stops:
    """Where a rule stops documents: the exits of a live run that gives these logits.

    Args:
        rule: `TopK` or `Budget` of the last exit.
        rows: the logits.
        top: how many documents are wanted.
    """
    exits = np.full(rows.logits.shape[1], rows.exits[-1], np.int64)
    for block in rows.blocks if isinstance(rule, TopK) else ():
        assert isinstance(rule, TopK)  # for mypy
        going = block.real.copy()
        for number, logits in zip(rows.exits[:-1], block.logits, strict=False):
            before = before_top(np.where(going, logits, -np.inf), rule.top)
            leaves = going & (before < rule.threshold_at(number))
            exits[block.rows[leaves]] = number
            going &= ~leaves
    changed = _changed(rows, exits, top)
    if rows.first_exit == 0:
        changed |= stops_of(rule, rows.without_scores, top).changed
    return Stops(exits, changed)


def _changed(rows: QueryLogits, exits: Integers, top: int) -> Mask:
    """Whether the best documents of queries changed: `[queries]`, given the exits of documents."""
    changed = np.zeros(len(rows), np.bool_)
    for block in rows.blocks:
        left = block.real & (exits[block.rows] < rows.exits[-1])
        changed[block.numbers] = changed_sets(block.logits[-1], left, block.reference, top)
    return changed


def errors_near_top(rows: QueryLogits, top: int) -> Array:
    """The error of each early exit for documents near the top: `[exits - 1]`.

    It is the deviation of the predicted from the final logit. What all documents of a query have in
    common does not count, because they are compared with each other only.

    Args:
        rows: logits of queries that did not train the heads.
        top: how many documents are wanted.
    """
    squares = np.zeros(len(rows.logits) - 1)
    free = 0
    for block in rows.blocks:
        nearest = min(NEAR_TOP * top, block.reference.shape[1])
        limits = -np.sort(-block.reference, axis=1)[:, nearest - 1, None]
        near = block.real & (block.reference >= limits)
        count = near.sum(axis=1, keepdims=True)
        errors = np.where(near, block.logits[:-1] - block.reference, 0.0)
        own = errors.sum(axis=2, keepdims=True) / count
        squares += (np.where(near, errors - own, 0.0) ** 2).sum(axis=(1, 2))
        free += int((count - 1).sum())
    return np.sqrt(squares / max(1, free)).clip(min=1e-6)


def settings(errors: Floats, top: int, first_exit: int = 1) -> list[TopK]:
    """All settings, from cautious to bold.

    Args:
        errors: see `errors_near_top`.
        top: how many documents are wanted.
        first_exit: the exit of the first error.
    """
    rules = []
    for factor in _FACTORS.tolist():
        # The last exit stops every document anyway.
        thresholds = [0.0 - rounded(factor * error) for error in np.append(errors, 0.0).tolist()]
        of_exit_0 = thresholds.pop(0) if first_exit == 0 else None
        rules.append(TopK(top=top, threshold=tuple(thresholds), exit_0_threshold=of_exit_0))
    return rules


def saved(rows: QueryLogits, errors: Floats, top: int, share: float, costs: Floats) -> float:
    """How much less than full depth documents cost, where about a share of the queries changes.

    Args:
        rows: logits of queries that did not train the heads.
        errors: see `errors_near_top`.
        top: how many documents are wanted.
        share: of the queries that may change.
        costs: `[exits]` what a document costs that stops at an exit; ascending.
    """
    changed = []
    cost = []
    for setting in settings(errors, top, rows.first_exit):
        stops = stops_of(setting, rows, top)
        changed.append(stops.changed.mean())
        cost.append(np.asarray(costs)[stops.exits - rows.first_exit].mean())
    return mean_saving(1 - np.array(cost) / costs[-1], np.array(changed), share)


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
            times=_times(engine, report.queries or certifying.queries, rule),
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
        stops = Stops(exits, _changed(rows, exits, top))
    full_depth = stops_of(Budget(exit=rows.exits[-1]), rows, top)
    places = stops.exits - rows.exits.stop + len(layers)
    return RankingOutcome(
        queries=len(rows),
        changed=int(stops.changed.sum()),
        changed_at_full_depth=int(full_depth.changed.sum()),
        mean_depth=float(np.asarray(layers)[places].mean()) if len(places) else 0.0,
        exits=tuple(np.bincount(places, minlength=len(layers)).tolist()),
    )


def _times(engine: Engine, queries: Sequence[Query], rule: ExitRule) -> QueryTimes:
    """The time of some queries with the most documents, with a rule and at full depth in turns."""
    largest = sorted(queries, key=lambda query: len(query.documents))[-_TIMED_QUERIES:]
    core = engine.core
    units = [core.with_scores(core.encode(query.pairs), query.scores) for query in largest]
    runners = (core.runner(rule), core.full_depth)
    runs = [partial(core.rank, runner=runner) for runner in runners]
    time_in_turns(units, runs, 1)  # prepares the shapes
    seconds = time_in_turns(units, runs, _TURNS)
    with_rule, at_full_depth = 1000 * np.median(seconds, axis=(0, 1))
    return QueryTimes(len(largest[-1].documents), float(with_rule), float(at_full_depth))


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
