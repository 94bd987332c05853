"""`fpabee-serve` as a process: signals, closed sockets, ports, and folders that do not load."""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fpabee.runtime import Entropy
from fpabee.runtime.artifact.folder import EnginesFolder

from ...conftest import WORDS
from ...doubles.device import Double
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


@pytest.fixture
def asked(serve: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command, and a function with a client of its server in place of serving."""

    def run(ask: Callable[[TestClient], Any], folder: Path, *options: str) -> tuple[Any, str]:
        found: list[Any] = []

        def instead(app: Starlette, *_: object) -> None:
            found.append(ask(TestClient(app, "http://localhost")))

        monkeypatch.setattr("fpabee.runtime.serving.server.serve", instead)
        done = serve(folder, "--port", "0", *options)
        assert done.code == 0, done.err
        return found[0] if found else None, done.err

    return run


@pytest.mark.slow
def test_a_server_under_load_stops_gracefully(bert: Path) -> None:
    """Requests that have begun are answered, and clients that left disturb nobody."""
    with served(bert) as (process, port):
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit and /proc")
def test_more_connections_than_files_may_be_open(bert: Path) -> None:
    with served(bert) as (process, port):
        files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files + 70, files + 200))
        with ExitStack() as clients:
            for _ in range(100):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", port), WAIT))
            with suppress(ConnectionError):
                assert client.recv(1) == b""
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files + 200, files + 200))
        assert ask(port, "/classify", {"input": "rain"})[0] == 200
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT)
        assert process.stderr is not None
        log = process.stderr.read()
        assert "connections are refused" in log
        assert "Traceback" not in log


def test_a_port_in_use(bert: Path, serve: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check_refused(serve(bert, "--port", str(port)), str(port), "in use", "--port", "--host")


@pytest.mark.parametrize(
    ("options", "accepted", "refused"),
    [
        ([], ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "[0:0::1]", "10.0.0.7:80"],
         ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "::", "[::1",
          "[evil.example]", "evil.example:localhost", "localhost@evil.example", "0x7f000001"]),
        (["--allowed-host", "Texts.example.com", "--allowed-host", "FD00:0::1"],
         ["[fd00::1]:8000", "texts.example.com:443", "Texts.Example.Com", "localhost"],
         ["a.texts.example.com", "evil.example"]),
        (["--host", "0.0.0.0", "--allowed-host", "*"], ["evil.example", "10.0.0.7"], []),
    ],
    ids=["default", "allowed", "all names"],
)  # fmt: skip
def test_requests_that_name_another_host_are_refused(
    options: list[str],
    accepted: list[str],
    refused: list[str],
    bert: Path,
    asked: Callable[..., Any],
) -> None:
    """Otherwise a web page could reach the server under a name of its own (DNS rebinding)."""

    def asks(client: TestClient) -> None:
        def status(path: str, *hosts: str) -> int:
            return client.get(path, headers=[("Host", host) for host in hosts]).status_code

        paths = "/", "/classify", "/info", "/metrics", "/openapi.json", "/nothing"
        assert {host: status("/info", host) for host in accepted} == dict.fromkeys(accepted, 200)
        for host in refused:
            assert {path: status(path, host) for path in paths} == dict.fromkeys(paths, 421)
            assert status("/health", host) == 200
            assert status("/info", "localhost", host) == 421

    _, err = asked(asks, bert, *options)
    assert err.count("warning: everybody who can reach") == ("0.0.0.0" in options)


def test_a_signal_as_soon_as_the_server_listens(bert: Path, asked: Callable[..., Any]) -> None:
    def stops(_: TestClient) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "the signal was lost"

    assert asked(stops, bert)[0] is None


def test_metrics_begin_at_zero(without_special_tokens: Path, asked: Callable[..., Any]) -> None:
    """Warming up counts nothing, and needs no text that the tokenizer must take."""
    text, _ = asked(lambda client: client.get("/metrics").text, without_special_tokens)
    counts = [line for line in text.splitlines() if "_total" in line or "_count" in line]
    assert counts
    assert all(line.startswith("#") or line.endswith(" 0.0") for line in counts)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_server_on_a_gpu_has_prepared_all_shapes(
    backend: str,
    double: Callable[..., Double],
    asked: Callable[..., Any],
) -> None:
    """A burst of texts of mixed lengths, which stop at different exits, waits for no context."""
    shapes: dict[str, Any] = {"batch_sizes": (1, 4, 16), "sequence_lengths": (8, 16, 32, 64)}
    made = double(backend=backend, batch=(1, 4, 16), **shapes)
    rule = Entropy(threshold=0.3).to_dict()
    EnginesFolder.read(made.folder).with_manifest(default_rule=rule).write()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(100)]

    def asks(client: TestClient) -> tuple[int, int]:
        before = len(made.trt.contexts)
        exits = set()
        for count in (1, 3, 40, 100):
            answers = client.post("/classify", json={"input": texts[:count]}).json()["data"]
            exits |= {answer["exit"] for answer in answers}
        assert len(exits) > 1
        return before, len(made.trt.contexts)

    (before, after), _ = asked(asks, made.folder, "--target", made.target)
    assert before == after > 0
    assert len(made.cuda.streams) == 0


def test_the_server_may_open_as_many_files_as_the_system_allows(
    bert: Path, asked: Callable[..., Any]
) -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, most), most))
    try:
        asked(lambda _: None, bert)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > min(512, most - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


@pytest.mark.usefixtures("short_target")
def test_texts_longer_than_the_target_takes_are_truncated(
    bert: Path, asked: Callable[..., Any]
) -> None:
    def asks(client: TestClient) -> tuple[int, Any]:
        answers = client.post("/classify", json={"input": ["rain " * 20, "sun"]}).json()["data"]
        return client.get("/info").json()["max_input_length"], answers

    (longest, (long, short)), _ = asked(asks, bert)
    assert (longest, long["truncated"], short["truncated"]) == (16, True, False)
