"""The JSON of requests that classify texts, and of their responses, as other servers define it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..encoding import Text
from ..engine import Engine
from ..errors import InputError
from ..predictions import Prediction
from .messages import Check, Direction, Formats, Options, Source, Usage

if TYPE_CHECKING:
    from .scheduler import Scheduler

Pair = tuple[str, str]


class ClassifyOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The optional fields of every request to classify.

    Attributes:
        max_exit: rows stop at this exit at the latest.
    """

    max_exit: int | None = None

    async def ask(
        self, scheduler: Scheduler, texts: Sequence[Text], check: Check
    ) -> list[Prediction]:
        """Get the predictions, see `Asked`."""
        return await scheduler.classify(texts, self.deadline_ms, self.max_exit, check)


class LabelScore(msgspec.Struct):
    """A label and its probability; with `raw_scores`, its logit."""

    score: float
    label: str


class Answer(msgspec.Struct):
    """The answer for one text: what vLLM gives, and how the row stopped; see `Prediction`.

    Attributes:
        index: the place of the text in the request.
        label: the most probable label.
        probs: the probability of each label.
        num_classes: the number of labels.
        labels: the predicted labels.
        exit: the exit that answered.
        layer: encoder layers that ran.
        truncated: whether the text was too long.
        deadline_limited: whether the deadline stopped the row.
        deadline_missed: whether the answer is late.
    """

    index: int
    label: str
    probs: tuple[float, ...]
    num_classes: int
    labels: tuple[str, ...]
    exit: int
    layer: int
    truncated: bool
    deadline_limited: bool
    deadline_missed: bool


class ClassifyResponse(Source, kw_only=True):
    """A response of vLLM's `/classify`; `created` is in seconds since 1970.

    Attributes:
        label_thresholds: the probability above which each label is predicted, or flagged; empty for
            single-label tasks without thresholds, whose answer is the most probable label.
    """

    label_thresholds: dict[str, float]
    id: str
    object: Literal["list"] = "list"
    created: int
    data: list[Answer]
    usage: Usage


class ClassifyRequest(ClassifyOptions, kw_only=True, forbid_unknown_fields=True):
    """A request as vLLM's `/classify` takes it, which may also have pairs of texts.

    Attributes:
        input: a text, or a list of texts and pairs.
        model: anything; there is one model.
        user: ignored.
    """

    input: str | list[str | Pair]
    model: str | None = None
    user: str | None = None

    @property
    def texts(self) -> list[Text]:
        """The texts and pairs, in order."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def response(
        self, answers: list[Prediction], engine: Engine, model: str, tokens: int
    ) -> ClassifyResponse:
        """The response, see `Asked`."""
        data = [
            Answer(
                number,
                answer.top(engine.labels, 1)[0][0],
                answer.probabilities,
                len(engine.labels),
                answer.labels,
                answer.exit,
                answer.layer,
                answer.truncated,
                answer.deadline_limited,
                answer.deadline_missed,
            )
            for number, answer in enumerate(answers)
        ]
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            data=data,
            usage=Usage(tokens, tokens),
            model=model,
            revision=engine.revision,
            operating_point=engine.operating_point,
            label_thresholds=engine.label_thresholds,
        )


class PredictRequest(ClassifyOptions, kw_only=True, forbid_unknown_fields=True):
    """A request as `/predict` of text-embeddings-inference takes it.

    Attributes:
        inputs: a text; a pair of texts as a list of two; or several of both in a list, where a text
            is a list of one.
        raw_scores: whether scores are logits instead of probabilities.
        truncation_direction: which end of a long text is not read.
    """

    inputs: str | list[str | list[str]]
    raw_scores: bool = False
    truncation_direction: Direction = "Right"

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list of answers."""
        return not isinstance(self.inputs, str) and any(isinstance(x, list) for x in self.inputs)

    @property
    def texts(self) -> list[Text]:
        """The texts and pairs, in order.

        Raises:
            InputError: a list is neither a text nor a pair.
        """
        inputs: Any = self.inputs if self.is_batch else [self.inputs]
        return [text if isinstance(text, str) else _text_or_pair(text) for text in inputs]

    def response(
        self, answers: list[Prediction], engine: Engine, model: str, tokens: int
    ) -> list[LabelScore] | list[list[LabelScore]]:
        """The response, see `Asked`; it has no room for the model and the tokens."""
        ranked = [self._ranked(answer, engine.labels) for answer in answers]
        return ranked if self.is_batch else ranked[0]

    def _ranked(self, answer: Prediction, labels: Sequence[str]) -> list[LabelScore]:
        """The labels of an answer, the most probable one first."""
        scores = answer.logits if self.raw_scores else answer.probabilities
        pairs = zip(answer.probabilities, scores, labels, strict=True)
        ranked = sorted(pairs, key=lambda pair: -pair[0])
        return [LabelScore(score, label) for _, score, label in ranked]


def _text_or_pair(strings: Sequence[str]) -> Text:
    if len(strings) == 1:
        return strings[0]
    if len(strings) == 2:
        return strings[0], strings[1]
    raise InputError(
        f"a list of {len(strings)} strings is neither a text nor a pair",
        'write several texts as [["first"], ["second"]]',
    )


CLASSIFICATION = Formats(
    what="classify texts",
    paths={
        "/classify": ClassifyRequest,
        "/v1/classify": ClassifyRequest,
        "/predict": PredictRequest,
    },
    fields={"input": ClassifyRequest, "inputs": PredictRequest},
    answers=(ClassifyResponse, list[LabelScore], list[list[LabelScore]]),
)
