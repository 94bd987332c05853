"""What settings give on units, whatever these are: texts, or queries with documents."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.exits import Exits
from ..runtime.artifact.operating_point import Promise
from ..runtime.rules.measures import Array, Floats, Integers, Mask
from ..runtime.rules.rules import Budget, ExitRule
from .costs import observed_losses
from .exact import rows_needed, share_interval
from .goals import DEFAULT_RULE, Bound
from .query_logits import QueryLogits, QueryStops, settings, stops_of
from .result import Outcome, counts, drop_interval
from .scoring import Scorer, exits_of_rows, mean_saving
from .settings import StopScores, settings_lists

Stops = TypeVar("Stops")
"""Where a setting stops units: exits, with all that `Evidence` needs to know what is lost."""

# One list, because several would have to share the level. With this power, a weak exit 0 costs next
# to no savings, and a strong one answers nearly as many texts as with a bolder power.
_EXIT_0_POWER = 2.0
_RESAMPLES = 500

UNCHANGED_TOP = "unchanged_top"
"""The share of queries whose best documents are those of the model that was converted."""


class Evidence(ABC, Generic[Stops]):
    """Units on which settings are judged; those that certify neither trained nor chose anything.

    Attributes:
        unit: what units are called.
    """

    unit: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """How many units there are."""

    @property
    @abstractmethod
    def compares_with_full_depth(self) -> bool:
        """Whether full depth is what decisions are compared with; else it is another model."""

    @abstractmethod
    def settings(self) -> Iterator[tuple[ExitRule, Stops]]:
        """Full depth, then settings from cautious to bold, each with where it stops units.

        No unit decides which settings there are, but one may be left out that stops all units where
        the one before does: it passes or fails like it.
        """

    @abstractmethod
    def changed(self, stops: Stops) -> Mask:
        """Whether the decision about a unit differs from that of the reference: `[units]`."""

    @abstractmethod
    def place(self, stops: Stops) -> NDArray[np.integer[Any]]:
        """Where arrays `[exits]` hold what belongs to the exit of each row: `[rows]`."""

    @abstractmethod
    def outcome(self, stops: Stops) -> Outcome:
        """What a setting gives."""

    def saved(self, costs: Floats, share: float) -> float:
        """How much less than full depth rows cost, where about a share of the decisions changes.

        Args:
            costs: `[exits]` what a row costs that stops at an exit, as a share of full depth.
            share: of the units whose decision may change.
        """
        saved = []
        changed = []
        for _, stops in self.settings():
            saved.append(1 - np.asarray(costs)[self.place(stops)].mean())
            changed.append(self.changed(stops).mean())
        return mean_saving(np.array(saved), np.array(changed), share)

    def about(self, promise: Promise) -> Mask:
        """Which units a promise is about: `[units]`."""
        return np.ones(len(self), np.bool_)

    def lost(self, promise: Promise, stops: Stops) -> Array:
        """What each unit loses of a promise: `[units]` float64, 1 for a loss and -1 for a gain."""
        return self.changed(stops).astype(np.float64)

    def may_pass(self, promise: Promise, stops: Stops, level: float) -> bool:
        """Whether a promise that is about more than a share of units may hold, too."""
        return True

    @abstractmethod
    def digest(self, unit: int) -> bytes:
        """A hash of the logits of a unit."""

    @abstractmethod
    def lost_in_words(self, promise: Promise, lost: Array, most: int) -> str:
        """What a setting lost of a promise that it does not keep, without a subject.

        Args:
            promise: the promise.
            lost: of the units that tested it.
            most: how many losses would have passed, without gains.
        """

    @abstractmethod
    def needs_in_words(self, bound: Bound, shows_more: bool) -> list[str]:
        """How many units it takes to certify a bound.

        Args:
            bound: the bound.
            shows_more: whether the units are enough, and full depth loses more than is allowed.
        """


class TextEvidence(Evidence[Integers]):
    """Labelled texts, or texts with the decisions of another classifier.

    Args:
        scorer: the metric of the rows, which have the `decision_thresholds` of the bound and, if
            decisions are compared with another classifier than the last exit, their `reference`.
        labels: the labels of the model.
        rule: `confidence` or `entropy`.
        exits: of the model, whose layers an outcome counts; None: a layer between two exits.
    """

    unit = "texts"

    def __init__(
        self,
        scorer: Scorer,
        labels: Sequence[str],
        rule: str = DEFAULT_RULE,
        exits: Exits | None = None,
    ) -> None:
        self._scorer = scorer
        self._rows = scorer.rows
        self._labels = labels
        self._rule = rule
        self._exits = exits or exits_of_rows(scorer.rows)
        self._losses: dict[tuple[str, str | None], Array] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def compares_with_full_depth(self) -> bool:
        """Whether there is no other classifier."""
        return self._rows.reference is None

    def settings(self) -> Iterator[tuple[ExitRule, Integers]]:
        """One list of the rule, see `settings_lists`."""
        full_depth = Budget(exit=self._rows.exits[-1])
        # Without exit 0, the only list is also the last.
        others = settings_lists(self._rows, (self._rule,), (_EXIT_0_POWER,))[-1]
        stop = StopScores(self._rows)
        exits = np.vstack([stop.exits([full_depth]), stop.exits(others)])
        changes = np.append(True, (exits[1:] != exits[:-1]).any(axis=1))
        for setting, stops, differs in zip([full_depth, *others], exits, changes, strict=True):
            if differs:
                yield setting, stops

    def changed(self, stops: Integers) -> Mask:
        """Whether the decision differs: `[rows]`."""
        return np.asarray(self._scorer.changed[self._rows.at(stops)])

    def place(self, stops: Integers) -> NDArray[np.integer[Any]]:
        """Of the exit of each text."""
        return self._exits.place(stops)

    def outcome(self, stops: Integers) -> Outcome:
        """The metric, and the answers that changed."""
        scorer = self._scorer
        score = scorer.score(stops)
        full = scorer.full_depth
        return Outcome(
            metric=scorer.metric,
            score=score,
            full_depth_score=full,
            drop=100 * (full - score),
            interval=drop_interval(scorer, stops),
            mean_depth=float(self._exits.ran(stops).mean()),
            exits=counts(stops, self._exits),
            rows=len(stops),
            exit_0_changed=int(np.count_nonzero(scorer.changed[0] & (stops == 0))),
            relabelled=int(np.count_nonzero(scorer.relabelled[self._rows.at(stops)])),
        )

    def about(self, promise: Promise) -> Mask:
        """All rows; or of a label those that the reference flags, or does not flag."""
        if promise.label is None:
            return super().about(promise)
        _, reference = self._scorer.decisions
        return np.asarray(reference[:, self._number(promise)] == (promise.of == "missed"))

    def lost(self, promise: Promise, stops: Integers) -> Array:
        """What each row loses: `[rows]`."""
        kind = (promise.of, promise.label)
        if kind not in self._losses:
            self._losses[kind] = self._every_loss(promise)
        return np.asarray(self._losses[kind][self._rows.at(stops)])

    def may_pass(self, promise: Promise, stops: Integers, level: float) -> bool:
        """Of a metric that is no mean over rows, whether its own drop is small enough."""
        if promise.of != "drop" or self._scorer.is_row_mean:
            return True
        # A bootstrap alone would take rows without any change for certainty.
        _, high = drop_interval(self._scorer, stops, 1 - 2 * level, _RESAMPLES)
        return high <= promise.at_most

    def digest(self, unit: int) -> bytes:
        """A hash of `[exits, 1, labels]`."""
        return _digest(self._rows.logits[:, unit : unit + 1])

    def lost_in_words(self, promise: Promise, lost: Array, most: int) -> str:
        """Such as `has 15 changed answers in 1829 texts`."""
        what = "losses" if promise.of == "drop" else promise.of.replace("_", " ")
        return f"has {lost.sum():g} {what} in {len(lost)} texts"

    def needs_in_words(self, bound: Bound, shows_more: bool) -> list[str]:
        """See `needs_in_words`, if more texts would help."""
        return ["more texts would hardly help"] if shows_more else needs_in_words(bound)

    def _number(self, promise: Promise) -> int:
        assert promise.label is not None
        return self._labels.index(promise.label)

    def _every_loss(self, promise: Promise) -> Array:
        """What each row loses at each exit: `[exits, rows]`."""
        if promise.of == "drop":
            return observed_losses(self._scorer)
        if promise.label is None:
            return self._scorer.changed.astype(np.float64)
        label = self._number(promise)
        every, reference = self._scorer.decisions
        return np.asarray(every[..., label] != reference[:, label], np.float64)


class QueryEvidence(Evidence[QueryStops]):
    """Queries with documents, whose best ones should stay those of the model that was converted.

    Args:
        rows: the logits.
        errors: see `errors_near_top`.
        top: how many documents are wanted.
    """

    unit = "queries"
    compares_with_full_depth = False

    def __init__(self, rows: QueryLogits, errors: Floats, top: int) -> None:
        self._rows = rows
        self._errors = errors
        self._top = top

    def __len__(self) -> int:
        return len(self._rows)

    def settings(self) -> Iterator[tuple[ExitRule, QueryStops]]:
        """All margins; queries are simulated when a setting is asked for."""
        full_depth = Budget(exit=self._rows.exits.last)
        for setting in (full_depth, *settings(self._errors, self._top, self._rows.exits)):
            yield setting, stops_of(setting, self._rows, self._top)

    def changed(self, stops: QueryStops) -> Mask:
        """Whether the best documents changed: `[queries]`."""
        return stops.changed

    def place(self, stops: QueryStops) -> NDArray[np.integer[Any]]:
        """Of the exit of each document."""
        return self._rows.exits.place(stops.exits)

    def outcome(self, stops: QueryStops) -> Outcome:
        """How many queries changed; `rows` counts queries, and `exits` documents."""
        exits = self._rows.exits
        full_depth = stops_of(Budget(exit=exits.last), self._rows, self._top)
        queries = max(1, len(self))
        changed = int(stops.changed.sum())
        full = 1 - int(full_depth.changed.sum()) / queries
        low, high = share_interval(changed, len(self))
        return Outcome(
            metric=UNCHANGED_TOP,
            score=1 - changed / queries,
            full_depth_score=full,
            drop=100 * (full - 1 + changed / queries),
            interval=(100 * (full - 1 + low), 100 * (full - 1 + high)),
            mean_depth=float(exits.ran(stops.exits).mean()) if len(stops.exits) else 0.0,
            exits=counts(stops.exits, exits),
            rows=len(self),
            relabelled=changed,
        )

    def digest(self, unit: int) -> bytes:
        """A hash of `[exits, documents]`."""
        start, end = self._rows.starts[unit : unit + 2]
        return _digest(self._rows.logits[:, start:end])

    def lost_in_words(self, promise: Promise, lost: Array, most: int) -> str:
        """Such as `changes 31 of 540 queries, and 18 may change`."""
        return f"changes {lost.sum():g} of {len(lost)} queries, and {most} may change"

    def needs_in_words(self, bound: Bound, shows_more: bool) -> list[str]:
        """How many queries are needed."""
        (share,) = bound.shares.values()
        return [_needed(share, bound, self.unit)]


def _digest(logits: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).digest()


def needs_in_words(bound: Bound, what: str = "texts") -> list[str]:
    """How many texts each promise needs, such as `at most 1 % missed of ...: 299 texts are ...`.

    Args:
        bound: what is asked for.
        what: what a promise is about: texts, or queries with their documents.
    """
    rows = {"missed": "flagged texts", "false_alarms": "texts that are not flagged"}
    lines = []
    for of, share in bound.shares.items():
        name = "points of drop" if of == "drop" else f"% {of.replace('_', ' ')}"
        counts = _needed(share, bound, rows.get(of, what))
        lines.append(f"at most {100 * share:g} {name}: {counts}")
    return lines


def _needed(share: float, bound: Bound, what: str) -> str:
    least, good = rows_needed(share, 1 - bound.confidence)
    return f"{least:,} {what} are the least, and {good:,} give a good chance"
