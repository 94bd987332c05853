"""What each exit is worth by itself, how far its probabilities can be trusted, its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.manifest import ProblemType
from ...runtime.rules.measures import Array, Outputs
from ..outcome import drop_interval
from ..result import Calibration
from ..scoring import Rows

_BINS = 10


@dataclass(frozen=True)
class ExitScore:
    """One exit, if every row stopped there.

    Attributes:
        exit: from 1.
        layer: of the exit.
        score: the metric.
        drop: against the last exit, in points.
        low: of the 95 % interval of the drop, see `drop_interval`.
        high: of the same.
        speedup: in measured times of the segments.
        calibration_error: expected calibration error (ECE); None: no labels.
    """

    exit: int
    layer: int
    score: float
    drop: float
    low: float
    high: float
    speedup: float
    calibration_error: float | None


@dataclass(frozen=True)
class Bin:
    """Answers of an exit whose probability is in one interval.

    Attributes:
        exit: from 1.
        layer: of the exit.
        low: of the interval, excluded but for 0.
        high: of the interval, included.
        count: answers; multi-label: pairs of a row and a label.
        probability: their mean probability; None: there are none.
        correct: share that is right; multi-label: share of the pairs where the label holds.
    """

    exit: int
    layer: int
    low: float
    high: float
    count: int
    probability: float | None
    correct: float | None


@dataclass(frozen=True)
class SegmentTime:
    """Measured time of a segment.

    Attributes:
        batch: rows at a time.
        exit: at the end of the segment, from 1.
        layer: of that exit.
        tokens: length of the rows.
        milliseconds: for one row, head included.
        head_share: of that, what the head takes; None: not measured.
    """

    batch: int
    exit: int
    layer: int
    tokens: int
    milliseconds: float
    head_share: float | None


def exit_scores(result: Calibration, bins: list[Bin]) -> list[ExitScore]:
    """Every exit by itself, on the rows of the calibration."""
    stopping_costs, rows = result.selector.stopping_costs, len(result.rows)
    scorer, costs = stopping_costs.scorer, stopping_costs.costs.sum(axis=1)
    found = []
    for number, layer in enumerate(result.layers, start=1):
        exits = np.full(rows, number)
        score = scorer.score(exits)
        low, high = drop_interval(scorer, exits)
        found.append(
            ExitScore(
                exit=number,
                layer=layer,
                score=score,
                drop=100 * (scorer.full_depth - score),
                low=low,
                high=high,
                speedup=float(costs[-1] / costs[number - 1]),
                calibration_error=_calibration_error(bins, number),
            )
        )
    return found


def reliability(result: Calibration) -> list[Bin]:
    """Bins of equal width of every exit's probabilities; none without labels."""
    rows = result.rows
    if rows.expected is None:
        return []
    return [
        bin
        for number, layer in enumerate(result.layers, start=1)
        for bin in _bins(number, layer, *_probabilities(rows, number))
    ]


def _probabilities(rows: Rows, number: int) -> tuple[Array, NDArray[np.bool_]]:
    """Probabilities of an exit, and whether what they are of is true."""
    outputs = Outputs(rows.logits[number - 1], rows.problem_type)
    assert rows.expected is not None
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        return outputs.probabilities.max(axis=-1), outputs.answers == rows.expected
    return outputs.probabilities.ravel(), rows.expected.ravel() == 1


def _bins(number: int, layer: int, values: Array, true: NDArray[np.bool_]) -> Iterator[Bin]:
    edges = np.linspace(0, 1, _BINS + 1)
    places = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, _BINS - 1)
    for place in range(_BINS):
        here = places == place
        count = int(here.sum())
        yield Bin(
            exit=number,
            layer=layer,
            low=round(float(edges[place]), 6),
            high=round(float(edges[place + 1]), 6),
            count=count,
            probability=float(values[here].mean()) if count else None,
            correct=float(true[here].mean()) if count else None,
        )


def _calibration_error(bins: list[Bin], number: int) -> float | None:
    """Mean distance of probability and truth over bins, weighted by their answers."""
    mine = [bin for bin in bins if bin.exit == number]
    if not mine:
        return None
    error = sum(
        bin.count * abs(bin.probability - bin.correct)
        for bin in mine
        if bin.probability is not None and bin.correct is not None
    )
    return error / sum(bin.count for bin in mine)


def segment_times(result: Calibration) -> list[SegmentTime]:
    """Every segment at every length and batch size that was measured."""
    return [
        SegmentTime(
            batch=model.batch,
            exit=number,
            layer=layer,
            tokens=tokens,
            milliseconds=1e3 * seconds,
            head_share=model.head_shares[number - 1] if model.head_shares else None,
        )
        for model in result.costs
        for number, layer in enumerate(result.layers, start=1)
        for tokens, seconds in zip(model.lengths, model.seconds[number - 1], strict=True)
    ]
