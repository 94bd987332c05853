"""Rankings: the smallest margin whose promise about the best documents holds on new queries.

The unit of a promise is the query: at most a share of the queries get another set of best documents
than from the model that was converted. `query_logits` has the list of settings, which is known
before any query is seen, and `guarantee` says how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.exits import Exits
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.manifest import with_operating_points
from ..runtime.engine import Engine
from ..runtime.files import Row
from ..runtime.files.queries import Query
from ..runtime.files.rows import data_sha256
from ..runtime.first_stage import FirstStage
from ..runtime.machine import hardware
from ..runtime.rules.measures import Floats
from ..runtime.rules.rules import Budget
from .evidence import QueryEvidence
from .goals import Bound
from .guarantee import certify
from .progress import Progress, silent
from .query_logits import QueryLogits, stops_in_batches, stops_of
from .result import Outcome, Point, recorded
from .timing import QueryTimes, time_queries
from .trace import CALIBRATION, engines_of, trace_rows

# Sizes of batches of a packed file that are simulated.
_BATCHES = (8, 32)


@dataclass(frozen=True, kw_only=True)
class RankingPoint(Point):
    """The operating point of a ranking on one target, which has no other.

    Attributes:
        target: the target.
        top: how many documents are wanted.
        without_scores: what the rule gives on the queries of `held_out` if their scores are not
            given.
        batches: by the size of batches, the same if their documents are compared in batches of this
            size, as in a packed file; empty with a quick pass, which no packed file has.
        times: of a query, measured in turns on this machine.
        layers: of the whole model.
    """

    target: str
    top: int
    without_scores: Outcome
    batches: dict[int, Outcome]
    times: QueryTimes
    layers: int

    @property
    def default(self) -> str:
        """The point that runs if none is named; empty if this one promises nothing."""
        return self.name if self.certificate else ""

    @property
    def points(self) -> tuple[RankingPoint]:
        """All operating points, as `Calibration` has them."""
        return (self,)


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

    def traced(
        self, logits: NDArray[np.float32], exits: Exits, first_stage: FirstStage | None
    ) -> QueryLogits:
        """The logits of all exits, also of exit 0, which a trace does not know.

        Args:
            logits: `[exits, rows]` of a trace.
            exits: of the model.
            first_stage: its exit 0, if it has one.
        """
        logits = logits.copy()
        for place in range(len(exits.before_layers)):
            assert first_stage is not None
            logits[place] = self.predicted(first_stage)
        return QueryLogits(logits, self.starts, self.reference, exits)

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
    name: str = "",
    quick_target: str = "",
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
        name: of the operating point; empty: the usual one of the bound.
        quick_target: see `CalibrationOptions.quick_target`; empty for rows that run in one pass.

    Raises:
        FpabeeError: as in `calibrate`.
    """
    with engines_of(folder, target, quick_target, threads) as (engine, quick):
        rows, held = (
            traced_queries(engine, part, folder, progress, quick) for part in (certifying, report)
        )
        progress(f"choose {bound.point}", 0, 1)
        certifies, reports = (QueryEvidence(each, errors, top) for each in (rows, held))
        certified = certify(certifies, bound)
        full_depth = Budget(exit=rows.exits.last)
        rule = certified.rule or full_depth
        times = time_queries(engine, report.queries or certifying.queries, rule, progress)
        point = RankingPoint(
            target=target,
            name=name or bound.point,
            goal=bound,
            top=top,
            rule=rule,
            chosen_on=certifies.outcome(stops_of(rule, rows, top)),
            held_out=reports.outcome(stops_of(rule, held, top)),
            without_scores=reports.outcome(stops_of(rule, held.without_scores, top)),
            batches={
                size: reports.outcome(stops_in_batches(rule, held.without_scores, top, size))
                for size in (() if quick_target else _BATCHES)
            },
            times=times,
            measured={"1": round(times.times_faster, 3)},
            layers=rows.exits.layers[-1],
            certificate=certified.certificate,
            refusal=certified.failed,
            quick_target="" if rule == full_depth else quick_target,
        )
        machine = hardware(engine.manifest.targets[target].on_gpu, threads)
    if point.certificate is not None and point.quick_target == quick_target:
        data = data_sha256(certifying.rows, labels=False)
        engines = EnginesFolder.read(folder)
        old = engines.manifest.targets[target]
        new = recorded(
            point, engines.manifest, target, "queries that decided nothing", machine, data
        )
        points = old.operating_points | {point.name: new}
        engines.with_target(target, with_operating_points(old, points, point.name)).write()
    return point


def traced_queries(
    engine: Engine, queries: Queries, folder: Path, progress: Progress, quick: Engine | None = None
) -> QueryLogits:
    """The logits of the documents of queries; the other arguments are those of `trace_rows`."""
    trace = trace_rows(engine, queries.rows, folder / CALIBRATION, False, progress, quick)
    return queries.traced(trace.logits[..., 0], engine.core.exits, engine.core.first_stage)
