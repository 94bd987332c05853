"""Triton itself: the server of the wheel `nvidia-pytriton`, in an environment that is made once.

The environment is in the user's cache directory. Its Python ignores PYTHONPATH, so a .pth file says
where fpabee is.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fpabee.runtime import Confidence, Engine, Prediction
from fpabee.runtime.backends.compiled_cache import folder as cache_folder
from fpabee.runtime.serving.triton import write_repository

from ...conftest import WORDS
from ...test_docs import ROOT
from .test_scheduler import check_same

pytestmark = pytest.mark.slow

WAIT = 120
# The wheel is built with numpy 1.
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime", "tokenizers", "msgspec")
LONG = [f"{word} sun play the " * 15 for word in WORDS]

# Appended to model.py: says how many rows were answered until the model was unloaded.
COUNTS = """
class TritonPythonModel(TritonPythonModel):
    def finalize(self):
        super().finalize()
        open(ROWS, "w").write(str(self._engine.tally.rows))
"""
# What leaves before it is answered. Only gRPC tells Triton about it.
LEAVES = """
import sys, numpy, time
from tritonclient import grpc
client = grpc.InferenceServerClient(sys.argv[1])
texts = grpc.InferInput("TEXT", [256, 1], "BYTES")
texts.set_data_from_numpy(numpy.array([sys.argv[2].encode()] * 256, object)[:, None])
calls = [client.async_infer("intents", [texts], lambda result, error: None) for _ in range(12)]
time.sleep(0.3)
for call in calls:
    call.cancel()
