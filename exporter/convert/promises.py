"""What a target promises about the decisions of the classifier, and how it does on other texts.

The logits are those of the built target, so its rounding counts. Full depth comes first: a target
that changes too many decisions without any early exit gets no operating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import __version__
from ...calibration.costs import StoppingCosts, measure_costs, measure_speedup
from ...calibration.goals import Bound
from ...calibration.guarantee import certify, decision_thresholds, rows_needed
from ...calibration.progress import Progress
from ...calibration.result import outcome
from ...calibration.scoring import AGREEMENT, LabelledLogits, Scorer, same_answers
from ...calibration.search import exits_of
from ...calibration.trace import trace_rows
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import Task, with_operating_points
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.check import logit_differences
from ...runtime.engine import Engine
from ...runtime.errors import InputError
from ...runtime.files import Row
from ...runtime.files.rows import data_sha256
from ...runtime.machine import hardware
from ...runtime.quality import Labels
from ...runtime.rules.rules import Budget
from .options import Converted

_BATCH = 32
_HELD_OUT = "texts that decided nothing"


@dataclass(frozen=True)
class Part:
    """Some of the texts, with what the classifier gives for them.

    Attributes:
        rows: the texts.
        logits: `[rows, labels]` of the classifier.
        weights: `[rows]` how often each text occurs.
        expected: their labels, see `encode_labels`; None: they are not known.
    """

    rows: Sequence[Row]
    logits: NDArray[np.float32]
    weights: NDArray[np.int64]
    expected: Labels | None


def check_promises(bound: Bound, task: Task, logits: NDArray[np.float32], share: float) -> None:
    """Refuse what cannot be certified even without any changed decision.

    Args:
        bound: the promises.
        task: of the classifier.
        logits: `[rows, labels]` of the texts that certify.
        share: how many of the distinct texts these are.

    Raises:
        InputError: all decisions are the same, or a promise is about too few texts.
    """
    rows = LabelledLogits(logits[None], np.ones(len(logits), np.intp), None, task.problem_type)
    thresholds = decision_thresholds(task, bound.thresholds)
    _, decisions = replace(rows, decision_thresholds=thresholds).decisions()
    if (decisions == decisions[0]).all():
        raise InputError(
            f"the classifier decides the same for all {len(decisions):,} texts that certify",
            "give texts like those to classify, or other `thresholds`",
        )
    for promise in bound.promises:
        least, _ = rows_needed(promise.at_most / 100, 1 - bound.confidence)
        about = np.ones(len(decisions), np.bool_)
        if promise.label is not None:
            about = decisions[:, task.labels.index(promise.label)] == (promise.of == "missed")
        if about.sum() < least:
            raise InputError(
                f"{promise} needs at least {least:,} texts that it is about; among the "
                f"{len(decisions):,} texts that certify, there are {about.sum():,}",
                f"give more texts, of which {share:.0%} certify, or allow more",
            )


def certify_target(
    folder: Path,
    name: str,
    bound: Bound,
    calibrate: Part,
    report: Part,
    threads: int | None,
    progress: Progress,
) -> Converted:
    """Certify a target, write its operating point, and judge it on the texts of the report.

    Args:
        folder: the engines folder.
        name: the target.
        bound: the promises.
        calibrate: the texts that certify, and that nothing else has used.
        report: the texts to report on.
        threads: CPU threads; None: all cores.
        progress: called with (what, done, total).
    """
    full_depth = Budget(exit=EnginesFolder.read(folder).manifest.exits[-1])
    with Engine.load(folder, name, threads=threads, rule=full_depth) as engine:
        task = engine.manifest.task
        layers = engine.manifest.exit_layers
        thresholds = decision_thresholds(task, bound.thresholds)

        def traced(part: Part) -> LabelledLogits:
            place = folder / "calibration"
            found = trace_rows(engine, part.rows, place, False, progress)
            return replace(found, decision_thresholds=thresholds, reference=part.logits)

        seen = traced(calibrate)
        held = traced(report)
        progress(f"time {name}", 0, 1)
        costs = measure_costs(engine, seen.lengths, _BATCH)
        stopping = StoppingCosts(seen, AGREEMENT, costs.row_costs(seen.lengths))
        found = certify(stopping, bound, task.labels)
        rule = found.rule or full_depth
        stops = exits_of(rule, seen)
        runs = outcome(stopping.scorer, stops, stopping.costs, layers)
        scorer = Scorer(held, AGREEMENT)
        exits = exits_of(rule, held)
        judged = outcome(scorer, exits, costs.row_costs(held.lengths), layers)
        encoded = engine.core.encode([row.content for row in report.rows])
        speedups = [measure_speedup(engine, encoded, rule, batch) for batch in (1, _BATCH)]
    kinds = [f"{kind}-{100 * share:g}" for kind, share in bound.shares.items()]
    point = "-".join(kinds).replace("_", "-") if found.certificate else None
    if point is not None:
        record = OperatingPoint(
            rule=rule.to_dict(),
            goal=None,
            metric=AGREEMENT,
            score=judged.score,
            full_depth_score=judged.full_depth_score,
            drop_interval=judged.interval,
            held_out=_HELD_OUT,
            rows=judged.rows,
            data_sha256=data_sha256(calibrate.rows, labels=False),
            mean_depth=runs.mean_depth,
            exits=runs.exits,
            measured_speedup=dict(zip(("1", str(_BATCH)), speedups, strict=True)),
            versions={**engine.manifest.targets[name].versions, "fpabee": __version__},
            hardware=hardware(engine.manifest.targets[name].on_gpu, threads),
            certificate=found.certificate,
        )
        engines = EnginesFolder.read(folder)
        target = with_operating_points(engines.manifest.targets[name], {point: record}, point)
        engines.with_target(name, target).write()
    places = held.at(exits)
    changed = scorer.changed[places]
    accuracy = None
    if report.expected is not None:
        right = same_answers(scorer.answers[places], report.expected, task.problem_type)
        accuracy = float(right.mean())
    return Converted(
        target=name,
        point=point,
        rule=rule.to_dict(),
        certificate=found.certificate,
        refusal=found.failed,
        full_depth_changed=float(stopping.scorer.changed[-1].mean()),
        changed=float(changed.mean()),
        changed_traffic=float(np.average(changed, weights=report.weights)),
        layers=judged.mean_depth,
        exits=judged.exits,
        speedup_single=speedups[0],
        speedup_file=speedups[1],
        max_logit_difference=float(logit_differences(seen.logits[-1], calibrate.logits).max()),
        accuracy=accuracy,
        lost_label=stopping.scorer.lost_label(stops, task.labels),
    )
