"""The load test counts what is answered and what is not."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import load_test
import pytest

from ..programs import printed, write_lines


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("rain\nturn on the light\n")
    return str(path)


def _rows(server: str, texts: str, *options: str) -> list[list[str]]:
    command = [server, "--input", texts, "--rate", "30", "--seconds", "0.4", *options]
    lines = printed(load_test.main, *command).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_server_is_started_and_answers_everything(
    engines: Mapping[str, Path], texts: str
) -> None:
    rows = _rows(str(engines["bert"]), texts, "--rate", "10", "--", "--threads", "1")
    assert [row[0] for row in rows] == ["30", "10"]
    for _, _, sent, errors, *times, layers in rows:
        assert int(sent) > 0
        assert errors == "0"
        assert 0 < float(times[0]) <= float(times[2])
        assert float(layers) == 3


def test_queries_are_counted_beside_others(
    ranking_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    for name, count in (("small", 2), ("large", 40)):
        query = {"query": "rain", "documents": ["the sun " * 20] * count}
        write_lines(tmp_path / f"{name}.jsonl", [query] * 2)
    options = ["--queries", "--beside", str(tmp_path / "large.jsonl")]
    folder = str(ranking_engines["bert"])
    ((_, _, sent, errors, *_, exits),) = _rows(folder, str(tmp_path / "small.jsonl"), *options)
    assert int(sent) > 0
    assert (errors, float(exits)) == ("0", 3)


def test_refused_requests_are_errors(texts: str) -> None:
    class Refuses(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(429)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            ((_, _, sent, errors, *_),) = _rows(address, texts)
        finally:
            server.shutdown()
    assert int(errors) == int(sent) > 0
