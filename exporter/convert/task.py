"""What a conversion asks of its task; `classification` and `ranking` are the tasks.

A *unit* is what a promise is about: a text, or a query with its documents. It is dealt as a whole.
A *row* is what the model reads: a text, or a query with one of its documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...calibration.goals import Bound, CalibrationOptions
from ...calibration.progress import Progress
from ...calibration.ranking import RankingPoint
from ...calibration.result import Calibration
from ...calibration.timing import relative_costs
from ...calibration.trace import engines_of
from ...runtime.artifact.manifest import Task
from ...runtime.encoding import EncodedRow, Text
from ...runtime.engine import Engine
from ...runtime.exit_0 import ExitZero
from ...runtime.files import Row
from ...runtime.first_stage import FirstStage
from ..model import MultiExitModel
from .heads import Judged, Lesson
from .options import Chosen, ConvertOptions
from .texts import AnyUnit, Numbers, Texts, split

AnyResult = TypeVar("AnyResult", bound=Calibration | RankingPoint)
"""The operating points of a target."""
Logits = NDArray[np.float32]


class Passes(NamedTuple):
    """The passes that rows take.

    Attributes:
        exact: the target that a promise is about.
        quick: the target of the quick pass, or empty without one.
    """

    exact: str
    quick: str = ""


@dataclass(frozen=True)
class Uncertified:
    """What has been converted, and is to be certified.

    Attributes:
        engines: the engines folder, whose manifest gets the operating points.
        logits: `[rows, labels]` float32, those of the classifier for all rows.
        chosen: the heads of the early exits.
    """

    engines: Path
    logits: Logits
    chosen: Chosen


class ConversionTask(ABC, Generic[AnyUnit, AnyResult]):
    """A task, with the texts that are given for it.

    Args:
        source: the file of texts.
        options: the settings.

    Attributes:
        options: the settings.
        bound: what is promised of each target.
        texts: the units and their parts.
        rows: the rows of all units.
        warnings: what makes the result less useful.

    Raises:
        InputError: a setting belongs to the other task, or the texts cannot be dealt.
        RowError: a row cannot be read.
    """

    what: ClassVar[str]
    """What messages call the units."""
    results: ClassVar[str]
    """The field of `Conversion` for their results."""
    usual_share: ClassVar[float]
    """Of the units may change, if nothing else is asked for."""
    fewest_tokens: ClassVar[int]
    """Of a row whose tokens do not all teach heads, because there are too many of them."""
    learns_from_altered: ClassVar[bool]
    """Whether exits also learn from altered rows, which come after all others."""

    def __init__(self, source: str | Path, options: ConvertOptions) -> None:
        self.options = options
        self.bound = options.bound or Bound(
            confidence=options.confidence, changed_answers=self.usual_share
        )
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
            rows: all rows, altered ones last.
            logits: `[rows, labels]` of the classifier.
            model: whose task and vocabulary it gets.
            progress: called with (what, done, total).
        """

    @abstractmethod
    def certify(
        self, uncertified: Uncertified, passes: Passes, name: str, progress: Progress
    ) -> AnyResult:
        """Certify and report on a target, and write its operating point.

        Args:
            uncertified: what has been converted.
            passes: the target, and that of its quick pass.
            name: of the operating point.
            progress: called with (what, done, total).
        """

    def saved(
        self, uncertified: Uncertified, ways: Sequence[Passes], progress: Progress
    ) -> list[float]:
        """The share of the time of full depth that each way saves, where as much changes as may.

        It is judged by units that chose the heads, so that no unit that certifies chooses anything.

        Args:
            uncertified: what has been converted.
            ways: the target alone, and with quick passes.
            progress: called with (what, done, total).
        """
        folder = uncertified.engines
        with ExitStack() as stack:
            opened = [
                stack.enter_context(engines_of(folder, *way, self.options.threads)) for way in ways
            ]
            savings = [self.savings(uncertified, *both, progress) for both in opened]
            engines = [engine for engine, _ in opened]
            lengths = np.array(
                [len(row) for row in engines[0].core.encode(self.judges(uncertified))]
            )
            costs = relative_costs(engines, lengths, CalibrationOptions.batch_size, progress)
        return [saving(of_way) for saving, of_way in zip(savings, costs, strict=True)]

    @abstractmethod
    def judges(self, uncertified: Uncertified) -> list[Text]:
        """The rows that judge what is saved."""

    @abstractmethod
    def savings(
        self, uncertified: Uncertified, engine: Engine, quick: Engine | None, progress: Progress
    ) -> Callable[[NDArray[np.float64]], float]:
        """What is saved by the costs `[exits]` of a row that stops at each exit, see `saved`.

        Args:
            uncertified: what has been converted.
            engine: the engine of the target.
            quick: that of its quick pass, or None.
            progress: called with (what, done, total).
        """

    def traffic(self, result: AnyResult) -> float | None:
        """See `Conversion.traffic`, for the result of the default target."""
        return None

    def accuracy(self, task: Task, logits: Logits, result: AnyResult) -> tuple[float, float] | None:
        """See `Conversion.accuracy`, for the result of the default target."""
        return None

    @abstractmethod
    def _check_options(self) -> None:
        """Refuse settings that belong to the other task."""

    @abstractmethod
    def _read(self, source: str | Path) -> Iterator[AnyUnit]: ...

    @abstractmethod
    def _rows_of(self, unit: AnyUnit) -> Sequence[Row]: ...
