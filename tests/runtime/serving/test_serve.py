"""`fpabee-serve` as a process: signals, closed sockets, ports, and folders that do not load."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from ..running import Run, check_refused

WAIT = 60


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fpabee", "serve", str(folder), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert " listens on http://127.0.0.1:" in line, line + process.stderr.read()
        yield process, int(line.rpartition(":")[2])
    finally:
        process.kill()
        process.wait(WAIT)
        process.stderr.close()


def ask(port: int, path: str, content: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    body = None if content is None else json.dumps(content)
    method = "GET" if body is None else "POST"
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.read().decode()
    connection.close()
    return response.status, found if path == "/metrics" else json.loads(found)


def local(app: Starlette) -> TestClient:
    return TestClient(app, "http://localhost")


@pytest.mark.slow
def test_a_server_under_load_stops_gracefully(bert: Path) -> None:
    """Requests that have begun are answered, and clients that left disturb nobody."""
    with served(bert, "--max-texts", "300") as (process, port):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as left:
                body = json.dumps({"input": ["rain " * 40] * 20}).encode()
                head = (
                    "POST /classify HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
                )
                left.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with socket.create_connection(("127.0.0.1", port)) as broken:
            broken.sendall(b"\x00\xff nonsense\r\n\r\n")
            assert b"400" in broken.recv(1000)
        answered: list[int] = []
        started = threading.Event()

        def client(_: int) -> None:
            while True:
                try:
                    status, found = ask(port, "/classify", {"input": ["rain", "sun"] * 20})
                except (OSError, http.client.HTTPException):
                    return  # the port is closed
                assert status == 200
                assert len(found["data"]) == 40
                answered.append(status)
                if len(answered) > 20:
                    started.set()

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            assert started.wait(WAIT)
            process.send_signal(signal.SIGTERM)
            process.wait(WAIT)
            for each in clients:
                each.result(WAIT)
        assert process.stderr is not None
        assert process.stderr.read() == "Invalid HTTP request received.\n"
        assert process.returncode == 0


def test_a_port_in_use(bert: Path, serve: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check_refused(serve(bert, "--port", str(port)), str(port), "in use", "--port", "--host")


def test_a_host_that_is_not_ours(bert: Path, serve: Run) -> None:
    check_refused(serve(bert, "--host", "203.0.113.1", "--port", "0"), "203.0.113.1", "--host")


def test_an_empty_host_does_not_mean_all_addresses(
    bert: Path, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.runtime.serving.server.serve", lambda *_: None)
    check_refused(serve(bert, "--host", "", "--port", "0"), "empty", "--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("options", "accepted", "refused"),
    [
        ([], ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "[0:0::1]", ""],
         ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.7", "::",
          "[::1", "[evil.example]", "evil.example:localhost", "localhost@evil.example"]),
        (["--allowed-host", "texts.example.com", "--allowed-host", "10.0.0.7",
          "--allowed-host", "FD00:0::1"],
         ["[fd00::1]:8000", "texts.example.com:443", "Texts.Example.Com", "10.0.0.7", "localhost"],
         ["a.texts.example.com", "10.0.0.8", "evil.example"]),
        (["--host", "0.0.0.0"], ["10.0.0.7:8000", "[fe80::1]", "localhost"],
         ["evil.example", "10.0.0.7.evil.example", "0x7f000001"]),
        (["--host", "0.0.0.0", "--allowed-host", "*"], ["evil.example", "10.0.0.7"], []),
    ],
    ids=["default", "allowed", "all addresses", "all names"],
)  # fmt: skip
def test_requests_that_name_another_host_are_refused(
    options: list[str],
    accepted: list[str],
    refused: list[str],
    bert: Path,
    serve: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a web page could reach the server under a name of its own (DNS rebinding)."""

    def asks(app: Starlette, *_: object) -> None:
        client = TestClient(app)

        def status(path: str, *hosts: str) -> int:
            return client.get(path, headers=[("Host", host) for host in hosts]).status_code

        assert {host: status("/info", host) for host in accepted} == dict.fromkeys(accepted, 200)
        assert {host: status("/info", host) for host in refused} == dict.fromkeys(refused, 421)
        for host in refused:
            assert status("/health", host) == 200
            assert status("/info", "localhost", host) == 421

    monkeypatch.setattr("fpabee.runtime.serving.server.serve", asks)
    done = serve(bert, "--port", "0", *options)
    assert done.code == 0
    assert done.err.count("warning: everybody who can reach") == ("0.0.0.0" in options)


def test_an_allowed_host_that_is_no_name(bert: Path, serve: Run) -> None:
    refused = serve(bert, "--port", "0", "--allowed-host", "http://texts.example.com")
    check_refused(refused, "'http://texts.example.com'", "--allowed-host")


def test_a_signal_as_soon_as_the_server_listens(
    bert: Path, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr("fpabee.runtime.serving.server.serve", waits)
    assert serve(bert, "--port", "0").code == 0


def test_metrics_begin_at_zero(
    without_special_tokens: Path, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warming up counts nothing, and needs no text that the tokenizer must take."""
    found: list[str] = []

    def asks(app: Starlette, *_: object) -> None:
        found.extend(local(app).get("/metrics").text.splitlines())

    monkeypatch.setattr("fpabee.runtime.serving.server.serve", asks)
    assert serve(without_special_tokens, "--port", "0").code == 0
    counts = [line for line in found if "_total" in line or "_count" in line]
    assert counts
    assert all(line.startswith("#") or line.endswith(" 0.0") for line in counts)


@pytest.mark.usefixtures("short_target")
def test_texts_longer_than_the_target_takes_are_truncated(
    bert: Path, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def asks(app: Starlette, *_: object) -> None:
        client = local(app)
        found.append(client.get("/info").json()["max_input_length"])
        asked = {"input": ["rain " * 20, "sun"]}
        found.extend(client.post("/classify", json=asked).json()["data"])

    monkeypatch.setattr("fpabee.runtime.serving.server.serve", asks)
    assert serve(bert, "--port", "0").code == 0
    longest, long, short = found
    assert (longest, long["truncated"], short["truncated"]) == (16, True, False)


def test_a_folder_that_does_not_load(tmp_path: Path, serve: Run) -> None:
    check_refused(serve(tmp_path), "manifest.json")


def test_a_damaged_segment_is_found_at_the_start(
    engine_copy: Callable[..., Path], serve: Run
) -> None:
    folder = engine_copy()
    damaged = sorted((folder / "onnx").rglob("*.onnx"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    check_refused(serve(folder, "--port", "0"), damaged.name)


def test_the_serving_packages_are_optional(bert: Path) -> None:
    """`import fpabee.runtime` and the scheduler need none of them."""
    code = (
        "import sys\n"
        "import fpabee.runtime, fpabee.runtime.serving\n"
        "new = {'starlette', 'uvicorn', 'prometheus_client', 'anyio', 'asyncio'}\n"
        "print(sorted(new & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['asyncio']")
    code = "import sys, fpabee.runtime; assert 'fpabee.runtime.serving' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
