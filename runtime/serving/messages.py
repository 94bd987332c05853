"""The JSON of requests and responses, as other servers define it, and its OpenAPI schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from ..encoding import Text
from ..errors import InputError
from ..predictions import Prediction

Pair = tuple[str, str]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every request may have besides its texts.

    Attributes:
        deadline_ms: milliseconds for the answer.
        max_exit: rows stop at this exit at the latest.
        truncate: whether texts may be truncated.
    """

    deadline_ms: float | None = None
    max_exit: int | None = None
    truncate: bool = True


class ClassifyRequest(Options, kw_only=True, forbid_unknown_fields=True):
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


class Source(msgspec.Struct, kw_only=True):
    """What answered.

    Attributes:
        model: its name.
        revision: `Engine.revision` of the engines folder.
        operating_point: the calibrated rule, if one was used.
        label_thresholds: the probability above which each label is predicted, or flagged; empty for
            single-label tasks without thresholds, whose answer is the most probable label.
    """

    model: str
    revision: str
    operating_point: str | None
    label_thresholds: dict[str, float]


class ClassifyResponse(Source, kw_only=True):
    """A response of vLLM's `/classify`; `created` is in seconds since 1970."""

    id: str
    object: Literal["list"] = "list"
    created: int
    data: list[Answer]
    usage: Usage


class PredictRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """A request as `/predict` of text-embeddings-inference takes it.

    Attributes:
        inputs: a text; a pair of texts as a list of two; or several of both in a list, where a text
            is a list of one.
        raw_scores: whether scores are logits instead of probabilities.
    """

    inputs: str | list[str | list[str]]
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


Asked: TypeAlias = ClassifyRequest | PredictRequest


def request_of(body: bytes, usual: type[Asked]) -> Asked:
    """The request in a body: its fields say in which format it is.

    Args:
        body: the JSON.
        usual: the format of a body with neither `input` nor `inputs`.

    Raises:
        ValueError: the body is not valid JSON, or not a request.
        RecursionError: its lists or objects are nested too deeply.
    """
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    kinds = {"input": ClassifyRequest, "inputs": PredictRequest}
    kind = next((kind for field, kind in kinds.items() if field in fields), usual)
    asked: Asked = msgspec.json.decode(body, type=kind)
    return asked


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


def response_to(
    asked: Asked,
    predictions: Sequence[Prediction],
    labels: Sequence[str],
    source: Source,
    tokens: int,
) -> ClassifyResponse | list[LabelScore] | list[list[LabelScore]]:
    """The answers in the format of the request.

    Args:
        asked: the request.
        predictions: in the order of its texts.
        labels: in the order of the probabilities.
        source: what answered.
        tokens: in all rows together.
    """
    if isinstance(asked, PredictRequest):
        ranked = [_ranked(asked, answer, labels) for answer in predictions]
        return ranked if asked.is_batch else ranked[0]
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
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        data=data,
        usage=Usage(tokens, tokens),
        **msgspec.structs.asdict(source),
    )


def _ranked(asked: PredictRequest, answer: Prediction, labels: Sequence[str]) -> list[LabelScore]:
    """The labels of an answer, the most probable one first."""
    scores = answer.logits if asked.raw_scores else answer.probabilities
    pairs = zip(answer.probabilities, scores, labels, strict=True)
    ranked = sorted(pairs, key=lambda pair: -pair[0])
    return [LabelScore(score, label) for _, score, label in ranked]


def openapi(version: str, paths: Iterable[str], statuses: dict[int, str]) -> dict[str, Any]:
    """The OpenAPI 3.1 schema of the requests that classify texts.

    Args:
        version: of fpabee.
        paths: where they are sent to.
        statuses: what each status of an error means.
    """
    kinds = (*get_args(Asked), ClassifyResponse, LabelScore, Failure)
    refs, schemas = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    *requests, classified, score, failure = refs
    scores = {"type": "array", "items": score}
    answers = {"oneOf": [classified, scores, {"type": "array", "items": scores}]}
    failures = {str(status): _response(text, failure) for status, text in statuses.items()}
    body = {"required": True, "content": {"application/json": {"schema": {"oneOf": requests}}}}
    responses = {"200": _response("the answers", answers), **failures}
    summary = "Classify texts; the answer has the format of the request."
    post = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fpabee", "version": version},
        "paths": dict.fromkeys(paths, post),
        "components": {"schemas": schemas},
    }


def _response(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
