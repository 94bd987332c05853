"""Clients that send or read slowly hold neither the server nor a graceful stop."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from fpabee.runtime import Engine
from fpabee.runtime.encoding import EncodedRow, Text
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.metrics import Metrics
from fpabee.runtime.serving.server import STATUSES, ServerLimits, listen, make_app, serve

from .test_serve import ask

SECONDS = 0.5
LIMITS = ServerLimits(max_body=2**24, max_texts=50_000, body_seconds=SECONDS, stop_seconds=1)
WAIT = 60
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SLOW = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b'Content-Length: 500\r\n\r\n{"inp',
    "half a chunk": HEAD + b'Transfer-Encoding: chunked\r\n\r\n50\r\n{"in',
}


@contextmanager
def serving(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, uvicorn.Server, threading.Thread]]:
    """The port of a server in this process, with what stops it as a signal would."""
    made: list[uvicorn.Server] = []
    begin = uvicorn.Server.__init__

    def keep(server: uvicorn.Server, config: uvicorn.Config) -> None:
        begin(server, config)
        made.append(server)

    monkeypatch.setattr(uvicorn.Server, "__init__", keep)
    metrics = Metrics(engine)
    with Scheduler(engine, 100_000, metrics) as scheduler, listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        app = make_app(engine, scheduler, metrics, LIMITS, "tiny")
        thread = threading.Thread(target=serve, args=[app, listener, LIMITS])
        thread.start()
        try:
            assert ask(port, "/health")[0] == 200
            yield port, made[0], thread
        finally:
            made[0].should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.fixture
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"]) as engine:
        yield engine


def dribble(client: socket.socket, sent: bytes) -> bytes:
    """Send a byte every tenth of a second after the first ones; returns what came back."""
    client.settimeout(WAIT)
    found = b""
    client.sendall(sent)
    ends = time.monotonic() + WAIT
    client.settimeout(0.1)
    while time.monotonic() < ends:
        try:
            client.sendall(b"x")
            part = client.recv(10_000)
        except TimeoutError:
            continue
        except OSError:  # cut off
            return found
        if not part:
            return found
        found += part
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize("kind", SLOW)
def test_a_client_that_sends_slowly(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with (
        serving(engine, monkeypatch) as (port, _, _),
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        found = [b""]
        thread = threading.Thread(target=lambda: found.append(dribble(client, SLOW[kind])))
        thread.start()
        assert ask(port, "/classify", {"input": "rain"})[0] == 200
        thread.join(2 * WAIT)
        if "head" in kind or not SLOW[kind]:
            assert b"200" not in found[-1]
        else:
            head, _, body = found[-1].partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert json.loads(body)["error_type"] == "InvalidRequest"
        assert ask(port, "/classify", {"input": "rain"})[0] == 200


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (HEAD + b"X: ", b"x"),
        (HEAD, b"a: b\r\n"),
        (b"GET /", b"x"),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
        (CHUNKED + b"0\r\nX: ", b"x"),
        (CHUNKED + b"1;x=", b"x"),
    ],
)
def test_a_request_without_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, first: bytes, then: bytes
) -> None:
    """A client cannot fill the memory with its head, address, trailers or chunk extensions."""
    # The limit on time is long, so that only the limit on bytes can end the request.
    limits = replace(LIMITS, max_body=2**16, body_seconds=10 * WAIT)
    monkeypatch.setitem(globals(), "LIMITS", limits)
    with (
        serving(engine, monkeypatch) as (port, _, _),
        socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client,
    ):
        with pytest.raises(OSError, match=r"reset|Broken|abort"):
            client.sendall(first + then * (2**26 // len(then)))
        assert ask(port, "/classify", {"input": "rain"})[0] == 200


def test_a_large_body_is_read_to_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that send everything before they read also get to know why it is refused."""
    monkeypatch.setitem(globals(), "LIMITS", replace(LIMITS, max_body=1000, body_seconds=WAIT))
    with serving(engine, monkeypatch) as (port, _, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/classify", b" " * 2**23, headers)
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error_type"] == "InvalidRequest"
        connection.close()


def test_a_client_that_does_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"input": ["a"] * 20_000, "max_exit": 1}).encode()
    with serving(engine, monkeypatch) as (port, server, _):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", port))
            client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            ends = time.monotonic() + WAIT
            while not server.server_state.connections and time.monotonic() < ends:
                time.sleep(0.01)
            while server.server_state.connections and time.monotonic() < ends:
                time.sleep(0.01)
            assert not server.server_state.connections
        assert ask(port, "/classify", {"input": "rain"})[0] == 200


def test_slow_clients_do_not_keep_the_server_from_stopping(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(engine, monkeypatch) as (port, server, thread),
        ExitStack() as clients,
    ):
        for sent in SLOW.values():
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(sent)
        ends = time.monotonic() + WAIT
        while len(server.server_state.connections) < len(SLOW) and time.monotonic() < ends:
            time.sleep(0.01)
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()


def test_a_slow_answer_is_no_slow_client(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may run for longer than a client may take to send it."""
    classify = Scheduler.classify

    async def slow(*arguments: object) -> object:
        await asyncio.sleep(4 * SECONDS)
        return await classify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "classify", slow)
    with serving(engine, monkeypatch) as (port, _, _):
        assert ask(port, "/classify", {"input": "rain"})[0] == 200


def test_health_answers_while_a_long_text_is_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, goes_on = engine.encode, threading.Event(), threading.Event()

    def slowly(texts: Sequence[Text]) -> list[EncodedRow]:
        begun.set()
        goes_on.wait(WAIT)
        return encode(texts)

    monkeypatch.setattr(engine, "encode", slowly)
    with serving(engine, monkeypatch) as (port, _, _), ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, port, "/classify", {"input": "rain " * 10_000})
        assert begun.wait(WAIT)
        assert ask(port, "/health")[0] == 200
        assert not long.done()
        goes_on.set()
        assert long.result(WAIT)[0] == 200


def test_a_request_that_outlasts_a_stop_gets_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = threading.Event()

    async def never(*_: object) -> None:
        runs.set()
        await asyncio.sleep(4 * WAIT)

    monkeypatch.setattr(Scheduler, "classify", never)
    with serving(engine, monkeypatch) as (port, server, thread), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(posted, port)
        assert runs.wait(WAIT)
        server.should_exit = True
        status, connection, found = asked.result(WAIT)
        assert (status, connection) == (503, "close")
        assert found == {"error": STATUSES[503], "error_type": "InvalidRequest"}
        thread.join(WAIT)
    assert "Traceback" not in caplog.text


def posted(port: int) -> tuple[int, str | None, object]:
    """Status, `Connection` and JSON of a response; any other content fails."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/classify", '{"input": "rain"}', headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers["Connection"], json.loads(content)
