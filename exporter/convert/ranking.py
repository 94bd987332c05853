"""The conversion of a reranker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...calibration.evidence import QueryEvidence
from ...calibration.progress import Progress
from ...calibration.query_logits import NEAR_TOP, QueryLogits, errors_near_top
from ...calibration.ranking import Queries, RankingPoint, calibrate_ranking, traced_queries
from ...calibration.trace import engines_of
from ...runtime.artifact.exits import Exits, exits_of
from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import FirstStageSpec, Task
from ...runtime.check import BATCH_LIMIT
from ...runtime.encoding import EncodedRow, Text
from ...runtime.engine import Engine
from ...runtime.errors import InputError
from ...runtime.files import ReadOptions, Row
from ...runtime.files.queries import Query, read_queries
from ...runtime.first_stage import FirstStage, features
from ...runtime.rules.measures import Array, Floats
from ..model import MultiExitModel
from .heads import Judged, Lesson
from .options import ConvertOptions
from .task import ConversionTask, Logits, Passes, Uncertified
from .texts import Numbers

_TOP = 10
# Documents near the top of a query count so many times as much.
_WEIGHT_NEAR_TOP = 5.0
# The summary says how many queries cannot change if they are more than this share.
_MANY = 0.1
# The signs with which the features of a score rise with the score, see `features`.
_RISING = np.array([1.0, 1.0, -1.0])


class Ranking(ConversionTask[Query, RankingPoint]):
    """Queries with documents, and a reranker that scores each pair.

    Attributes:
        top: how many of the best documents of a query are promised.
        has_scores: whether all queries have the scores of a search.
    """

    what = "queries"
    results = "rankings"
    usual_share = 0.05
    # Heads look for the tokens of a document that answer a query, so a sample would mislead them.
    fewest_tokens = 512
    learns_from_altered = False

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
        """Nothing is refused, but a ranking that rounding changes is named."""
        close = 0
        calibrate = self.texts.calibrate
        for unit in calibrate:
            scores = np.sort(logits[self.numbers(np.array([unit])), 0])[::-1]
            if len(scores) <= self.top:
                continue
            last, next_one = scores[self.top - 1 : self.top + 1]
            # Both may move.
            rounding = 2 * BATCH_LIMIT * max(1.0, abs(last), abs(next_one))
            close += last - next_one <= rounding
        share = close / len(calibrate)
        if share > self.bound.shares["changed_answers"]:
            self.warnings.append(
                f"the ranking is not stable to begin with: in {share:.0%} of the queries that "
                f"certify, the scores of the documents at place {self.top} and after it differ by "
                "no more than rounding"
            )

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
        rows = QueryLogits(logits, self._starts_among(numbers), own, Exits.numbered(1, len(logits)))
        errors = errors_near_top(rows, self.top)
        share = min(self.bound.shares.values())
        return Judged(
            agreement=tuple(_rank_correlation(each, own) for each in exits[..., 0]),
            saved=QueryEvidence(rows, errors, self.top).saved(costs / costs[-1], share),
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

    def judges(self, uncertified: Uncertified) -> list[Text]:
        """The queries that chose the heads, with each of their documents."""
        queries = self._choosing(uncertified.logits).queries
        return [pair for query in queries for pair in query.pairs]

    def savings(
        self, uncertified: Uncertified, engine: Engine, quick: Engine | None, progress: Progress
    ) -> Callable[[NDArray[np.float64]], float]:
        """See `ConversionTask.savings`."""
        queries = self._choosing(uncertified.logits)
        rows = traced_queries(engine, queries, uncertified.engines, progress, quick)
        if quick is not None:
            errors = errors_near_top(rows, self.top)
        else:
            errors = self._errors_in_one_pass(uncertified)
        share = min(self.bound.shares.values())
        return partial(QueryEvidence(rows, errors, self.top).saved, share=share)

    def certify(
        self, uncertified: Uncertified, passes: Passes, name: str, progress: Progress
    ) -> RankingPoint:
        """A calibration for the bound, with the ranking of the reranker as reference."""
        logits = uncertified.logits
        return calibrate_ranking(
            uncertified.engines,
            passes.exact,
            self._queries(self.texts.calibrate, logits),
            self._queries(self.texts.report, logits),
            self._errors(uncertified, passes, progress),
            self.top,
            self.bound,
            self.options.threads,
            progress,
            name,
            passes.quick,
        )

    def _choosing(self, logits: Logits) -> Queries:
        """The queries that chose the heads."""
        return self._queries(self._that_ran(self.texts.choose, logits), logits)

    def _errors(self, uncertified: Uncertified, passes: Passes, progress: Progress) -> Array:
        """The errors of all exits but the last, see `errors_near_top`.

        Nobody has seen yet what a quick pass makes of the queries that chose the heads. The
        arguments are those of `certify`.
        """
        if not passes.quick:
            return self._errors_in_one_pass(uncertified)
        engines = uncertified.engines
        queries = self._choosing(uncertified.logits)
        with engines_of(engines, *passes, self.options.threads) as (engine, quick):
            rows = traced_queries(engine, queries, engines, progress, quick)
        return errors_near_top(rows, self.top)

    def _errors_in_one_pass(self, uncertified: Uncertified) -> Array:
        """The errors with which the heads were chosen, after that of exit 0 on the same queries.

        Exit 0 has not seen these queries.
        """
        manifest = read_manifest(uncertified.engines)
        errors = np.array(uncertified.chosen.errors)
        for _ in exits_of(manifest).before_layers:
            assert manifest.first_stage is not None
            queries = self._choosing(uncertified.logits)
            predicted = queries.predicted(FirstStage(manifest.first_stage))
            both = np.stack([predicted, queries.reference])
            near = QueryLogits(both, queries.starts, queries.reference, Exits.numbered(0, 2))
            errors = np.append(errors_near_top(near, self.top), errors)
        return errors

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
