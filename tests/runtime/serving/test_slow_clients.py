"""Clients that take their time, or send without end: others are answered, and a stop stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fpabee.runtime import Engine
from fpabee.runtime.encoding import Text
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.allowed_hosts import ANY_HOST
from fpabee.runtime.serving.connections import listen
from fpabee.runtime.serving.metrics import Metrics
from fpabee.runtime.serving.server import ServerLimits, Service, serve

from ...doubles.calls import before
from ..running import until
from .test_serve import ask

SECONDS = 0.5
LIMITS = ServerLimits(max_body=2**24, max_texts=50_000, body_seconds=SECONDS, stop_seconds=1)
WAIT = 60
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b'Content-Length: 500\r\n\r\n{"inp',
    "half a chunk": CHUNKED + b'50\r\n{"in',
}

# The port of a server in this process, the server, and the thread that it runs in.
Running = tuple[int, uvicorn.Server, threading.Thread]
Serving = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def serving(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Serving]:
    """Runs a server, which answers before and after a test, logs no traceback, and stops."""
    made: list[uvicorn.Server] = []
    before(monkeypatch, uvicorn.Server, "__init__", lambda server, _: made.append(server))

    @contextmanager
    def serving(
        limits: ServerLimits = LIMITS, hosts: Sequence[str] = (ANY_HOST,)
    ) -> Iterator[Running]:
        metrics = Metrics(engine)
        with Scheduler(engine, 100_000, metrics) as scheduler, listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
            app = Service(engine, scheduler, metrics, limits, "tiny", hosts).app
            thread = threading.Thread(target=serve, args=[app, listener, limits])
            thread.start()
            try:
                assert ask(port, "/health")[0] == 200
                yield port, made[0], thread
                if not made[0].should_exit:
                    assert ask(port, "/classify", {"input": "rain"})[0] == 200
            finally:
                made[0].should_exit = True
                thread.join(WAIT)
                assert not thread.is_alive()

    with Engine.load(engines["bert"]) as engine:
        yield serving
    assert "Traceback" not in caplog.text


def connected(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    client.sendall(sent)
    return client


def request(content: object) -> bytes:
    """A request to classify, as a client sends it."""
    body = json.dumps(content).encode()
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def refusal(client: socket.socket) -> str:
    """The error of a response with status 400, after which the connection is closed."""
    response = http.client.HTTPResponse(client)
    response.begin()
    content = json.loads(response.read())
    assert (response.status, response.headers["Connection"]) == (400, "close")
    assert content["error_type"] == "InvalidRequest"
    error: str = content["error"]
    return error


@pytest.mark.parametrize("kind", SLOW)
def test_a_client_that_sends_slowly(serving: Serving, kind: str) -> None:
    with serving() as (port, _, _), connected(port, SLOW[kind]) as client:
        found = b""
        client.settimeout(0.1)

        def is_cut_off() -> bool:
            """Send one more byte until an answer comes, and read what has come back."""
            nonlocal found
            try:
                if not found:  # a byte after the end would make the system drop what is unread
                    client.sendall(b"x")
                part = client.recv(10_000)
            except TimeoutError:
                return False
            except OSError:
                return True
            found += part
            return not part

        assert ask(port, "/classify", {"input": "rain"})[0] == 200
        until(is_cut_off)
        if kind in ("nothing", "half a head"):
            assert b"200" not in found
        else:
            head, _, body = found.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert json.loads(body)["error_type"] == "InvalidRequest"


def test_a_large_body_is_read_to_its_end(serving: Serving) -> None:
    """Clients that send everything before they read also get to know why it is refused."""
    with serving(replace(LIMITS, max_body=2**22, body_seconds=WAIT)) as (port, _, _):
        status, _, content = posted(port, b" " * 2**23)
        assert (status, content["error_type"]) == (413, "InvalidRequest")


def test_a_client_that_does_not_read(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    classify = Scheduler.classify

    async def same(scheduler: Scheduler, texts: Sequence[Text], *rest: object) -> object:
        (answer,) = await classify(scheduler, texts[:1], *rest)  # type: ignore[arg-type]
        return [answer] * len(texts)

    monkeypatch.setattr(Scheduler, "classify", same)
    with serving() as (port, server, _), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(request({"input": ["a"] * 20_000}))
        until(lambda: server.server_state.connections)
        until(lambda: not server.server_state.connections)


def test_requests_that_are_sent_before_the_answers_wait_with_the_client(serving: Serving) -> None:
    """Otherwise the server would read 256 KiB more of them for each one that it answers."""
    many = request({"input": "rain"}) * 2**17  # 17 MB
    with (
        serving() as (port, server, _),
        connected(port) as client,
        ThreadPoolExecutor(1) as pool,
        client.makefile("rb") as answers,
    ):
        sent = pool.submit(client.sendall, many)
        for _ in range(60):
            next(line for line in answers if b"HTTP/1.1 200 OK" in line)
        (connection,) = server.server_state.connections
        assert isinstance(connection, H11Protocol)
        assert 0 < len(connection.conn.trailing_data[0]) < 2**20
        client.shutdown(socket.SHUT_RDWR)
        assert isinstance(sent.exception(WAIT), OSError)


@pytest.mark.parametrize("later", [b"", request({"input": "sun"})], ids=["alone", "with another"])
def test_a_client_that_leaves_is_noticed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, later: bytes
) -> None:
    """Even if it has sent another request."""
    classify = Scheduler.classify
    runs = threading.Event()
    is_cancelled = threading.Event()

    async def waits(scheduler: Scheduler, texts: Sequence[Text], *rest: object) -> object:
        if "rain fell" in texts:
            runs.set()
            try:
                await asyncio.sleep(4 * WAIT)
            except asyncio.CancelledError:
                is_cancelled.set()
                raise
        return await classify(scheduler, texts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "classify", waits)
    with serving() as (port, _, _):
        with connected(port, request({"input": "rain fell"}) + later):
            assert runs.wait(WAIT)
        assert is_cancelled.wait(WAIT)


def answer_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let all answers take that long."""
    classify = Scheduler.classify

    async def slow(*arguments: object) -> object:
        await asyncio.sleep(seconds)
        return await classify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "classify", slow)


