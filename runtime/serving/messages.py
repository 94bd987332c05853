"""The common parts of requests and responses, and the OpenAPI schema of those of a task."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import msgspec
from starlette.responses import Response

from ..encoding import EncodedRow
from ..engine import Engine
from ..errors import in_one_line

if TYPE_CHECKING:
    from .scheduler import Scheduler

JSON = msgspec.json.Encoder()
Check: TypeAlias = Callable[[Sequence[EncodedRow]], object]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The optional fields of every request.

    Attributes:
        deadline_ms: milliseconds for the answer.
        truncate: whether texts may be truncated; None: they may.
    """

    deadline_ms: float | None = None
    truncate: bool | None = None


class Asked(Protocol):
    """A request in one of the formats; see `Options`."""

    deadline_ms: float | None
    truncate: bool | None

    @property
    def texts(self) -> Sequence[Any]:
        """The texts, of which a request may have only so many.

        Raises:
            InputError: something is not a text.
        """

    def ask(self, scheduler: Scheduler, texts: Any, check: Check) -> Coroutine[Any, Any, list[Any]]:
        """Get the answers.

        Args:
            scheduler: what answers.
            texts: those of the request.
            check: as in `Scheduler.classify`.

        Raises:
            FpabeeError: as in `Scheduler.classify` and `Scheduler.rank`.
        """

    def response(self, answers: list[Any], engine: Engine, model: str, tokens: int) -> Any:
        """The answers in the format of the request.

        Args:
            answers: those that `ask` gave.
            engine: what answered.
            model: its name.
            tokens: in all rows together.
        """


@dataclass(frozen=True)
class Formats:
    """The formats of requests and responses of a task.

    Attributes:
        what: what the requests ask the model to do.
        paths: the addresses, and the usual format there, that of a body without any of the fields.
        fields: the formats by the field that only they have.
        answers: the types of the responses.
    """

    what: str
    paths: Mapping[str, type[Asked]]
    fields: Mapping[str, type[Asked]]
    answers: tuple[Any, ...]

    def request(self, body: bytes, usual: type[Asked]) -> Asked:
        """The request in a body: its fields say in which format it is.

        Args:
            body: the JSON.
            usual: the usual format.

        Raises:
            ValueError: the body is not valid JSON, or not a request.
            RecursionError: its lists or objects are nested too deeply.
        """
        content = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        kinds = (kind for field, kind in self.fields.items() if field in content)
        asked: Asked = msgspec.json.decode(body, type=next(kinds, usual))
        return asked


Direction: TypeAlias = Literal["Right", "right"]
"""The end of a long text that is not read, as text-embeddings-inference names it."""


class Usage(msgspec.Struct):
    """Counts of tokens, special tokens included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Source(msgspec.Struct, kw_only=True):
    """The model and the rule that answered.

    Attributes:
        model: its name.
        revision: `Engine.revision` of the engines folder.
        operating_point: the calibrated rule, if one was used.
    """

    model: str
    revision: str
    operating_point: str | None


class Failure(msgspec.Struct):
    """The fields of every response with an error: the message, and the kind of error."""

    error: str
    error_type: str


def error_response(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The response to a request that is refused or has failed.

    Args:
        status: of HTTP.
        message: says why.
        kind: the kind of error.
        headers: more headers.
    """
    content = JSON.encode(Failure(in_one_line(message), kind))
    return Response(content, status, headers, media_type="application/json")


def openapi(version: str, formats: Formats, statuses: Mapping[int, str]) -> dict[str, Any]:
    """The OpenAPI 3.1 schema of the requests of a task.

    Args:
        version: of fpabee.
        formats: the formats of the task.
        statuses: what each status of an error means.
    """
    kinds = (*formats.fields.values(), *formats.answers, Failure)
    refs, schemas = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    requests = refs[: len(formats.fields)]
    *answers, failure = refs[len(formats.fields) :]
    failures = {str(status): _response(text, failure) for status, text in statuses.items()}
    body = {"required": True, "content": {"application/json": {"schema": {"oneOf": requests}}}}
    responses = {"200": _response("the answers", {"oneOf": answers}), **failures}
    summary = f"{formats.what.capitalize()}; the answer has the format of the request."
    post = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fpabee", "version": version},
        "paths": dict.fromkeys(formats.paths, post),
        "components": {"schemas": schemas},
    }


def _response(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
