"""Refusals reach clients that send their whole request before they read."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fpabee.runtime.serving import connections

from ..running import until
from .test_serve import ask, served
from .test_slow_clients import HEAD, LIMITS, WAIT, Serving, connected, refusal
from .test_slow_clients import serving as serving  # the fixture

SIZE = 2**24  # more than the system keeps for a connection
PATIENT = replace(LIMITS, max_body=2**20, body_seconds=WAIT)
LENGTH = b"Content-Length: %d\r\n\r\n" % SIZE
CHUNK = b"100000\r\n" + b" " * 2**20 + b"\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def answer(client: socket.socket) -> tuple[int, str]:
    """Status and message of a refusal, after which the server sends no more."""
    response = http.client.HTTPResponse(client)
    response.begin()
    content = json.loads(response.read())
    assert response.headers.get_all("Connection") == ["close"]
    assert client.recv(1) == b""
    return response.status, content["error"]


@pytest.mark.parametrize("also", [b"", b"Connection: close\r\n"], ids=["keeps alive", "closes"])
@pytest.mark.parametrize(
    ("head", "status", "says"),
    [
        (HEAD, 413, "more than 1048576 bytes"),
        (HEAD.replace(b"application/json", b"text/plain"), 415, "text/plain"),
        (HEAD.replace(b"/classify", b"/nothing"), 404, "no address /nothing"),
        (HEAD.replace(b"/classify", b"/health"), 405, "method POST"),
        (HEAD.replace(b"Host: x", b"Host: evil.example"), 421, "host"),
    ],
)
def test_a_body_that_is_not_wanted(
    serving: Serving, head: bytes, status: int, says: str, also: bytes
) -> None:
    with (
        serving(PATIENT, hosts=["x"]) as (port, _, _),
        connected(port, head + also + LENGTH + b" " * SIZE) as client,
    ):
        found, message = answer(client)
        assert found == status
        assert says in message


@pytest.mark.parametrize("path", [b"/classify", b"/nothing"])
def test_nobody_is_told_to_send_a_body_that_is_not_wanted(serving: Serving, path: bytes) -> None:
    head = HEAD.replace(b"/classify", path) + b"Expect: 100-continue\r\n"
    with serving(PATIENT) as (port, _, _), connected(port, head + LENGTH) as client:
        assert client.recv(12) == b"HTTP/1.1 413" if path == b"/classify" else b"HTTP/1.1 404"


@pytest.mark.parametrize(("all_bodies", "status"), [(2**26, 413), (0, 429)])
def test_a_body_of_unknown_length(serving: Serving, all_bodies: int, status: int) -> None:
    """It is refused when it is too large, or when no memory is left for it."""
    limits = replace(PATIENT, all_bodies=all_bodies)
    with serving(limits) as (port, _, _), connected(port, CHUNKED + CHUNK * 16) as client:
        assert answer(client)[0] == status


@pytest.mark.parametrize("head", [CHUNKED, CHUNKED.replace(b"classify", b"nothing")])
def test_a_broken_body(serving: Serving, head: bytes) -> None:
    with (
        serving(replace(PATIENT, max_body=2**30)) as (port, _, _),
        connected(port, head + b"nonsense\r\n" + b" " * SIZE) as client,
    ):
        assert "chunk" in refusal(client)


def test_a_broken_head(serving: Serving) -> None:
    sent = b"\x00\xff nonsense\r\n\r\n" + b" " * SIZE
    with serving(PATIENT) as (port, _, _), connected(port, sent) as client:
        assert "request line" in refusal(client)


def test_a_body_that_takes_too_long(serving: Serving) -> None:
    limits = replace(LIMITS, body_seconds=2)
    with serving(limits) as (port, _, _), connected(port, HEAD + LENGTH + b" " * 1000) as client:
        client.recv(1, socket.MSG_PEEK)
        client.sendall(b" " * (SIZE - 1000))
        assert answer(client)[0] == 408


def test_a_stop_while_a_body_arrives(serving: Serving) -> None:
    with (
        serving(replace(PATIENT, stop_seconds=0)) as (port, server, _),
        connected(port, HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 1000) as client,
    ):
        until(lambda: server.server_state.connections)
        server.should_exit = True
        client.recv(1, socket.MSG_PEEK)
        client.sendall(b" " * 500_000)
        assert answer(client) == (503, "the server is stopping")


@pytest.mark.parametrize("limit", ["seconds", "bytes"])
def test_a_client_that_never_stops_is_cut_off(
    serving: Serving, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = PATIENT
    if limit == "seconds":
        limits = replace(LIMITS, max_body=2**20)
    else:
        monkeypatch.setattr(connections, "_MOST_UNREAD", 2**23)
    head = HEAD + b"Content-Length: 20000000000\r\n\r\n"
    with serving(limits) as (port, server, _), connected(port, head) as client:
        assert answer(client)[0] == 413
        sent = 0
        began = time.monotonic()
        with suppress(ConnectionError):
            while True:
                sent += client.send(b" " * 10_000)
                time.sleep(0.05 if limit == "seconds" else 0)
        if limit == "seconds":
            assert LIMITS.body_seconds / 2 < time.monotonic() - began < WAIT / 2
        else:
            assert sent > 2**23
        until(lambda: not server.server_state.connections)


def test_a_client_that_leaves_before_the_end_of_its_answer(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system then refuses to end the connection in steps."""
    with serving(PATIENT) as (port, server, _), monkeypatch.context() as patch:
        failing = Mock(side_effect=OSError(errno.ENOTCONN, "not connected"))
        patch.setattr(_SelectorSocketTransport, "write_eof", failing)
        with connected(port, HEAD + LENGTH):
            until(lambda: failing.called)
        until(lambda: not server.server_state.connections)


def test_an_idle_client_is_cut_off(serving: Serving) -> None:
    limits = replace(LIMITS, max_body=2**20)
    with serving(limits) as (port, server, _), connected(port, HEAD + LENGTH) as client:
        assert answer(client)[0] == 413
        until(lambda: not server.server_state.connections)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [2, 5, 50])
def test_each_of_many_clients_reads_why(bert: Path, megabytes: int) -> None:
    """Beside 64 busy callers."""
    count = megabytes * 10**6 // 5
    body = b'{"input": [' + b'"x", ' * (count - 1) + b'"x"]}'
    stops = threading.Event()

    def calls(port: int) -> None:
        while not stops.is_set():
            assert ask(port, "/classify", {"input": "rain"})[0] == 200

    def posts(port: int) -> Any:
        sent = urllib.request.Request(f"http://127.0.0.1:{port}/classify", body)
        sent.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(sent, timeout=WAIT)
        with raised.value as response:
            return response.status, json.loads(response.read())["error"]

    with served(bert) as (_, port), ThreadPoolExecutor(64) as pool:
        busy = [pool.submit(calls, port) for _ in range(64)]
        try:
            for _ in range(200 if megabytes < 50 else 20):
                assert posts(port) == (413, "the body has more than 1048576 bytes")
        finally:
            stops.set()
        for each in busy:
            each.result(WAIT)
