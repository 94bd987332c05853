"""Rankings over HTTP: what clients send and read, limits, and what each task refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate

from fpabee.runtime import Activation
from fpabee.runtime.chain.chain import Chain
from fpabee.runtime.serving.server import ServerLimits

from ..test_ranking import QUERY, documents, late_after_a_segment
from .test_server import Server, Strict, serving

DOCUMENTS = documents(30)
OBJECTS = [{"text": each} for each in DOCUMENTS]
LIMITS = ServerLimits(max_body=20_000, max_texts=40)
ADDRESSES = ["/v1/rerank", "/v2/rerank", "/rerank"]
Read = Callable[[Any], list[tuple[int, float, str | None]]]


@pytest.fixture
def server(ranker: Path) -> Iterator[Server]:
    with serving(ranker, max_rows=60, limits=LIMITS) as server:
        validate(server.schema)
        yield server


@pytest.fixture(scope="module")
def ranking_server(ranking_engines: Mapping[str, Path]) -> Iterator[Server]:
    """A server that runs every layer, for all examples of a test."""
    with serving(ranking_engines["bert"], max_rows=60, limits=LIMITS) as server:
        yield server


def of_cohere(found: Any) -> list[tuple[int, float, str | None]]:
    """As the SDK of Cohere, LangChain, LlamaIndex, Haystack and most of LiteLLM."""
    return [
        (each["index"], each["relevance_score"], each.get("document", {}).get("text"))
        for each in found["results"]
    ]


def of_vllm(found: Any) -> list[tuple[int, float, str | None]]:
    """Also the usage, from which LiteLLM makes what it bills."""
    assert found["usage"]["total_tokens"] > 0
    assert found.get("meta") is None, "its own would be checked"
    return of_cohere(found)


def of_infinity(found: Any) -> list[tuple[int, float, str | None]]:
    """`ReRankResult.from_dict` needs these fields, and knows one `object`."""
    assert {"model", "usage", "results"} <= set(found)
    assert found.get("object", "rerank") == "rerank"
    assert {"prompt_tokens", "total_tokens"} <= set(found["usage"])
    best = sorted(of_cohere(found), key=lambda each: each[1], reverse=True)
    assert best == of_cohere(found), "LangChain sorts again"
    return best


def of_tei(found: Any) -> list[tuple[int, float, str | None]]:
    assert isinstance(found, list)
    return [(each["index"], each["score"], each.get("text")) for each in found]


def of_llama_tei(found: Any) -> list[tuple[int, float, str | None]]:
    """It needs a score for every text, and sorts again."""
    assert len(found) == len(DOCUMENTS)
    return sorted(of_tei(found), key=lambda each: -each[1])


COMMON = {"query": QUERY, "documents": DOCUMENTS}
JINA = "jina-reranker-v1-base-en"
LITE = {"model": "m", **COMMON, "top_n": 2, "return_documents": True}
# The client, where it sends a body, the body, how it reads the answer, and how many it gets.
CLIENTS: list[tuple[str, str, dict[str, Any], Read, int]] = [
    ("cohere 7.3 ClientV2", "/v2/rerank", {"model": "m", **COMMON, "top_n": 2}, of_cohere, 2),
    ("cohere 7.3 ClientV2 all", "/v2/rerank", {"model": "m", **COMMON}, of_cohere, 30),
    ("cohere 7.3 Client", "/v1/rerank",
     {"model": "m", "query": QUERY, "documents": OBJECTS, "top_n": 2, "return_documents": True},
     of_cohere, 2),
    ("langchain-cohere 0.6 CohereRerank", "/v2/rerank",
     {"model": "m", **COMMON, "top_n": 3, "max_tokens_per_doc": None}, of_cohere, 3),
    ("langchain-community 0.4 JinaRerank", "/v1/rerank", {**COMMON, "model": JINA, "top_n": 3},
     of_cohere, 3),
    ("langchain-community 0.4 InfinityRerank", "/rerank",
     {**COMMON, "return_documents": False, "raw_scores": False, "model": "m"}, of_infinity, 30),
    ("llama-index 0.10 CohereRerank", "/v2/rerank", {"model": "m", **COMMON, "top_n": 2},
     of_cohere, 2),
    ("llama-index 0.6 JinaRerank", "/v1/rerank", {**COMMON, "model": JINA, "top_n": 2},
     of_cohere, 2),
    ("llama-index 0.6 TextEmbeddingInference", "/rerank", {"query": QUERY, "texts": DOCUMENTS},
     of_llama_tei, 30),
    ("cohere-haystack 11 CohereRanker", "/v2/rerank",
     {"model": "m", **COMMON, "top_n": 3, "max_tokens_per_doc": 4096}, of_cohere, 3),
    ("jina-haystack 2 JinaRanker", "/v1/rerank", {**COMMON, "model": "m", "top_n": None},
     of_cohere, 30),
    ("huggingface-api-haystack 3 HuggingFaceTEIRanker", "/rerank",
     {"query": QUERY, "texts": DOCUMENTS, "raw_scores": False}, of_tei, 30),
    ("huggingface-api-haystack 3 HuggingFaceTEIRanker truncates", "/rerank",
     {"query": QUERY, "texts": DOCUMENTS, "raw_scores": False, "truncate": True,
      "truncation_direction": "Right"}, of_tei, 30),
    ("litellm 1.83 cohere", "/v2/rerank", LITE, of_cohere, 2),
    ("litellm 1.83 jina_ai", "/v1/rerank", LITE, of_cohere, 2),
    ("litellm 1.83 hosted_vllm", "/rerank", LITE, of_vllm, 2),
    ("litellm 1.83 infinity", "/rerank", {**LITE, "return_documents": False}, of_infinity, 2),
    ("litellm 1.83 huggingface", "/rerank",
     {"raw_scores": False, "truncate": False, "truncation_direction": "Right", "query": QUERY,
      "top_n": 2, "texts": DOCUMENTS, "return_text": True}, of_tei, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "read", "count"), [case[1:] for case in CLIENTS], ids=[c[0] for c in CLIENTS]
)
def test_clients(server: Server, path: str, body: dict[str, Any], read: Read, count: int) -> None:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    found = read(server.check(path, response))
    ranking = server.engine.rank(QUERY, DOCUMENTS, all=True)[:count]
    assert [index for index, _, _ in found] == [each.index for each in ranking]
    assert [score for _, score, _ in found] == pytest.approx([e.score for e in ranking], abs=1e-5)
    returns = body.get("return_documents") or body.get("return_text")
    texts = [DOCUMENTS[each.index] if returns else None for each in ranking]
    assert [text for _, _, text in found] == texts
    assert response.headers["X-Fpabee-Revision"] == server.engine.revision


@pytest.mark.parametrize("path", ADDRESSES)
def test_the_fields_decide_the_format(server: Server, path: str) -> None:
    for content in ({"documents": DOCUMENTS}, {"texts": DOCUMENTS}):
        response = server.post(path, {"query": QUERY, **content})
        assert isinstance(server.check(path, response), dict) == ("documents" in content)


def results_of(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of an answer in either format, which is what the schema says."""
    found = server.check(path, server.post(path, body))
    results: list[dict[str, Any]] = found if isinstance(found, list) else found["results"]
    return results


