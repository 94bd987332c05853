"""What each exit is worth on its own, and how far its probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.manifest import ProblemType
from ...runtime.rules.measures import Array, Outputs
from ..outcome import outcome
from ..result import Calibration
from ..scoring import LabelledLogits

_BINS = 10


@dataclass(frozen=True)
class ExitScore:
    """One exit, if every row stopped there.

    Attributes:
        exit: number of the exit.
        layer: layer of the exit.
        score: the metric.
        drop: difference to the last exit, in points.
        low: lower end of the 95 % interval of the drop, see `drop_interval`.
        high: upper end of the same interval.
        speedup: time at full depth over time to this exit, by measured times of the segments.
        calibration_error: expected calibration error (ECE, arXiv 1706.04599); None without labels.
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
    """Answers of an exit whose probability lies in one interval.

    Attributes:
        exit: number of the exit.
        layer: layer of the exit.
        low: lower end of the interval, excluded unless it is 0.
        high: upper end of the interval, included.
        count: number of answers; multi-label: of pairs of a row and a label.
        probability: their mean probability; None if the bin is empty.
        correct: share that is right; multi-label: share of pairs where the label holds.
    """

    exit: int
    layer: int
    low: float
    high: float
    count: int
    probability: float | None
    correct: float | None


def exit_scores(result: Calibration, bins: list[Bin]) -> list[ExitScore]:
    """Every exit on its own, on the rows of the calibration."""
    costs, found = result.selector.stopping_costs, []
    for number, layer in zip(result.rows.exits, result.layers, strict=True):
        held = outcome(costs.scorer, np.full(len(costs.rows), number), costs.costs, result.layers)
        error = _calibration_error(bins, number)
        found.append(
            ExitScore(number, layer, held.score, held.drop, *held.interval, held.estimated, error)
        )
    return found


def reliability(result: Calibration) -> list[Bin]:
    """Bins of equal width over the probabilities of every exit; empty without labels."""
    if result.rows.expected is None:
        return []
    return [
        bin
        for place, (number, layer) in enumerate(zip(result.rows.exits, result.layers, strict=True))
        for bin in _bins(number, layer, *_probabilities(result.rows, place))
    ]


def _probabilities(rows: LabelledLogits, place: int) -> tuple[Array, NDArray[np.bool_]]:
    """Probabilities of an exit, and whether each of them is about something true."""
    outputs = Outputs(rows.logits[place], rows.problem_type)
    assert rows.expected is not None
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        return outputs.probabilities.max(axis=-1), outputs.answers == rows.expected
    return outputs.probabilities.ravel(), rows.expected.ravel() == 1


def _bins(number: int, layer: int, values: Array, true: NDArray[np.bool_]) -> Iterator[Bin]:
    edges = np.linspace(0, 1, _BINS + 1).round(6)
    places = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, _BINS - 1)
    for place in range(_BINS):
        here = places == place
        count = int(here.sum())
        means = (float(values[here].mean()), float(true[here].mean())) if count else (None, None)
        yield Bin(number, layer, float(edges[place]), float(edges[place + 1]), count, *means)


def _calibration_error(bins: list[Bin], number: int) -> float | None:
    """Mean distance between probability and truth over bins, weighted by their answers."""
    own = [bin for bin in bins if bin.exit == number]
    if not own:
        return None
    error = sum(
        bin.count * abs(bin.probability - bin.correct)
        for bin in own
        if bin.probability is not None and bin.correct is not None
    )
    return error / sum(bin.count for bin in own)
