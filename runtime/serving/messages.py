"""The JSON of requests and responses, as other servers define it, and its OpenAPI schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ..encoding import Text
from ..errors import InputError
from ..predictions import Prediction

Pair = tuple[str, str]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What fpabee adds to a request.

    Attributes:
        deadline_ms: milliseconds for the answer.
        max_exit: rows stop at this exit at the latest.
    """

    deadline_ms: float | None = None
    max_exit: int | None = None


class ClassifyRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """A request of vLLM's `/classify`, which may also have pairs of texts.

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


class Usage(msgspec.Struct):
    """Counts of tokens, special tokens included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(msgspec.Struct):
    """A response of vLLM's `/classify`; `created` is in seconds since 1970."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Answer]
    usage: Usage


class PredictRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """A request of `/predict` of text-embeddings-inference.

    Attributes:
        inputs: a text; a pair of texts as a list of two; or several of both in a list, where a text
            is a list of one.
        truncate: whether texts may be truncated.
        raw_scores: whether scores are logits instead of probabilities.
    """

    inputs: str | list[str | list[str]]
    truncate: bool = True
    raw_scores: bool = False

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


class Failure(msgspec.Struct):
    """What every response with an error has: the message, and the kind of error."""

    error: str
    error_type: str


def _text_or_pair(strings: Sequence[str]) -> Text:
    if len(strings) == 1:
        return strings[0]
    if len(strings) == 2:
        return strings[0], strings[1]
    raise InputError(
        f"a list of {len(strings)} strings is neither a text nor a pair",
        'write several texts as [["first"], ["second"]]',
    )


def classify_response(
    predictions: Sequence[Prediction], labels: Sequence[str], model: str, tokens: int
) -> ClassifyResponse:
    """Answers in vLLM's format.

    Args:
        predictions: in the order of the request.
        labels: in the order of the probabilities.
        model: the name of the model.
        tokens: in all rows together.
    """
    data = [
        Answer(
            number,
            answer.top(labels, 1)[0][0],
            answer.probabilities,
            len(labels),
            answer.labels,
            answer.exit,
            answer.layer,
            answer.truncated,
            answer.deadline_limited,
            answer.deadline_missed,
        )
        for number, answer in enumerate(predictions)
    ]
    name = f"classify-{uuid.uuid4().hex}"
    return ClassifyResponse(name, "list", int(time.time()), model, data, Usage(tokens, tokens))


def predict_response(
    asked: PredictRequest, prediction: Prediction, labels: Sequence[str]
) -> list[LabelScore]:
    """An answer in the format of text-embeddings-inference, the most probable label first."""
    scores = prediction.logits if asked.raw_scores else prediction.probabilities
    pairs = zip(prediction.probabilities, scores, labels, strict=True)
    ranked = sorted(pairs, key=lambda pair: -pair[0])
    return [LabelScore(score, label) for _, score, label in ranked]


def openapi(version: str, statuses: dict[int, str]) -> dict[str, Any]:
    """The OpenAPI 3.1 schema of the requests that classify texts.

    Args:
        version: of fpabee.
        statuses: what each status of an error means.
    """
    kinds = (ClassifyRequest, ClassifyResponse, PredictRequest, Failure, LabelScore)
    refs, schemas = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    scores = {"type": "array", "items": refs[4]}
    answers = {"oneOf": [scores, {"type": "array", "items": scores}]}
    failures = {str(status): _response(text, refs[3]) for status, text in statuses.items()}

    def post(summary: str, request: Any, response: Any) -> dict[str, Any]:
        body = {"required": True, "content": {"application/json": {"schema": request}}}
        responses = {"200": _response("the answers", response), **failures}
        return {"post": {"summary": summary, "requestBody": body, "responses": responses}}

    classify = post("Classify texts, as in vLLM.", refs[0], refs[1])
    return {
        "openapi": "3.1.0",
        "info": {"title": "fpabee", "version": version},
        "paths": {
            "/classify": classify,
            "/v1/classify": classify,
            "/predict": post("Classify texts, as in TEI.", refs[2], answers),
        },
        "components": {"schemas": schemas},
    }


def _response(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