@pytest.mark.parametrize("name", ["documents", "texts"])
def test_scores_of_the_search_are_used(scored_ranker: Path, name: str) -> None:
    body = {"query": QUERY, name: DOCUMENTS}
    scores = [n % 7 for n in range(len(DOCUMENTS))]
    with serving(scored_ranker, max_rows=60, limits=LIMITS) as server:
        for known in (scores, None):
            found = results_of(server, "/rerank", body | {"scores": known})
            ranking = server.engine.rank(QUERY, DOCUMENTS, scores=known, all=True)
            assert [each["exit"] for each in found] == [each.exit for each in ranking]
            assert [each["index"] for each in found] == [each.index for each in ranking]
            assert any(each.exit == 0 for each in ranking) == (known is not None)


def test_what_fpabee_adds(server: Server) -> None:
    found = server.post("/v1/rerank", COMMON).json()
    assert (found["model"], found["operating_point"]) == ("tiny", "changed-5")
    assert found["revision"] == server.engine.revision
    rows = server.engine.core.encode([(QUERY, each) for each in DOCUMENTS])
    assert found["usage"]["prompt_tokens"] == sum(map(len, rows))
    ranking = server.engine.rank(QUERY, DOCUMENTS, all=True)
    assert [each["exit"] for each in found["results"]] == [each.exit for each in ranking]
    assert len({each.exit for each in ranking}) > 1
    scores = [each["relevance_score"] for each in found["results"]]
    last = [each["exit"] for each in found["results"]].count(3)
    assert min(scores[:last]) > max(scores[last:]), "those that left early come last"
    assert "document" not in found["results"][0]
    long = server.post("/rerank", {"query": QUERY, "texts": ["rain " * 400, "sun"]}).json()
    assert {each["index"]: each["truncated"] for each in long} == {0: True, 1: False}