@pytest.mark.parametrize(
    ("version", "count", "extra", "answers"),
    [
        (b"1.1", 1, b"", [b"100", b"200"]),
        (b"1.1", 2, b"", [b"100", b"200", b"200"]),
        (b"1.1", 1, SLOW["half a body"], [b"100", b"200"]),
        (b"1.0", 1, b"", [b"200"]),
    ],
)
def test_a_client_that_ends_what_it_sends_gets_its_answers(
    serving: Serving,
    version: bytes,
    count: int,
    extra: bytes,
    answers: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `nc -N` does, before it has an answer; status 100 tells whether it has left."""
    answer_after(monkeypatch, SECONDS)
    sent = request({"input": "rain"}).replace(b"HTTP/1.1", b"HTTP/" + version) * count + extra
    with serving() as (port, _, _), connected(port, sent) as client:
        client.shutdown(socket.SHUT_WR)
        received = client.makefile("rb").read()
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == answers
    assert received.count(b'"labels"') == count


@pytest.mark.parametrize("kind", SLOW)
def test_a_client_that_ends_an_incomplete_request_is_cut_off(serving: Serving, kind: str) -> None:
    limits = replace(LIMITS, body_seconds=WAIT)
    with serving(limits) as (port, _, _), connected(port, SLOW[kind]) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""


def test_a_body_that_is_declared_too_large_is_not_read(serving: Serving) -> None:
    head = HEAD + b"Content-Length: 20000000000\r\n\r\n"
    limits = replace(LIMITS, body_seconds=WAIT)
    with serving(limits) as (port, _, _), connected(port, head) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_bodies_that_arrive_at_the_same_time_share_memory(serving: Serving) -> None:
    """Large ones are refused first."""
    limits = replace(LIMITS, max_body=200_000, all_bodies=500_000, body_seconds=WAIT)
    body = json.dumps({"input": "rain " * 30_000}).encode()
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    with serving(limits) as (port, _, _):
        with ExitStack() as clients:
            for _ in range(3):
                half = clients.enter_context(connected(port, head + body[:100_000]))
            until(lambda: posted(port, body)[0] == 429)
            assert ask(port, "/classify", {"input": "rain " * 200})[0] == 200
            half.sendall(body[100_000:])  # 350,000 are too many for it, too
            answer = http.client.HTTPResponse(half)
            answer.begin()
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            assert json.loads(answer.read())["error_type"] == "OverloadedError"
            for size in (60_000, 20_000, 5_000, 1_000, 200, 40, 10):  # until nothing is left
                for _ in range(8):
                    clients.enter_context(connected(port, head + body[:size]))
            until(lambda: posted(port, body[:70_000])[0] == 429)
            assert ask(port, "/classify", {"input": "rain"})[0] == 200, "small ones get through"
        until(lambda: posted(port, body)[0] == 200)


def test_uvloop_is_not_used(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would accept more connections than files may be open."""
    other = Mock()
    monkeypatch.setitem(sys.modules, "uvloop", other)
    with serving():
        pass
    assert not other.mock_calls


def test_small_chunks(serving: Serving) -> None:
    """Each takes time in the thread of all clients, so a body may only have 4096."""
    body = json.dumps({"input": "rain " * 500}).encode()
    ends = b"0\r\n\r\n"
    with serving() as (port, _, _):
        with connected(port, CHUNKED + b"".join(b"1\r\n%c\r\n" % x for x in body) + ends) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        with connected(port, CHUNKED + b"1\r\n \r\n" * 4097) as client:
            assert "4096 chunks" in refusal(client)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\x00\xff nonsense\r\n\r\n", "request line"),
        (b"GET / HTTP/1.1\r\n\r\n", "Host"),
        (HEAD + b"Content-Length: many\r\n\r\n", "Content-Length"),
        (CHUNKED + b"nonsense\r\n", "chunk"),
        (CHUNKED.replace(b"classify", b"nothing") + b"nonsense\r\n", "chunk"),
        (CHUNKED.replace(b"POST", b"HEAD") + b"nonsense\r\n", ""),
    ],
)
def test_what_is_not_http(serving: Serving, sent: bytes, reason: str) -> None:
    with serving() as (port, _, _), connected(port, sent) as client:
        if reason:
            assert reason in refusal(client)
        else:  # an answer to HEAD has no body
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
            assert (head[:13], body) == (b"HTTP/1.1 400 ", b"")


