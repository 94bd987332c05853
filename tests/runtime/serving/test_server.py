"""The HTTP server: formats, limits, bad requests, and that responses fit the OpenAPI schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from fpabee.runtime import BackendError, Budget, Confidence, Engine, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import MANIFEST_NAME
from fpabee.runtime.artifact.operating_point import Certificate
from fpabee.runtime.backends.host import HostExecution
from fpabee.runtime.encoding import Text
from fpabee.runtime.rules.settling import Settled
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.metrics import Metrics
from fpabee.runtime.serving.server import ServerLimits, Service

from ...closeness import assert_close, assert_probabilities
from ...conftest import WORDS
from ...doubles.device import Double
from ..watching import certify, watched_by

LIMITS = ServerLimits(max_body=5000, max_texts=3, body_seconds=5.0)
HEADERS = {"Content-Type": "application/json"}
# JSON Schema takes 1.0 for an integer, and the server does not.
Strict = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


class Server:
    """The application, without a network."""

    def __init__(self, engine: Engine, max_rows: int, limits: ServerLimits) -> None:
        self.engine = engine
        self.metrics = Metrics(engine)
        self.scheduler = Scheduler(engine, max_rows, self.metrics)
        app = Service(engine, self.scheduler, self.metrics, limits, "tiny").app
        self.client = TestClient(app, raise_server_exceptions=False)
        self.schema = self.client.get("/openapi.json").json()

    def post(self, path: str, content: Any, **headers: str) -> Any:
        body = content if isinstance(content, bytes) else json.dumps(content)
        return self.client.post(path, content=body, headers=HEADERS | headers)

    def check(self, path: str, response: Any) -> Any:
        """The JSON of a response, which is what the schema says."""
        method = response.request.method.lower()
        described = self.schema["paths"][path][method]["responses"][str(response.status_code)]
        schema = described["content"]["application/json"]["schema"]
        found = response.json()
        jsonschema.validate(found, schema | {"components": self.schema["components"]})
        return found


@contextmanager
def serving(
    folder: Path,
    max_rows: int = 10,
    target: str | None = None,
    watch: float | None = None,
    limits: ServerLimits = LIMITS,
) -> Iterator[Server]:
    with Engine.load(folder, target, watch=watch) as engine:
        server = Server(engine, max_rows, limits)
        yield server
        server.scheduler.close()


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def server(request: pytest.FixtureRequest, engines: Mapping[str, Path]) -> Iterator[Server]:
    with serving(engines[request.param]) as server:
        validate(server.schema)
        yield server


@pytest.mark.parametrize("sent", ["play music", ["rain"], ["rain", ["a text", "a pair"], ""], []])
@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classify(server: Server, sent: Any, path: str) -> None:
    """Also what the engine `vllm` of NeMo Guardrails reads: labels, and the largest of `probs`."""
    response = server.post(path, {"input": sent, "model": "any"})
    assert response.status_code == 200
    found = server.check("/classify", response)
    texts: list[Text] = [sent] if isinstance(sent, str) else sent
    texts = [text if isinstance(text, str) else (text[0], text[1]) for text in texts]
    for number, (text, answer) in enumerate(zip(texts, found["data"], strict=True)):
        (expected,) = server.engine.predict([text])
        assert answer["index"] == number
        assert answer["labels"] == list(expected.labels)
        assert (answer["exit"], answer["layer"]) == (expected.exit, expected.layer)
        assert_probabilities(answer["probs"], expected)
        assert answer["probs"][server.engine.labels.index(answer["label"])] == max(answer["probs"])
    assert (found["object"], found["model"]) == ("list", "tiny")
    assert found["usage"]["prompt_tokens"] == sum(map(len, server.engine.core.encode(texts)))


@pytest.mark.parametrize(
    ("sent", "shape"),
    [
        ("rain", None),
        (["rain"], None),
        (["a text", "a pair"], None),
        ([["rain"], ["a text", "a pair"], "sun"], 3),
    ],
)
def test_predict(server: Server, sent: Any, shape: int | None) -> None:
    more = {"truncate": None, "truncation_direction": "Right"}
    response = server.post("/predict", {"inputs": sent, **more})
    assert response.status_code == 200
    found = server.check("/predict", response)
    answers = found if shape else [found]
    assert len(answers) == (shape or 1)
    for answer in answers:
        assert {pair["label"] for pair in answer} == set(server.engine.labels)
        scores = [pair["score"] for pair in answer]
        assert scores == sorted(scores, reverse=True)
    if sent == "rain":
        (expected,) = server.engine.predict(["rain"])
        raw = server.post("/predict", {"inputs": sent, "raw_scores": True})
        logits = dict(zip(server.engine.labels, expected.logits, strict=True))
        found = [(pair["label"], pair["score"]) for pair in server.check("/predict", raw)]
        assert [name for name, _ in found] == [n for n, _ in expected.top(server.engine.labels)]
        assert_close([score for _, score in found], [logits[name] for name, _ in found])


def test_what_fpabee_adds(server: Server) -> None:
    asked = {"input": ["rain", "sun"], "max_exit": 1, "deadline_ms": 1e6}
    (first, _) = server.post("/classify", asked).json()["data"]
    assert (first["exit"], first["deadline_limited"], first["deadline_missed"]) == (1, False, False)
    asked = {"input": "rain", "deadline_ms": 0}
    (late,) = server.post("/classify", asked).json()["data"]
    assert (late["exit"], late["deadline_missed"]) == (1, True)


def test_the_http_classify_of_semantic_router(server: Server) -> None:
    """`http_classifier.go` posts this, and takes only a bare list with all labels that sum to 1."""
    response = server.post("/classify", {"inputs": "rain"}, Accept="application/json")
    assert response.status_code == 200
    scores = {each["label"]: each["score"] for each in server.check("/classify", response)}
    assert scores.keys() == set(server.engine.labels)
    assert all(0 <= score <= 1 for score in scores.values())
    if not server.engine.multi_label:
        assert sum(scores.values()) == pytest.approx(1, abs=0.02)
    assert response.headers["X-Fpabee-Revision"] == server.engine.revision


def test_answers_say_what_decides(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder = engine_copy()
    first = read_manifest(folder).task.labels[0]
    decides = (0.7, *(1.0 for _ in read_manifest(folder).task.labels[1:]))
    before = sha256_of(folder / MANIFEST_NAME)
    set_points(folder, default="a", a=Confidence(threshold=0.9, label_thresholds=decides))
    with serving(folder) as server:
        found = server.post("/classify", {"input": "rain"}).json()
        assert (found["operating_point"], found["label_thresholds"]) == ("a", {first: 0.7})
        assert found["revision"] == server.engine.revision != before


def test_full_depth_is_certified_for_its_thresholds(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy(default="a", a=Budget(exit=3))
    label = read_manifest(folder).task.labels[0]
    certify(folder, a=Certificate(confidence=95, promises=(), label_thresholds={label: 0.7}))
    with Engine.load(folder) as engine:
        assert engine.label_thresholds == {label: 0.7}
    with Engine.load(folder, rule=Budget(exit=3)) as engine:
        assert engine.label_thresholds == {}


@pytest.mark.parametrize("path", ["/classify", "/predict"])
@given(data=st.data())
def test_every_answer_is_in_the_schema(server: Server, path: str, data: st.DataObject) -> None:
    """Requests around what the schema allows: it says which are refused, and describes answers."""
    operation = server.schema["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    name = "ClassifyRequest" if path == "/classify" else "PredictRequest"
    fields = sorted(server.schema["components"]["schemas"][name]["properties"])
    text = st.sampled_from(["rain", "", "\0", "a film"])
    value = st.one_of(
        *(st.none(), st.booleans(), st.integers(-1, 3), st.just(1e6), text),
        *(st.lists(text, max_size=3), st.lists(st.lists(text, max_size=3), max_size=3)),
    )
    needed = "input" if path == "/classify" else "inputs"
    content = data.draw(
        st.dictionaries(st.sampled_from([*fields, "other"]), value, max_size=3).flatmap(
            lambda other: st.one_of(st.just(other), value.map(lambda v: other | {needed: v}))
        )
    )
    response = server.post(path, content)
    server.check(path, response)
    full = schema | {"components": server.schema["components"]}
    is_valid = Strict(full).is_valid(content)
    if not is_valid:
        assert response.status_code == 400
    elif response.status_code != 200:
        # What a schema cannot say: exits of this model, and which lists are pairs.
        assert response.status_code == 400
        assert response.json()["error_type"] in ("InputError", "RuleError")


TOO_MANY = b'{"input": [' + b'"a", ' * 999_999 + b'"a"]}'


@pytest.mark.parametrize(
    ("path", "status", "says", "content"),
    [
        ("/classify", 400, "truncated", b""),
        ("/classify", 400, "malformed", b"{input: 5}"),
        ("/classify", 400, "UTF-8", b'{"input": "\xff"}'),
        ("/classify", 400, "", b'{"input": "\\ud800"}'),
        ("/classify", 400, "unknown field `temperature`", {"input": "a", "temperature": 1}),
        ("/classify", 400, "", {"input": "a", "extra": json.loads("[" * 500 + "]" * 500)}),
        ("/classify", 400, "$.input[0]", {"input": [None]}),
        ("/classify", 400, "length 2", {"input": [["a", "b", "c"]]}),
        ("/classify", 400, "exit", {"input": "a", "max_exit": 99}),
        ("/classify", 400, "max_exit", {"input": "a", "max_exit": 10**30}),
        ("/classify", 400, "range", b'{"input": "a", "deadline_ms": 1e999}'),
        ("/classify", 400, "", '{"input": "a"}'.encode("utf-16")),
        ("/classify", 413, "5 texts, expected at most 3", {"input": ["a"] * 5}),
        ("/classify", 413, "more than 5000 bytes", TOO_MANY),
        ("/predict", 400, "", {"inputs": []}),
        ("/predict", 400, "", {"inputs": ["a", "b", "c"]}),
        ("/predict", 400, "", {"inputs": [[], ["a"]]}),
        ("/predict", 400, "", {"inputs": "a", "raw_scores": 1}),
        ("/predict", 400, "Left", {"inputs": "a", "truncation_direction": "Left"}),
        ("/predict", 400, "", {"inputs": "rain " * 100, "truncate": False}),
        ("/predict", 413, "", {"inputs": [["a"]] * 5}),
    ],
)
def test_bad_requests(server: Server, path: str, status: int, says: str, content: Any) -> None:
    response = server.post(path, content)
    assert response.status_code == status, response.text
    found = server.check(path, response)
    assert says.casefold() in found["error"].casefold()
    assert "Traceback" not in response.text
    assert server.post("/classify", {"input": "still fine"}).status_code == 200
    assert server.scheduler._unanswered == 0


def test_other_refusals(server: Server) -> None:
    wrong_type = server.post("/classify", {"input": "a"}, **{"Content-Type": "text/plain"})
    for status, response, says in [
        (415, wrong_type, "expected application/json"),
        (404, server.client.get("/nothing"), "no address /nothing -> use one of /classify, "),
        (404, server.client.post("/" + "x" * 9999), "/openapi.json"),
        (405, server.client.get("/classify"), "/classify does not take the method GET -> use POST"),
        (405, server.client.post("/health"), "use GET or HEAD"),
    ]:
        assert response.status_code == status
        assert set(response.json()) == {"error", "error_type"}
        assert says in response.json()["error"]
    assert server.schema["paths"]["/classify"]["post"]["responses"]["415"]


def test_a_body_without_a_length_is_also_limited(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    response = server.client.post("/classify", content=chunks(), headers=HEADERS)
    assert response.status_code == 413


def test_a_full_queue(engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engines["bert"], max_rows=1) as server:
        with monkeypatch.context() as patch:
            # It is in vain for a request that is refused.
            patch.setattr(server.engine.core, "encode", None)
            response = server.post("/classify", {"input": ["a", "b"]})
        assert response.status_code == 429
        assert response.headers["Retry-After"] == "1"
        assert server.check("/classify", response)["error_type"] == "OverloadedError"
        assert server.post("/classify", {"input": "a"}).status_code == 200
        assert "fpabee_refused_rows_total 2.0" in server.client.get("/metrics").text
        server.scheduler.close()
        assert server.client.get("/health").status_code == 503
        response = server.post("/classify", {"input": "a"})
        assert (response.status_code, response.json()["error_type"]) == (503, "BackendError")


@pytest.mark.parametrize("error", [MemoryError("secret"), BackendError("it failed", "restart")])
def test_a_failing_model(
    engines: Mapping[str, Path],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(engines["bert"]) as server:
        with monkeypatch.context() as patch:
            patch.setattr(HostExecution, "begin", Mock(side_effect=error))
            response = server.post("/classify", {"input": ["a", "b"]})
            assert response.status_code == 500
            found = server.check("/classify", response)
            assert "secret" not in response.text
            assert ("it failed" in found["error"]) == isinstance(error, BackendError)
            assert ("it failed" in caplog.text) == isinstance(error, BackendError)
            assert "\nfpabee_failed_rows_total 0.0\n" not in server.client.get("/metrics").text
        assert server.post("/classify", {"input": "a"}).status_code == 200


def test_a_gpu_that_has_failed(made: Double, caplog: pytest.LogCaptureFixture) -> None:
    """A balancer sends requests elsewhere, and a supervisor starts the process again."""
    with serving(made.folder, target=made.target) as server:
        assert server.post("/classify", {"input": "a"}).status_code == 200
        assert server.client.get("/health").status_code == 200
        made.cuda.error = 700
        made.cuda.fails_at["run"] = 1
        # TensorRT does not say why, so the answer may come before the driver is asked.
        assert server.post("/classify", {"input": "a"}).status_code in (500, 503)
        assert "segment" in caplog.text, "what failed first is in the log"
        for _ in range(2):
            response = server.post("/classify", {"input": "a"})
            assert response.status_code == 503
            assert "700" in server.check("/classify", response)["error"]
            health = server.client.get("/health")
            assert health.status_code == 503
            assert "700" in health.json()["error"]


def test_a_watched_promise_is_in_metrics_and_info(promised: Callable[..., Path]) -> None:
    folder = promised(early=Budget(exit=1))
    texts = [f"rain {word}" for word in WORDS]
    with serving(folder) as server:
        assert server.client.get("/info").json()["watched"] is None
        assert "fpabee_watched" not in server.client.get("/metrics").text
    with serving(folder, watch=100.0) as server:
        assert '\nfpabee_promise_broken{operating_point="early"} 0.0\n' in (
            server.client.get("/metrics").text
        )
        server.engine.predict(texts * 20)
        watched = watched_by(server.engine)
        assert 0 < watched.changed_answers < watched.rows
        text = server.client.get("/metrics").text
        low, high = watched.interval
        point = 'operating_point="early"'
        for line in (
            f"watched_rows_total{{{point}}} {20 * len(texts)}.0",
            f"watched_changed_answers_total{{{point}}} {watched.changed_answers}.0",
            f'watched_changed_share{{of="estimate",{point}}} {watched.estimate}',
            f'watched_changed_share{{of="low",{point}}} {low}',
            f'watched_changed_share{{of="high",{point}}} {high}',
            f'watched_changed_share{{of="permitted",{point}}} 0.01',
            f"promise_broken{{{point}}} 1.0",
        ):
            assert f"\nfpabee_{line}\n" in text
        info = server.client.get("/info").json()["watched"]
        assert info["rows"] == watched.rows
        assert info["interval"] == [low, high]
        assert info["is_broken"] is True


def test_metrics_info_health_and_page(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy(default="two", two=Budget(exit=2))  # its rows stopped at exit 1, it says
    with serving(folder) as server:
        assert "\nfpabee_drift NaN\n" in server.client.get("/metrics").text
        server.post("/classify", {"input": ["a", "b", "c"]})
        server.post("/classify", {"input": "d", "deadline_ms": 0})
        server.engine.predict(["e"])
        none = np.zeros(1, np.bool_)
        row = Settled.at(2, np.zeros(1), np.zeros((1, 4), np.float32), ~none)
        server.metrics.answered(row, none, [0.1])
        text = server.client.get("/metrics")
        assert text.headers["Content-Type"].startswith("text/plain")
        for line in (
            'fpabee_rows_total{exit="1"} 1.0',
            'fpabee_rows_total{exit="2"} 4.0',
            "fpabee_queue_seconds_count 4.0",
            "fpabee_answer_seconds_count 5.0",
            "fpabee_batch_rows_sum 7.0",
            "fpabee_deadline_limited_rows_total 2.0",
            "fpabee_deadline_missed_rows_total 1.0",
            "fpabee_drift 0.8",
        ):
            assert f"\n{line}\n" in text.text
        info = server.client.get("/info").json()
        assert (info["layers"], info["labels"]) == (3, list(server.engine.labels))
        assert server.client.get("/health").json() == {"status": "ok"}
        page = server.client.get("/")
        assert page.headers["Content-Type"].startswith("text/html")
        assert "<form" in page.text