time.sleep(1)
"""


@pytest.fixture(scope="module")
def environment() -> Path:
    """A virtual environment with the server; made when it is first needed."""
    if sys.platform != "linux" or not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("the wheel needs Linux, and a Python with a shared library")
    if PathFinder.find_spec("_opcode") is None:
        pytest.skip("Python has modules compiled in, as on Debian, which Triton's Python lacks")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = cache_folder().parent / f"triton-0.7.0-python{version}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*install, *PACKAGES], check=True, stdout=subprocess.DEVNULL)
            server = _packages(home) / "pytriton" / "tritonserver"
            stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
            shutil.copy(stub, server / "backends" / "python")
            for file in (
                server / "bin" / "tritonserver",
                server / "backends" / "python" / stub.name,
            ):
                file.chmod(file.stat().st_mode | stat.S_IXUSR)
            (home / "complete").touch()
        (_packages(home) / "fpabee.pth").write_text(str(ROOT / "src"))
    return home


def _packages(home: Path) -> Path:
    (found,) = (home / "lib").glob("python*/site-packages")
    return found


class Server:
    """A running server with the model `intents`.

    Attributes:
        engines: its engines folder.
        deep: texts that run all layers.
    """

    engines: Path
    deep: list[str]

    def __init__(self, port: int, grpc_port: int, log: Path) -> None:
        self.log = log
        self.grpc = f"127.0.0.1:{grpc_port}"
        self._url = f"http://127.0.0.1:{port}/v2/"

    def post(self, path: str, content: Any, headers: Mapping[str, str] | None = None) -> Any:
        """Status and answer."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as response:
                found = response.read()
                return response.status, json.loads(found) if found else {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    def infer(self, inputs: Sequence[Any], **options: Any) -> Any:
        return self.post("models/intents/infer", {"inputs": inputs, "parameters": options})

    def ask(self, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        status, found = self.infer([tensor(texts)], **options)
        assert status == 200, found
        return {output["name"]: output["data"] for output in found["outputs"]}

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}health/ready") as response:
                return bool(response.status == 200)
        except OSError:
            return False


def tensor(texts: Sequence[Any], name: str = "TEXT", kind: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [len(texts), 1], "datatype": kind, "data": list(texts)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def served(home: Path, repository: Path) -> Iterator[Server]:
    port, grpc_port = _free_port(), _free_port()
    server = _packages(home) / "pytriton" / "tritonserver"
    libraries = [str(_packages(home) / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    found = Server(port, grpc_port, repository.parent / "triton.log")
    with found.log.open("wb") as log:
        process = subprocess.Popen(
            [
                server / "bin" / "tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={server / 'backends'}",
                *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc")),
                *(f"--http-port={port}", f"--grpc-port={grpc_port}", "--allow-metrics=false"),
                *("--model-control-mode=explicit", "--load-model=*"),
            ],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": ":".join(libraries),
                "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
            },
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + WAIT
        while not found.is_ready():
            assert process.poll() is None, found.log.read_text()
            assert time.monotonic() < deadline, found.log.read_text()
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(WAIT)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(
    environment: Path,
    exit_0_engines: Mapping[str, Path],
    set_points: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("triton")
    engines, repository = home / "engines", home / "repository"
    shutil.copytree(exit_0_engines["bert"], engines)
    set_points(engines, default="fast", fast=Confidence(threshold=0.8, exit_0_threshold=0.9))
    with Engine.load(engines) as engine:
        pairs = zip(LONG, engine.predict(LONG), strict=True)
        deep = [text for text, answer in pairs if answer.exit == 3]
    folder = write_repository(engines, repository, "intents", threads=1, max_rows=10_000)
    with (folder / "1" / "model.py").open("a") as model:
        model.write(COUNTS.replace("ROWS", repr(str(home / "rows"))))
    with served(environment, repository) as running:
        running.engines, running.deep = engines, (deep * 256)[:256]
        yield running


def test_a_thousand_requests_are_answered_as_by_predict(server: Server) -> None:
    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(n % 13)) for n in range(1000)]
    with ThreadPoolExecutor(1000) as pool:
        answers = list(pool.map(lambda text: server.ask([text]), texts))
    found = [
        Prediction(
            tuple(answer["LABEL"]),
            tuple(answer["SCORE"]),
            answer["EXIT"][0],
            answer["LAYER"][0],
            tuple(answer["PROBABILITIES"]),
            logits=(),
            truncated=answer["TRUNCATED"][0],
        )
        for answer in answers
    ]
    with Engine.load(server.engines) as engine:
        check_same(engine, texts, found, engine.rule)
    assert {answer.exit for answer in found} == {0, 1, 2, 3}


def test_rows_are_answered_while_deeper_rows_run(server: Server) -> None:
    """They wait for the rows that came before them, and not for those that came after."""
    with ThreadPoolExecutor(16) as pool:
        deep = [pool.submit(server.ask, server.deep) for _ in range(6)]
        time.sleep(0.1)
        begun = [pool.submit(server.ask, server.deep[:1], max_exit=last) for last in (0, 1, 0, 1)]
        deep += [pool.submit(server.ask, server.deep) for _ in range(6)]
        shallow = [each.result() for each in begun]
        still_running = sum(not each.done() for each in deep)
        depths = [max(each.result()["EXIT"]) for each in deep]
    assert [answer["EXIT"] for answer in shallow] == [[0], [1], [0], [1]]
    assert still_running > 0
    assert set(depths) == {3}


def test_a_client_leaves_and_the_model_is_unloaded_and_loaded(
    server: Server, environment: Path
) -> None:
    server.post("repository/models/intents/unload", {})
    rows = server.log.parent / "rows"
    deadline = time.monotonic() + WAIT
    while not rows.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rows.unlink()
    assert server.infer([tensor(["rain"])])[0] == 404
    assert server.post("repository/models/intents/load", {}) == (200, {})
    assert server.ask(["rain"])["LABEL"]

    left = [str(environment / "bin" / "python"), "-c", LEAVES, server.grpc, server.deep[0]]
    subprocess.run(left, check=True, timeout=WAIT)
    server.ask(["rain"])
    with ThreadPoolExecutor(4) as pool:
        last = [pool.submit(server.infer, [tensor(server.deep)]) for _ in range(4)]
        time.sleep(0.3)
        server.post("repository/models/intents/unload", {})
        answered = sum(each.result()[0] == 200 for each in last)
    while not rows.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Two texts of the test, and each request that begun before the unload.
    others = int(rows.read_text()) - 2 - 256 * answered
    assert answered > 0
    assert others < 12 * 256 / 2  # those of the client that left, in the groups that ran
    server.post("repository/models/intents/load", {})