@pytest.mark.parametrize(
    ("path", "score"), [("/v1/rerank", "relevance_score"), ("/rerank", "score")]
)
def test_raw_scores_are_logits(server: Server, path: str, score: str) -> None:
    assert server.engine.manifest.task.activation is Activation.SIGMOID
    body = {"query": QUERY, "documents" if path == "/v1/rerank" else "texts": DOCUMENTS}

    def scores(**more: Any) -> list[float]:
        return [each[score] for each in results_of(server, path, body | more)]

    logits = scores(raw_scores=True)
    assert scores() == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits])


def test_a_deadline_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "soon", late_after_a_segment)
    response = server.post("/v1/rerank", COMMON | {"deadline_ms": 30_000.0})
    found = server.check("/v1/rerank", response)["results"]
    assert len(found) == len(DOCUMENTS)
    assert any(each["deadline_limited"] for each in found)


@pytest.mark.parametrize(
    ("path", "status", "says", "content"),
    [
        ("/v1/rerank", 400, "best 3 leave early", COMMON | {"top_n": 4}),
        ("/rerank", 400, "best 3", {"query": "a", "texts": ["b"] * 4, "top_n": 30}),
        ("/v1/rerank", 400, "top_n", COMMON | {"top_n": 0}),
        ("/v1/rerank", 400, "unknown field `max_exit`", COMMON | {"max_exit": 1}),
        ("/v1/rerank", 400, "unknown field `texts`", COMMON | {"texts": ["a"]}),
        ("/v1/rerank", 400, "`query`", {"documents": ["a"]}),
        ("/v1/rerank", 400, "2 values in 'scores'", COMMON | {"scores": [1, 2]}),
        ("/rerank", 400, "score 1e+39", {"query": "a", "texts": ["b"], "scores": [1e39]}),
        ("/rerank", 400, "`$.scores[0]`", {"query": "a", "texts": ["b"], "scores": [None]}),
        ("/v2/rerank", 400, "`documents`", {"query": "a"}),
        ("/rerank", 400, "`texts`", {"query": "a"}),
        ("/v1/rerank", 400, "$.documents[1]", {"query": "a", "documents": ["b", 5]}),
        ("/v1/rerank", 400, "`text`", {"query": "a", "documents": [{"title": "b"}]}),
        ("/v1/rerank", 400, "rank_fields", COMMON | {"rank_fields": ["title"]}),
        ("/v1/rerank", 400, "instruction", COMMON | {"instruction": "Find songs."}),
        ("/rerank", 400, "truncation_direction",
         {"query": "a", "texts": ["b"], "truncation_direction": "Left"}),
        ("/rerank", 400, "tokens", {"query": "a", "texts": ["b " * 500], "truncate": False}),
        ("/rerank", 400, "deadline_ms", {"query": "a", "texts": ["b"], "deadline_ms": "soon"}),
        ("/rerank", 413, "41 texts, expected at most 40", {"query": "a", "texts": ["b"] * 41}),
        ("/v1/rerank", 413, "20000 bytes", {"query": "a" * 30_000, "documents": ["b"]}),
    ],
)  # fmt: skip
def test_bad_requests(server: Server, path: str, status: int, says: str, content: Any) -> None:
    response = server.post(path, content)
    assert response.status_code == status, response.text
    assert says in server.check(path, response)["error"]
    assert server.post("/v1/rerank", COMMON).status_code == 200
    assert server.scheduler._unanswered == 0


