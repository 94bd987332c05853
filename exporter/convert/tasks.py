"""What differs between the two tasks of a conversion, classification and ranking.

A *unit* is what a promise is about: a text, or a query with its documents. It is dealt as a whole.
A *row* is what the model reads: a text, or a query with one of its documents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import ClassVar, Generic

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...calibration.calibrate import calibrate
from ...calibration.goals import Bound, CalibrationOptions
from ...calibration.guarantee import check_possible
from ...calibration.progress import Progress
from ...calibration.ranking import (
    NEAR_TOP,
    Queries,
    QueryLogits,
    RankingPoint,
    calibrate_ranking,
    errors_near_top,
    saved,
)
from ...calibration.result import Calibration, Point, Report
from ...calibration.scoring import AGREEMENT, LabelledLogits, Scorer, mean_saving, same_answers
from ...calibration.settings import StopScores, exits_of, settings_lists
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import FirstStageSpec, ProblemType, Task
from ...runtime.encoding import EncodedRow
from ...runtime.errors import InputError, RowError
from ...runtime.exit_0 import ExitZero
from ...runtime.files import ReadOptions, Row, read_rows
from ...runtime.files.queries import Query, read_queries
from ...runtime.files.rows import encode_labels
from ...runtime.first_stage import FirstStage, features
from ...runtime.predictions import decision_thresholds
from ...runtime.quality import Labels
from ...runtime.rules.measures import Array, Floats, Outputs
from ..model import MultiExitModel
from ..training.bag_of_ngrams import learn
from ..training.examples import Examples
from ..training.trainer import label_losses, probabilities
from .heads import Judged, Lesson
from .options import Chosen, ConvertOptions
from .texts import AnyUnit, Numbers, Texts, split

_SEED = 42
# Above this accuracy, the classifier has probably been trained on these texts.
_TOO_GOOD = 0.98
_TOP = 10
# Documents near the top of a query count so many times as much.
_WEIGHT_NEAR_TOP = 5.0
# The summary says how many queries cannot change if they are more than this share.
_MANY = 0.1
# The signs with which the features of a score rise with the score, see `features`.
_RISING = np.array([1.0, 1.0, -1.0])

Result = Calibration | RankingPoint
Logits = NDArray[np.float32]


class ConversionTask(ABC, Generic[AnyUnit]):
    """A task, with the texts that are given for it.

    Args:
        source: the file of texts.
        options: the settings.

    Attributes:
        options: the settings.
        bound: what is promised.
        texts: the units and their parts.
        rows: the rows of all units.
        warnings: what makes the result less useful.

    Raises:
        InputError: a setting belongs to the other task, or the texts cannot be dealt.
        RowError: a row cannot be read.
    """

    what: ClassVar[str]
    """What messages call the units."""
    usual_share: ClassVar[float]
    """Of the units may change, if nothing else is asked for."""
    two_lists: ClassVar[bool]
    """Whether settings with exit 0 are a second list that is tested."""
    fewest_tokens: ClassVar[int]
    """Of a row whose tokens do not all teach heads, because there are too many of them."""

    def __init__(self, source: str | Path, options: ConvertOptions) -> None:
        self.options = options
        self.bound = options.bound or Bound(changed_answers=self.usual_share)
        self.warnings: list[str] = []
        self._check_options()
        others = options.train_texts
        train = None if others is None else self._read(others)
        self.texts: Texts[AnyUnit] = split(
            self._read(source), options.group_column, train, self.what
        )
        every = [self._rows_of(unit) for unit in self.texts.units]
        self.rows = [row for rows in every for row in rows]
        self._starts = np.cumsum([0, *map(len, every)])

    def numbers(self, units: Numbers) -> Numbers:
        """The numbers of the rows of some units, one unit after another."""
        first = self._starts[:-1][units]
        lengths = self.lengths(units)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows: Numbers = np.repeat(first, lengths) + within
        return rows

    def lengths(self, units: Numbers) -> Numbers:
        """How many rows each of some units has."""
        return np.asarray(np.diff(self._starts)[units], np.intp)

    @property
    @abstractmethod
    def needed(self) -> Numbers:
        """The rows that are classified even if no head learns from them."""

    @abstractmethod
    def check_possible(self, task: Task, logits: Logits) -> None:
        """Refuse, before anything is trained, what cannot be certified even if nothing changes.

        Args:
            task: of the model.
            logits: `[rows, labels]` of the classifier for all rows.

        Raises:
            InputError: no unit that certifies can change, or a promise is about too few texts.
        """

    @abstractmethod
    def lesson(self, task: Task, logits: Logits, numbers: Numbers) -> Lesson:
        """What heads learn from some rows, all those of a unit one after another.

        Args:
            task: of the model.
            logits: `[rows, labels]` of the classifier for all rows.
            numbers: of the rows that they learn from.
        """

    @abstractmethod
    def judge(
        self,
        task: Task,
        reference: Logits,
        numbers: Numbers,
        exits: Logits,
        costs: NDArray[np.float64],
    ) -> Judged:
        """Judge early exits by rows that did not train them.

        Args:
            task: of the model.
            reference: `[rows, labels]` the logits of the classifier for all rows.
            numbers: of the rows that judge.
            exits: `[exits, numbers, labels]` the logits of the exits for these rows.
            costs: `[exits + 1]` of the exits and of full depth.
        """

    @abstractmethod
    def exit_0(
        self,
        task: Task,
        rows: Sequence[EncodedRow],
        logits: Logits,
        model: MultiExitModel,
        progress: Progress,
    ) -> ExitZero | FirstStage | None:
        """Train exit 0; None if the model gets none.

        Args:
            task: of the model.
            rows: all rows.
            logits: `[rows, labels]` of the classifier.
            model: whose task and vocabulary it gets.
            progress: called with (what, done, total).
        """

    @abstractmethod
    def certify(
        self, engines: Path, target: str, logits: Logits, chosen: Chosen, progress: Progress
    ) -> Result:
        """Certify and report on a target of an engines folder.

        Args:
            engines: the folder, whose manifest gets the operating point.
            target: the target.
            logits: `[rows, labels]` of the classifier.
            chosen: the heads of the early exits.
            progress: called with (what, done, total).
        """

    def traffic(self, result: Result) -> float | None:
        """See `Conversion.traffic`, for the result of the default target."""
        return None

    def accuracy(self, task: Task, logits: Logits, result: Result) -> tuple[float, float] | None:
        """See `Conversion.accuracy`, for the result of the default target."""
        return None

    @abstractmethod
    def _check_options(self) -> None:
        """Refuse settings that belong to the other task."""

    @abstractmethod
    def _read(self, source: str | Path) -> Iterator[AnyUnit]: ...

    @abstractmethod
    def _rows_of(self, unit: AnyUnit) -> Sequence[Row]: ...


class Classification(ConversionTask[Row]):
    """Texts, and a classifier that decides about each of them."""

    what = "texts"
    usual_share = 0.01
    two_lists = True
    fewest_tokens = 32

    @property
    def needed(self) -> Numbers:
        """All rows, because exit 0 learns from all that train."""
        return np.arange(len(self.rows))

    def check_possible(self, task: Task, logits: Logits) -> None:
        """All decisions are the same, or a promise is about too few texts."""
        check_possible(self.bound, task, logits[self.texts.calibrate])

    def lesson(self, task: Task, logits: Logits, numbers: Numbers) -> Lesson:
        """The probabilities of the classifier."""
        return Lesson(
            targets=probabilities(torch.from_numpy(logits[numbers]), task.problem_type),
            weights=torch.ones(len(numbers)),
            loss=partial(label_losses, problem_type=task.problem_type),
        )

    def judge(
        self,
        task: Task,
        reference: Logits,
        numbers: Numbers,
        exits: Logits,
        costs: NDArray[np.float64],
    ) -> Judged:
        """By how much is saved where about as many decisions change as may."""
        own = reference[numbers]
        rows = LabelledLogits(
            np.concatenate([exits, own[None]]),
            np.ones(len(numbers), np.intp),
            None,
            task.problem_type,
            decision_thresholds=decision_thresholds(task, self.bound.thresholds),
        )
        scorer = Scorer(rows, AGREEMENT)
        share = min(self.bound.shares.values())
        agreement = tuple(float(share) for share in 1 - scorer.changed[:-1].mean(axis=1))
        return Judged(agreement, _saved(scorer, costs, share))

    def exit_0(
        self,
        task: Task,
        rows: Sequence[EncodedRow],
        logits: Logits,
        model: MultiExitModel,
        progress: Progress,
    ) -> ExitZero:
        """A bag of n-grams that learns the probabilities of the classifier."""
        targets = probabilities(torch.from_numpy(logits), task.problem_type).numpy()
        train, choose = (
            Examples([rows[n] for n in numbers], targets[numbers])
            for numbers in (self.texts.train, self.texts.choose)
        )
        return learn(train, choose, model, _SEED, progress)

    def certify(
        self, engines: Path, target: str, logits: Logits, chosen: Chosen, progress: Progress
    ) -> Calibration:
        """A calibration for the bound, with the decisions of the classifier as reference."""
        texts = self.texts
        certifying = [texts.units[number] for number in texts.calibrate]
        reported = [texts.units[number] for number in texts.report]
        options = CalibrationOptions(
            goals={self.bound.point: self.bound},
            metric=AGREEMENT,
            target=target,
            threads=self.options.threads,
        )
        return calibrate(
            engines,
            certifying,
            options,
            progress,
            reference=logits[texts.calibrate],
            report=Report(reported, "texts that decided nothing", logits[texts.report]),
        )

    def traffic(self, result: Result) -> float:
        """The share of changed decisions, where a text counts as often as it occurs."""
        scorer, at = _decided(result)
        return float(np.average(scorer.changed[at], weights=self.texts.weights[self.texts.report]))

    def accuracy(self, task: Task, logits: Logits, result: Result) -> tuple[float, float] | None:
        """Before and after, on the texts of the report, if all texts have labels."""
        expected = self._labels(task)
        if expected is None:
            return None
        own = logits[: len(self.texts.own)]
        of_classifier = Outputs(own, task.problem_type, task.label_thresholds).answers
        right = same_answers(of_classifier, expected, task.problem_type)
        if right.mean() > _TOO_GOOD:
            self.warnings.append(
                f"the classifier is right on {right.mean():.1%} of these texts: if it was "
                "trained on them, the guarantee does not hold for new texts"
            )
        report = self.texts.report
        scorer, at = _decided(result)
        converted = same_answers(scorer.answers[at], expected[report], task.problem_type)
        return float(right[report].mean()), float(converted.mean())

    def _labels(self, task: Task) -> Labels | None:
        """The labels of all texts; None if some have none, or one that the classifier lacks."""
        rows = self.texts.own
        given = [row.labels for row in rows if row.labels is not None]
        if len(given) < len(rows):
            if given:
                known = f"{len(given):,} of {len(rows):,}"
                self.warnings.append(f"accuracy is not known: only {known} texts have a label")
            return None
        try:
            places = [row.where for row in rows]
            return encode_labels(given, task.labels, task.problem_type, places)
        except RowError as error:
            self.warnings.append(f"accuracy is not known: {error.message}")
            return None

    def _check_options(self) -> None:
        if self.options.top is not None:
            raise InputError(
                "`top` is given, but the model classifies texts and ranks nothing",
                "leave out `top`, or give a reranker",
            )

    def _read(self, source: str | Path) -> Iterator[Row]:
        return read_rows(source, self.options.reading)

    def _rows_of(self, unit: Row) -> Sequence[Row]:
        return [unit]


class Ranking(ConversionTask[Query]):
    """Queries with documents, and a reranker that scores each pair.

    Attributes:
        top: how many of the best documents of a query are promised.
        has_scores: whether all queries have the scores of a search.
    """

    what = "queries"
    usual_share = 0.05
    two_lists = False
    # Heads look for the tokens of a document that answer a query, so a sample would mislead them.
    fewest_tokens = 512

    def __init__(self, source: str | Path, options: ConvertOptions) -> None:
        self.top = options.top or _TOP
        self._without_documents = 0
        super().__init__(source, options)
        if self._without_documents:
            self.warnings.append(f"{self._without_documents:,} queries have no documents")
        units = self.texts.units
        scored = sum(unit.scores is not None for unit in units)
        self.has_scores = scored == len(units)
        if scored and not self.has_scores:
            self.warnings.append(
                f"only {scored:,} of {len(units):,} queries have scores, so they are passed over"
            )
        counts = self.lengths(self.texts.calibrate)
        fixed = int((counts <= self.top).sum())
        short = f"{fixed:,} of {len(counts):,} queries that certify have no more than {self.top}"
        if fixed == len(counts):
            raise InputError(
                f"{short} documents, so nothing can leave early", "give a smaller `top`"
            )
        if fixed > _MANY * len(counts):
            self.warnings.append(
                f"{short} documents, so their best {self.top} cannot change, and the others may "
                "change more often than is promised of all"
            )

    @property
    def needed(self) -> Numbers:
        """The rows of queries that certify or are reported on."""
        return self.numbers(np.concatenate([self.texts.calibrate, self.texts.report]))

    def check_possible(self, task: Task, logits: Logits) -> None:
        """Nothing is left to check: the numbers of documents are known before."""

    def lesson(self, task: Task, logits: Logits, numbers: Numbers) -> Lesson:
        """The standardised logits of the reranker; documents near the top count more."""
        own = logits[numbers, 0]
        weights = np.ones(len(own), np.float32)
        for start, end in pairwise(self._starts_among(numbers)):
            near = np.argsort(-own[start:end])[: NEAR_TOP * self.top]
            weights[start + near] = _WEIGHT_NEAR_TOP
        mean = float(own.mean())
        deviation = max(float(own.std()), 1e-6)
        return Lesson(
            targets=torch.from_numpy((own[:, None] - mean) / deviation),
            weights=torch.from_numpy(weights),
            loss=_distance,
            mean=mean,
            deviation=deviation,
        )

    def judge(
        self,
        task: Task,
        reference: Logits,
        numbers: Numbers,
        exits: Logits,
        costs: NDArray[np.float64],
    ) -> Judged:
        """By how much is saved where the best of about as many queries change as may."""
        own = reference[numbers, 0]
        logits = np.concatenate([exits[..., 0], own[None]])
        rows = QueryLogits(logits, self._starts_among(numbers), own)
        errors = errors_near_top(rows, self.top)
        share = min(self.bound.shares.values())
        return Judged(
            agreement=tuple(_rank_correlation(each, own) for each in exits[..., 0]),
            saved=saved(rows, errors, self.top, share, costs),
            errors=tuple(map(float, errors)),
        )

    def exit_0(
        self,
        task: Task,
        rows: Sequence[EncodedRow],
        logits: Logits,
        model: MultiExitModel,
        progress: Progress,
    ) -> FirstStage | None:
        """Least squares on the features of scores; n-grams cannot compare two texts.

        A better score never predicts less, so the order of documents that a deadline stops before
        layer 1 is that of their scores.
        """
        if not self.has_scores:
            return None
        progress("exit 0", 0, 1)
        train = self._that_ran(self.texts.train, logits)
        queries = self._queries(train, logits)
        known = np.concatenate([features(query.scores or ()) for query in queries.queries])
        lesson = self.lesson(task, logits, self.numbers(train))
        of_features, bias = _rising(known, queries.reference, lesson.weights.numpy())
        spec = {"weights": of_features, "bias": bias}
        return FirstStage(msgspec.convert(spec, FirstStageSpec))

    def certify(
        self, engines: Path, target: str, logits: Logits, chosen: Chosen, progress: Progress
    ) -> RankingPoint:
        """A calibration for the bound, with the ranking of the reranker as reference."""
        return calibrate_ranking(
            engines,
            target,
            self._queries(self.texts.calibrate, logits),
            self._queries(self.texts.report, logits),
            self._errors(EnginesFolder.read(engines).manifest.first_stage, logits, chosen),
            self.top,
            self.bound,
            self.options.threads,
            progress,
        )

    def _errors(self, first_stage: FirstStageSpec | None, logits: Logits, chosen: Chosen) -> Array:
        """The errors of all early exits, see `errors_near_top`; exit 0 has not seen these queries.

        Args:
            first_stage: exit 0; None: there is none.
            logits: `[rows, labels]` of the reranker for all rows.
            chosen: the heads of the other exits.
        """
        errors = np.array(chosen.errors)
        if first_stage is None:
            return errors
        queries = self._queries(self._that_ran(self.texts.choose, logits), logits)
        both = np.stack([queries.predicted(FirstStage(first_stage)), queries.reference])
        rows = QueryLogits(both, queries.starts, queries.reference, first_exit=0)
        return np.append(errors_near_top(rows, self.top), errors)

    def _that_ran(self, numbers: Numbers, logits: Logits) -> Numbers:
        """Those of some queries that have logits; others were left out for lack of space."""
        ran: Numbers = numbers[np.isfinite(logits[self._starts[numbers], 0])]
        return ran

    def _queries(self, numbers: Numbers, logits: Logits) -> Queries:
        """Some queries, with what the reranker says of their documents."""
        queries = [self.texts.units[number] for number in numbers]
        return Queries(queries, logits[self.numbers(numbers), 0])

    def _starts_among(self, numbers: Numbers) -> Numbers:
        """`[queries + 1]` where the rows of each query begin among those of whole queries."""
        queries = np.searchsorted(self._starts, numbers, side="right")
        return np.flatnonzero(np.diff(queries, prepend=-1, append=-1))

    def _check_options(self) -> None:
        options = self.options
        only = "bound `changed_answers` alone"
        if self.bound.thresholds or set(self.bound.shares) != {"changed_answers"}:
            raise InputError("missed texts and false alarms are not about rankings", only)
        if options.group_column is not None:
            raise InputError(
                "the documents of a query belong together, and queries have no other groups",
                "leave out `group_column`",
            )
        if options.reading != ReadOptions():
            raise InputError(
                "queries have the fields query, documents and scores", "leave out `text_column`"
            )

    def _read(self, source: str | Path) -> Iterator[Query]:
        for query in read_queries(source):
            if query.documents:
                yield query
            else:
                self._without_documents += 1

    def _rows_of(self, unit: Query) -> Sequence[Row]:
        return [Row(text, document, where=unit.where) for text, document in unit.pairs]


TASKS: dict[ProblemType, type[Classification] | type[Ranking]] = {
    ProblemType.SINGLE_LABEL: Classification,
    ProblemType.MULTI_LABEL: Classification,
    ProblemType.RANKING: Ranking,
}


def point_of(result: Result) -> Point | RankingPoint:
    """The operating point of a target, which a conversion has one of."""
    return result.points[0] if isinstance(result, Calibration) else result


def _saved(scorer: Scorer, costs: NDArray[np.float64], share: float) -> float:
    """How much less than full depth rows cost, where about that share of decisions changes."""
    rows = scorer.rows
    places = rows.at(StopScores(rows).exits(settings_lists(rows)[0]))
    changed = scorer.changed[places].mean(axis=1)
    return mean_saving(1 - costs[places[0]].mean(axis=1), changed, share)


def _decided(result: Result) -> tuple[Scorer, tuple[NDArray[np.intp], ...]]:
    """The texts of a report, and the places of their exits."""
    assert isinstance(result, Calibration)
    assert result.test is not None
    scorer = Scorer(result.test, AGREEMENT)
    return scorer, result.test.at(exits_of(result.points[0].rule, result.test))


def _rising(known: Array, targets: Floats, weights: Floats) -> tuple[list[float], float]:
    """Weighted least squares with weights of features that never fall when the score rises.

    The best solution under this condition is the free one of some of the features, with 0 for the
    others; so all choices of features are tried.

    Args:
        known: `[documents, features]`, see `features`.
        targets: `[documents]` logits.
        weights: `[documents]` how much each document counts.

    Returns:
        The weights of the features, and the bias.
    """
    roots = np.sqrt(weights)
    least = math.inf
    best = np.zeros(len(_RISING) + 1)
    for chosen in product((False, True), repeat=len(_RISING)):
        columns = np.array([*chosen, True])
        inputs = np.column_stack([known, np.ones(len(known))])[:, columns] * roots[:, None]
        solution = np.linalg.lstsq(inputs, targets * roots)[0]
        error = float(np.square(inputs @ solution - targets * roots).sum())
        if error < least and (solution[:-1] * _RISING[np.array(chosen)] >= 0).all():
            least = error
            best[:] = 0.0
            best[columns] = solution
    return best[:-1].tolist(), float(best[-1])


def _distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """The smooth L1 distance `[rows]` of `[rows, 1]`."""
    return functional.smooth_l1_loss(outputs, targets, reduction="none")[:, 0]


def _rank_correlation(some: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Spearman's correlation of two numbers of each row."""
    return float(np.corrcoef(_ranks(some), _ranks(others))[0, 1])


def _ranks(numbers: NDArray[np.float32]) -> NDArray[np.float64]:
    """The place of each number among all of them in ascending order."""
    return np.argsort(np.argsort(numbers, kind="stable")).astype(np.float64)
