"""Requests may name the whole address, as those to a proxy do (RFC 9112, 3.2.2)."""

from __future__ import annotations

import http.client
import json

import pytest

from .test_slow_clients import Serving, connected
from .test_slow_clients import serving as serving  # the fixture


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/info", 200),
        ("http://localhost/info", 200),
        ("HTTP://127.0.0.1:8000/info?a=http://b/c", 200),
        ("https://LOCALHOST:8000/info", 200),
        ("http://localhost", 200),
        ("http://localhost?a", 200),
        ("http://localhost/nothing", 404),
        ("http://localhost//info", 404),
        ("ftp://localhost/info", 404),
        ("//localhost/info", 404),
        ("http://evil.example/info", 421),
        ("http:///info", 421),
        ("http://[::1/info", 404),
    ],
)
def test_the_address_decides_the_path_and_the_host(
    serving: Serving, target: str, status: int
) -> None:
    """Even if the header `Host` has another name."""
    sent = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with serving(hosts=["localhost"]) as (port, _, _), connected(port, sent) as client:
        response = http.client.HTTPResponse(client)
        response.begin()
        content = response.read()
        assert response.status == status
        if target.lower().partition("?")[0].endswith("/info") and status == 200:
            assert json.loads(content)["model_id"] == "tiny"


def test_a_whole_address_wins_over_the_header(serving: Serving) -> None:
    sent = b"GET http://localhost/info HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    with serving(hosts=["localhost"]) as (port, _, _), connected(port, sent) as client:
        assert client.recv(12) == b"HTTP/1.1 200"