@pytest.mark.parametrize("at_once", [False, True], ids=["one signal", "two signals"])
def test_slow_clients_do_not_keep_the_server_from_stopping(serving: Serving, at_once: bool) -> None:
    with serving() as (port, server, thread), ExitStack() as clients:
        for sent in SLOW.values():
            clients.enter_context(connected(port, sent))
        until(lambda: len(server.server_state.connections) == len(SLOW))
        server.should_exit = True
        server.force_exit = at_once
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.mark.parametrize("rest", [b"1\r\nx\r\n" * 10_000, b"nonsense\r\n"])
def test_nonsense_after_the_answer(serving: Serving, rest: bytes) -> None:
    """The client gets an answer before it sends the end of its request."""
    head = CHUNKED.replace(b"classify", b"nothing")
    with serving() as (port, _, _), connected(port, head) as client:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 404
        assert answer.read().endswith(b"}")
        with suppress(ConnectionError):
            client.sendall(rest)
            assert client.recv(100) == b""


def test_a_slow_answer_is_no_slow_client(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may run for longer than a client may take to send it."""
    answer_after(monkeypatch, 3 * SECONDS)
    with serving():
        pass  # it is asked at the end


def test_a_request_that_outlasts_a_stop_gets_an_error(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = threading.Event()

    async def never(*_: object) -> None:
        runs.set()
        await asyncio.sleep(4 * WAIT)

    monkeypatch.setattr(Scheduler, "classify", never)
    with serving() as (port, server, thread), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(posted, port, b'{"input": "rain"}')
        assert runs.wait(WAIT)
        server.should_exit = True
        error = {"error": "the server is stopping", "error_type": "InvalidRequest"}
        assert asked.result(WAIT) == (503, "close", error)
        thread.join(WAIT)


def posted(port: int, body: bytes) -> tuple[int, str | None, dict[str, object]]:
    """Status, `Connection` and content of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, response.headers["Connection"], content
