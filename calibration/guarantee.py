"""Guarantees: the boldest setting whose promises hold on new units, with stated confidence.

This is Learn then Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing. A fixed list
of settings, known before any row is seen, is tested from cautious to bold. A setting passes only if
*every* promise passes on the units that it is about, which needs no correction for the number of
promises. The first setting that fails ends the sequence, and the last one that passed is certified.
Full depth comes first. If there is exit 0, it has a threshold in every setting after it.

A test asks whether the expected loss could be above the bound. It is exact for any number of units,
see `most_losses`. F1 and Matthews correlation are not means over rows. For them, the same bound
must hold for the share of right answers, and for the metric by a bootstrap, whose confidence is
approximate.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import Generic

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import Task
from ..runtime.artifact.operating_point import Certificate, Promise
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Mask
from ..runtime.rules.rules import ExitRule
from ..runtime.tasks import task_of
from .evidence import Evidence, Stops
from .exact import most_losses, rows_needed, share_interval, useful_rows
from .goals import Bound
from .scoring import LabelledLogits


@dataclass(frozen=True)
class Certified:
    """What units certify.

    Attributes:
        rule: the boldest setting that passed; `Budget` of the last exit is full depth. None if not
            even full depth passed.
        certificate: the guarantee; None if nothing is certified but that full depth is full depth.
        failed: without a certificate, what was counted for the promise that ended the sequence,
            and how many units are needed.
    """

    rule: ExitRule | None
    certificate: Certificate | None = None
    failed: str = ""


def check_possible(bound: Bound, task: Task, reference: NDArray[np.float32]) -> None:
    """Refuse, before anything is trained, what cannot be certified even if nothing changes.

    Args:
        bound: what is asked for.
        task: of the model.
        reference: `[rows, labels]` float32, the logits that decisions are compared with, of the
            rows that certify.

    Raises:
        InputError: all decisions are the same, or a promise is about too few texts.
    """
    thresholds = task_of(task).decision_thresholds(bound.thresholds)
    lengths = np.ones(len(reference), np.intp)
    rows = LabelledLogits(
        reference[None], lengths, None, task.problem_type, decision_thresholds=thresholds
    )
    _, decisions = rows.decisions()
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
                f"give more texts, or a larger `{promise.of}`",
            )


def certify(evidence: Evidence[Stops], bound: Bound) -> Certified:
    """The boldest setting that keeps all promises of a bound.

    Args:
        evidence: units that neither trained nor chose anything.
        bound: what is asked for.
    """
    level = 1 - bound.confidence
    order = shuffled(evidence)
    tests = [_Test(evidence, order, promise, level) for promise in bound.promises]
    settings = evidence.settings()
    full_depth, at_full_depth = next(settings)
    best: ExitRule | None = None
    failed = ""
    for setting, stops in chain([(full_depth, at_full_depth)], settings):
        name = "the next setting" if best else "full depth"
        failed = next((test.in_words(stops, name) for test in tests if not test.passes(stops)), "")
        if failed:
            break
        best = setting
    is_own_reference = evidence.compares_with_full_depth
    if best is None or (best == full_depth and is_own_reference):
        shows_more = any(test.shows_more(at_full_depth) for test in tests)
        needs = evidence.needs_in_words(bound, shows_more)
        return Certified(best, None, "; ".join(filter(None, [failed, *needs])))
    changed = evidence.changed(at_full_depth)
    certificate = Certificate(
        confidence=100 * bound.confidence,
        promises=tuple(test.promise for test in tests),
        label_thresholds=dict(bound.thresholds),
        full_depth_changes=0.0 if is_own_reference else most_changes(changed, bound.confidence),
    )
    return Certified(best, certificate)


def most_changes(changed: Mask, confidence: float) -> float:
    """See `Certificate.full_depth_changes`; the exact bound of Clopper and Pearson (1934).

    Args:
        changed: `[units]` which of them changed at full depth.
        confidence: of the bound.
    """
    # An interval leaves half of the rest above it.
    _, most = share_interval(int(changed.sum()), len(changed), 2 * confidence - 1)
    return 100 * most


class _Test(Generic[Stops]):
    """Tests whether a promise holds.

    Args:
        evidence: the units.
        order: the numbers of all units in random order.
        promise: what is promised.
        level: 1 - the confidence.

    Attributes:
        promise: as given, with the number of units that it was tested on.
    """

    def __init__(
        self, evidence: Evidence[Stops], order: NDArray[np.intp], promise: Promise, level: float
    ) -> None:
        self._evidence = evidence
        self._level = level
        share = promise.at_most / 100
        numbers = order[evidence.about(promise)[order]]
        self._numbers = numbers[: useful_rows(len(numbers), share, level)]
        self._most = most_losses(len(self._numbers), share, level, promise.of == "drop")
        self.promise = replace(promise, rows=len(self._numbers))

    def _lost(self, stops: Stops) -> Array:
        """The losses of the units that test the promise."""
        return self._evidence.lost(self.promise, stops)[self._numbers]

    def passes(self, stops: Stops) -> bool:
        """Whether a setting keeps the promise on new units, with the confidence.

        Args:
            stops: where the setting stops the units.
        """
        lost = self._lost(stops)
        gains = min(int((lost < 0).sum()), len(self._most) - 1)
        if (lost > 0).sum() > self._most[gains]:
            return False
        return self._evidence.may_pass(self.promise, stops, self._level)

    def shows_more(self, stops: Stops) -> bool:
        """Whether these units are enough, and themselves show more losses than allowed."""
        share = self.promise.at_most / 100
        return bool(self._most[0] >= 0 and self._lost(stops).mean() > share)

    def in_words(self, stops: Stops, setting: str) -> str:
        """What these units show, for a setting that does not pass."""
        if self._most[0] < 0:
            return f"{len(self._numbers)} {self._evidence.unit} are too few"
        lost = self._lost(stops)
        return f"{setting} {self._evidence.lost_in_words(self.promise, lost, int(self._most[0]))}"


def shuffled(evidence: Evidence[Stops]) -> NDArray[np.intp]:
    """The numbers of units in random order, which depends only on which units there are."""
    hashes = [evidence.digest(unit) for unit in range(len(evidence))]
    order = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.intp)
    every = hashlib.sha256(b"".join(sorted(hashes))).digest()
    return order[np.random.default_rng(int.from_bytes(every, "big")).permutation(len(order))]