def test_too_many_tokens_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpabee.runtime.core._QUERY_BYTES", 2**12)
    response = server.post("/v1/rerank", COMMON)
    assert response.status_code == 400
    error = server.check("/v1/rerank", response)["error"]
    assert "30 documents with their query have" in error
    assert "tokens" in error


@pytest.mark.parametrize(
    "content", [{"documents": []}, {"documents": [""]}, {"documents": ["the sun"] * 5}]
)
def test_defined_answers(server: Server, content: dict[str, list[str]]) -> None:
    found = server.check("/v1/rerank", server.post("/v1/rerank", {"query": "", **content}))
    count = len(content["documents"])
    assert [each["index"] for each in found["results"]] == list(range(count))
    assert all(each["exit"] == 3 for each in found["results"][:3]), "those that are promised"


def test_a_query_is_admitted_whole_or_refused(ranker: Path) -> None:
    with serving(ranker, max_rows=20, limits=LIMITS) as server:
        response = server.post("/v1/rerank", COMMON)
        assert response.status_code == 429
        assert "30 more" in server.check("/v1/rerank", response)["error"]
        assert response.headers["Retry-After"] == "1"
        assert server.post("/v1/rerank", COMMON | {"documents": DOCUMENTS[:20]}).status_code == 200


def test_each_task_has_its_own_addresses(server: Server, engines: Mapping[str, Path]) -> None:
    with serving(engines["bert"]) as classifier:
        for path in ADDRESSES:
            response = classifier.post(path, COMMON)
            assert response.status_code == 404
            assert "classify texts" in response.json()["error"]
            assert "/classify" in response.json()["error"]
        assert set(classifier.schema["paths"]) == {"/classify", "/v1/classify", "/predict"}
        assert classifier.client.get("/info").json()["ranks"] is False
    for path in ("/classify", "/v1/classify", "/predict"):
        response = server.post(path, {"input": "rain"})
        assert response.status_code == 404
        assert set(response.json()) == {"error", "error_type"}
        assert "rank" in response.json()["error"]
        assert "/v1/rerank" in response.json()["error"]
    assert set(server.schema["paths"]) == set(ADDRESSES)


def test_info_metrics_and_health(server: Server) -> None:
    server.post("/v1/rerank", COMMON)
    info = server.client.get("/info").json()
    assert (info["ranks"], info["watched"]) == (True, None)
    assert info["rule"] == {"name": "top-k", "top": 3, "threshold": [-0.3, -0.2, 0.0]}
    text = server.client.get("/metrics").text
    counts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("fpabee_rows_total{")
    ]
    assert sum(counts) == len(DOCUMENTS)
    assert server.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", ["RerankRequest", "TextsRequest"])
@given(data=st.data())
def test_every_answer_is_in_the_schema(
    name: str, data: st.DataObject, ranking_server: Server
) -> None:
    """Requests around what the schema allows: it says which are refused, and describes answers."""
    server = ranking_server
    path = "/v1/rerank" if name == "RerankRequest" else "/rerank"
    operation = server.schema["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    fields = sorted(server.schema["components"]["schemas"][name]["properties"])
    text = st.sampled_from(["rain", "", "\0", "right", "Right", "text"])
    value = st.one_of(
        *(st.none(), st.booleans(), st.integers(-1, 4), st.just(1e6), text),
        *(st.lists(text, max_size=3), st.just([{"text": "rain", "id": 3}]), st.just([{"id": 3}])),
    )
    needed = {"query": "rain", "documents" if name == "RerankRequest" else "texts": ["a"]}
    content = data.draw(
        st.dictionaries(st.sampled_from([*fields, "other"]), value, max_size=3).flatmap(
            lambda other: st.sampled_from([other, needed | other])
        )
    )
    response = server.post(path, content)
    server.check(path, response)
    full = schema | {"components": server.schema["components"]}
    if not Strict(full).is_valid(content):
        assert response.status_code == 400
    elif response.status_code != 200:
        # What a schema cannot say: which texts are Unicode.
        assert response.status_code == 400
        assert response.json()["error_type"] == "InputError"
