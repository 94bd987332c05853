"""The JSON of requests that rank documents, and of their responses, as other servers define it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ..engine import Engine
from ..tasks.ranked import Ranked
from .messages import Check, Direction, Formats, Options, Source, Usage

if TYPE_CHECKING:
    from .scheduler import Scheduler


class RankOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The fields of every request to rank besides its documents.

    Attributes:
        query: the query.
        scores: those of the search that found the documents, see `Engine.rank`.
        top_n: how many documents are returned, the best ones; None: all. Those that left early come
            last then.
        raw_scores: whether scores are logits.
    """

    query: str
    scores: list[float] | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    raw_scores: bool = False

    async def ask(self, scheduler: Scheduler, texts: Sequence[str], check: Check) -> list[Ranked]:
        """Rank the documents, see `Asked`."""
        every = self.top_n is None
        return await scheduler.rank(
            self.query,
            texts,
            self.top_n,
            self.deadline_ms,
            scores=self.scores,
            all=every,
            check=check,
        )

    def score(self, answer: Ranked) -> float:
        """The score of a document, or its logit."""
        return answer.logit if self.raw_scores else answer.score


class Document(msgspec.Struct):
    """A document; other fields are ignored."""

    text: str


class RerankRequest(RankOptions, kw_only=True, forbid_unknown_fields=True):
    """A request as Cohere, Jina, vLLM and Infinity take it.

    The limits of tokens are ignored: the model has its own.

    Attributes:
        documents: the documents.
        return_documents: whether results contain their documents.
        model: anything; there is one model.
        rank_fields: which fields of documents count.
        truncation_side: which end of a long text is not read.
        max_chunks_per_doc: ignored.
        max_tokens_per_doc: ignored.
        max_tokens_per_query: ignored.
        truncate_prompt_tokens: ignored.
        priority: ignored.
        user: ignored.
        instruction: none; the model takes none.
        relevant_spans: none; the model gives none.
    """

    documents: list[str | Document]
    return_documents: bool | None = None
    model: str | None = None
    rank_fields: tuple[Literal["text"]] | None = None
    truncation_side: Literal["right"] | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    max_tokens_per_query: int | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    user: str | None = None
    instruction: None = None
    relevant_spans: None = None

    @property
    def texts(self) -> list[str]:
        """The documents, in order."""
        return [each.text if isinstance(each, Document) else each for each in self.documents]

    def response(
        self, answers: list[Ranked], engine: Engine, model: str, tokens: int
    ) -> RerankResponse:
        """The response, see `Asked`."""
        texts = self.texts
        results = [
            RerankResult(
                index=answer.index,
                relevance_score=self.score(answer),
                document=Document(texts[answer.index]) if self.return_documents else UNSET,
                exit=answer.exit,
                truncated=answer.truncated,
                deadline_limited=answer.deadline_limited,
                deadline_missed=answer.deadline_missed,
            )
            for answer in answers
        ]
        return RerankResponse(
            id=f"rerank-{uuid.uuid4().hex}",
            results=results,
            usage=Usage(tokens, tokens),
            model=model,
            revision=engine.revision,
            operating_point=engine.operating_point,
        )


class TextsRequest(RankOptions, kw_only=True, forbid_unknown_fields=True):
    """A request as `/rerank` of text-embeddings-inference takes it, which may also have `top_n`.

    Attributes:
        texts: the documents.
        return_text: whether results contain their texts.
        truncation_direction: which end of a long text is not read.
    """

    texts: list[str]
    return_text: bool = False
    truncation_direction: Direction = "Right"

    def response(
        self, answers: list[Ranked], engine: Engine, model: str, tokens: int
    ) -> list[TextScore]:
        """The response, see `Asked`; it has no room for the model and the tokens."""
        return [
            TextScore(
                index=answer.index,
                score=self.score(answer),
                text=self.texts[answer.index] if self.return_text else UNSET,
                exit=answer.exit,
                truncated=answer.truncated,
                deadline_limited=answer.deadline_limited,
                deadline_missed=answer.deadline_missed,
            )
            for answer in answers
        ]


class Place(msgspec.Struct, kw_only=True):
    """The facts about a document in a ranking; see `Ranked`.

    Attributes:
        index: the place of the document in the request.
        exit: the exit that gave the score.
        truncated: whether query and document were too long together.
        deadline_limited: whether the deadline stopped the document.
        deadline_missed: whether the answer came after the deadline.
    """

    index: int
    exit: int
    truncated: bool
    deadline_limited: bool
    deadline_missed: bool


class RerankResult(Place, kw_only=True):
    """A document in a ranking as Cohere gives it."""

    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankResponse(Source, kw_only=True):
    """A response as Cohere gives it, the best document first."""

    id: str
    results: list[RerankResult]
    usage: Usage


class TextScore(Place, kw_only=True):
    """A document in a ranking as text-embeddings-inference gives it."""

    score: float
    text: str | UnsetType = UNSET


RANKING = Formats(
    what="rank the documents of a query",
    paths={"/v1/rerank": RerankRequest, "/v2/rerank": RerankRequest, "/rerank": TextsRequest},
    fields={"documents": RerankRequest, "texts": TextsRequest},
    answers=(RerankResponse, list[TextScore]),
)
