"""What a conversion is asked for, and what it found. Needs no torch: the command starts fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...calibration.goals import Bound
from ...calibration.ranking import RankingPoint
from ...calibration.result import Calibration
from ...runtime.artifact.manifest import ProblemType
from ...runtime.errors import BackendError, InputError, whole_number
from ...runtime.files import ReadOptions
from ...runtime.targets import MOST_THREADS
from ..exit_config import Pooling


@dataclass(frozen=True)
class ConvertOptions:
    """The settings of a conversion.

    Attributes:
        bound: what is promised on new texts, against the decisions of the classifier. None: at most
            1 % of the decisions change; of a reranker, the best documents of at most 5 % of the
            queries.
        top: how many of the best documents a reranker promises; None: 10. Not for classifiers.
        train_texts: a file of other texts, from which the exits learn; then all texts certify or
            are reported on. The classifier may have been trained on them. Those that are among the
            texts, too, are left out. A reranker needs queries.
        adapter: the folder of a PEFT adapter, which is merged into the classifier.
        int8: also build the targets in int8 that this machine can, whose ranges come from texts
            that train. A target has one of them as its quick pass where that takes less time, as
            texts show that do not certify. Where int8 cannot be built, a warning says why.
        problem_type: the task, if the classifier does not name it.
        max_length: longest sequence in tokens, special tokens included; None: the longest that
            tokenizer and classifier take.
        group_column: the field that names the group of a row, such as its dialogue. Groups stay
            together, and one text of each certifies.
        threads: CPU threads, at most 1024; None: all cores.
        reading: how the texts are read; files of queries have only one way.
        force: replace an existing engines folder.
        confidence: of the usual promise; a `bound` has its own.

    Raises:
        InputError: the drop of a metric is bounded, which needs labels; `top` is not a whole
            number from 1; or `confidence` is out of range.
        BackendError: `threads` is out of range.
    """

    bound: Bound | None = None
    top: int | None = None
    train_texts: Path | None = None
    adapter: Path | None = None
    int8: bool = True
    problem_type: ProblemType | None = None
    max_length: int | None = None
    group_column: str | None = None
    threads: int | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    force: bool = False
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.threads is not None:
            whole_number("threads", self.threads, BackendError, MOST_THREADS)
        if self.top is not None:
            whole_number("top", self.top, InputError)
        Bound(confidence=self.confidence, changed_answers=0.5)  # checks it
        if self.bound is not None and self.bound.drop is not None:
            raise InputError("the drop of a metric needs labels", "bound `changed_answers` instead")


@dataclass(frozen=True)
class Form:
    """The form of the heads of all early exits.

    Attributes:
        pooling: what they see.
        width: of their hidden layer; 0: there is none.
        queries: how many weighted means they take, see `Pooling.ATTENTION`.
        every: there is an exit after every so many layers, counted back from the last.
    """

    pooling: Pooling
    width: int = 0
    queries: int = 0
    every: int = 1

    def exits(self, layers: int) -> tuple[int, ...]:
        """The layers with an early exit, of an encoder with this many layers."""
        return tuple(range(layers % self.every or self.every, layers, self.every))


@dataclass(frozen=True)
class Chosen:
    """The heads of the early exits, judged on texts that did not train them.

    Attributes:
        agreement: by exit from exit 1, the share of texts with the decision of the classifier; for
            a ranking, the rank correlation with the scores of the reranker.
        form: their form, with the exits that save most.
        heads_cost: what all heads cost as a share of what the layers of the classifier cost, see
            `cost_of_heads`.
        saved: the share of the layers that is saved without exit 0 where about as many decisions
            change as may; heads count as parts of layers.
        errors: for a ranking, by exit, how far predictions are from the final logit among the
            documents near the top; in logits.
    """

    agreement: tuple[float, ...]
    form: Form
    heads_cost: float
    saved: float
    errors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion made.

    Attributes:
        folder: the engines folder.
        default_target: the target that runs if none is named.
        targets: what each target promises and gives; the first is in fp32.
        rankings: the same for a reranker, which has no `targets`.
        exit_layers: the layer of each exit, exit 0 first; a reranker has it with scores only.
        chosen: the heads of the early exits.
        rows: how many texts were read, without train texts; or queries with documents.
        texts: how many of them are distinct.
        train_texts: how many other distinct texts trained and chose; 0: none were given.
        parts: how many texts trained, chose, certified, and were reported on.
        traffic: share of the texts of the report with another decision than the classifier's in
            the default target, where a text counts as often as it occurs; None: a reranker.
        accuracy: share of texts of the report with exactly the right answer: of the classifier, and
            of the default target; None: no labels.
        warnings: what makes the result less useful.
        seconds: how long this run took.
    """

    folder: Path
    default_target: str
    targets: tuple[Calibration, ...] = ()
    rankings: tuple[RankingPoint, ...] = ()
    exit_layers: tuple[int, ...]
    chosen: Chosen
    rows: int
    texts: int
    train_texts: int
    parts: tuple[int, int, int, int]
    traffic: float | None
    accuracy: tuple[float, float] | None
    warnings: tuple[str, ...]
    seconds: float
