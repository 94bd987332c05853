"""The conversion of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...calibration.calibrate import calibrate
from ...calibration.evidence import TextEvidence
from ...calibration.goals import CalibrationOptions
from ...calibration.guarantee import check_possible
from ...calibration.progress import Progress
from ...calibration.result import Calibration, Report
from ...calibration.scoring import AGREEMENT, LabelledLogits, Scorer
from ...calibration.settings import exits_of
from ...calibration.trace import CALIBRATION, trace_rows
from ...runtime.artifact.manifest import Task
from ...runtime.encoding import EncodedRow, Text
from ...runtime.engine import Engine
from ...runtime.errors import InputError, RowError
from ...runtime.exit_0 import ExitZero
from ...runtime.files import Row
from ...runtime.quality import Labels
from ...runtime.tasks import task_of
from ..model import MultiExitModel
from ..training.bag_of_ngrams import learn
from ..training.examples import Examples
from ..training.trainer import label_losses, probabilities
from .heads import PASSES, Judged, Lesson
from .options import ConvertOptions
from .task import ConversionTask, Logits, Passes, Uncertified
from .texts import Numbers, read_texts

_SEED = 42
# Above this accuracy, the classifier has probably been trained on these texts.
_TOO_GOOD = 0.98


class Classification(ConversionTask[Row, Calibration]):
    """Texts, and a classifier that decides about each of them."""

    what = "texts"
    results = "targets"
    usual_share = 0.01
    fewest_tokens = 32
    learns_from_altered = True

    def __init__(self, source: str | Path, options: ConvertOptions) -> None:
        super().__init__(source, options)
        if options.group_column is not None:
            self.warnings.append("what is promised is about one text of each new group")

    @property
    def needed(self) -> Numbers:
        """All rows, because exit 0 learns from all that train."""
        return np.arange(len(self.rows))

    def check_possible(self, task: Task, logits: Logits) -> None:
        """All decisions are the same, or a promise is about too few texts."""
        check_possible(self.bound, task, logits[self.texts.calibrate])

    def lesson(self, task: Task, logits: Logits, numbers: Numbers) -> Lesson:
        """The probabilities of the classifier; altered rows add no steps of training."""
        own = np.count_nonzero(numbers < len(self.rows))
        return Lesson(
            targets=probabilities(torch.from_numpy(logits[numbers]), task.problem_type),
            weights=torch.ones(len(numbers)),
            loss=partial(label_losses, problem_type=task.problem_type),
            passes=PASSES * own / len(numbers),
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
            decision_thresholds=task_of(task).decision_thresholds(self.bound.thresholds),
        )
        scorer = Scorer(rows, AGREEMENT)
        share = min(self.bound.shares.values())
        agreement = tuple(float(share) for share in 1 - scorer.changed[:-1].mean(axis=1))
        return Judged(agreement, TextEvidence(scorer, task.labels).saved(costs, share))

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
        altered = np.arange(len(self.rows), len(rows))
        train, choose = (
            Examples([rows[n] for n in numbers], targets[numbers])
            for numbers in (np.concatenate([self.texts.train, altered]), self.texts.choose)
        )
        return learn(train, choose, model, _SEED, progress)

    def judges(self, uncertified: Uncertified) -> list[Text]:
        """The texts that chose the heads."""
        return [self.texts.units[number].content for number in self.texts.choose]

    def savings(
        self, uncertified: Uncertified, engine: Engine, quick: Engine | None, progress: Progress
    ) -> Callable[[NDArray[np.float64]], float]:
        """See `ConversionTask.savings`."""
        choose = self.texts.choose
        units = [self.texts.units[number] for number in choose]
        kept = uncertified.engines / CALIBRATION
        traced = trace_rows(engine, units, kept, False, progress, quick)
        thresholds = engine.core.task.decision_thresholds(self.bound.thresholds)
        reference = uncertified.logits[choose]
        rows = replace(traced, decision_thresholds=thresholds, reference=reference)
        share = min(self.bound.shares.values())
        evidence = TextEvidence(Scorer(rows, AGREEMENT), engine.labels)
        return partial(evidence.saved, share=share)

    def certify(
        self, uncertified: Uncertified, passes: Passes, name: str, progress: Progress
    ) -> Calibration:
        """A calibration for the bound, with the decisions of the classifier as reference."""
        texts = self.texts
        logits = uncertified.logits
        certifying = [texts.units[number] for number in texts.calibrate]
        reported = [texts.units[number] for number in texts.report]
        options = CalibrationOptions(
            goals={name: self.bound},
            metric=AGREEMENT,
            target=passes.exact,
            quick_target=passes.quick or None,
            threads=self.options.threads,
        )
        return calibrate(
            uncertified.engines,
            certifying,
            options,
            progress,
            reference=logits[texts.calibrate],
            report=Report(reported, "texts that decided nothing", logits[texts.report]),
        )

    def traffic(self, result: Calibration) -> float:
        """The share of changed decisions, where a text counts as often as it occurs."""
        scorer, at = _decided(result)
        return float(np.average(scorer.changed[at], weights=self.texts.weights[self.texts.report]))

    def accuracy(
        self, task: Task, logits: Logits, result: Calibration
    ) -> tuple[float, float] | None:
        """Before and after, on the texts of the report, if all texts have labels."""
        expected = self._labels(task)
        if expected is None:
            return None
        own = logits[: len(self.texts.own)]
        kind = task_of(task)
        right = kind.same(kind.outputs(own).answers, expected)
        if right.mean() > _TOO_GOOD:
            self.warnings.append(
                f"the classifier is right on {right.mean():.1%} of these texts: if it was "
                "trained on them, the guarantee does not hold for new texts"
            )
        report = self.texts.report
        scorer, at = _decided(result)
        converted = kind.same(scorer.answers[at], expected[report])
        return float(right[report].mean()), float(converted.mean())

    def _labels(self, task: Task) -> Labels | None:
        """The labels of all texts; None if some have none, or one that the classifier lacks."""
        rows = self.texts.own
        labels = [row.labels for row in rows if row.labels is not None]
        if len(labels) < len(rows):
            if labels:
                known = f"{len(labels):,} of {len(rows):,}"
                self.warnings.append(f"accuracy is not known: only {known} texts have a label")
            return None
        try:
            places = [row.where for row in rows]
            return task_of(task).encode(labels, places)
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
        return read_texts(source, self.options.reading, self.options.group_column)

    def _rows_of(self, unit: Row) -> Sequence[Row]:
        return [unit]


def _decided(result: Calibration) -> tuple[Scorer, tuple[NDArray[np.intp], ...]]:
    """The texts of a report, and the places of their exits."""
    assert result.test is not None
    scorer = Scorer(result.test, AGREEMENT)
    return scorer, result.test.at(exits_of(result.points[0].rule, result.test))
