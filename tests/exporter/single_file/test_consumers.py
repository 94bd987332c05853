"""A packed folder in other languages: examples of the page and of the model card."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.exporter.single_file import pack
from fpabee.runtime import Confidence, Engine
from fpabee.runtime.encoding import Text

from ...closeness import assert_exported
from ...programs import program
from .conftest import FP32, PAIRS, SINGLE
from .consumer import Consumer

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
PACKAGES = [
    *("@huggingface/transformers@4", "@huggingface/tokenizers"),
    *("onnxruntime-node@1", "onnxruntime-web@1"),
]
# No tokenizer has to cut them.
SHORT = [text for text in SINGLE if isinstance(text, str) and 0 < len(text.split()) < 12]
# The examples in JavaScript cut the last one.
LINES = [*SHORT, "rain " * 100]

pytestmark = pytest.mark.slow


@dataclass
class Case:
    """A packed folder `web`, and what the engine answers to texts.

    Attributes:
        parent: the folder that holds it.
        engines: what was packed.
        answers: gives logits `[texts, labels]` and exits.
        labels: the names of the labels.
    """

    parent: Path
    engines: Path
    answers: Callable[[list[Text]], tuple[NDArray[np.float32], list[int]]]
    labels: tuple[str, ...]

    def assert_answers(self, texts: list[Text], answers: list[dict[str, Any]]) -> list[str]:
        """The answers are right; gives the labels that they should have."""
        logits, exits = self.answers(texts)
        assert len(set(exits)) > 2
        assert_exported([each["logits"] for each in answers], logits)
        for answer, number in zip(answers, exits, strict=True):
            assert answer.get("exit", number) == number, "some libraries give the logits only"
        return [self.labels[label] for label in logits.argmax(axis=-1)]

    def lines(self, texts: list[Text], labels: list[str]) -> list[str]:
        """What the examples print, given what they call the labels."""
        logits, exits = self.answers(texts)
        assert len(set(exits)) > 2
        best = logits.argmax(axis=-1)
        return [f"{labels[label]} from exit {n}" for label, n in zip(best, exits, strict=True)]


@pytest.fixture(params=["bert", "mpnet"])
def case(
    request: pytest.FixtureRequest,
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    tmp_path: Path,
) -> Iterator[Case]:
    folder = engine_copy(request.param, exit_0=True)
    set_points(folder, FP32, fast=Confidence(threshold=0.6, exit_0_threshold=0.9))
    pack(folder, tmp_path / "web", FP32, "fast", for_transformers_js=True)
    with Engine.load(folder, FP32, "fast") as engine:

        def answers(texts: list[Text]) -> tuple[NDArray[np.float32], list[int]]:
            exits = [answer.exit for answer in engine.predict(texts)]
            trace = engine.trace(texts, rule=engine.rule)
            return trace.logits[exits, np.arange(len(texts))], exits

        yield Case(tmp_path, folder, answers, engine.labels)


@pytest.fixture(scope="session")
def node(shared_root: Path) -> Path:
    """A folder with the packages of Node."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = shared_root / "node"
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("answers.mjs"), folder)
    environment = os.environ | {"ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    install = ["npm", "install", "--silent", *PACKAGES]
    if subprocess.run(install, cwd=folder, env=environment, check=False).returncode:
        pytest.skip("npm cannot install the packages")
    return folder


def test_node(case: Case, node: Path) -> None:
    # transformers.js cuts off the last special token of long texts, and takes "" for no text.
    singles = [text for text in SINGLE if "rain rain rain" not in text]
    pairs = [pair for pair in PAIRS[8:40] if all(pair)]
    for texts in (singles, pairs):
        given = case.parent / "texts.json"
        given.write_text(json.dumps(texts))
        written = case.parent / "answers.json"
        arguments = [*map(str, [case.parent, "web", given, written])]
        subprocess.run(["node", "answers.mjs", *arguments], cwd=node, check=True)
        for answers in json.loads(written.read_text()).values():
            best = case.assert_answers(texts, answers)
            if texts is singles:
                assert [each["label"] for each in answers] == best


@pytest.fixture(scope="session")
def environment(shared_root: Path) -> Callable[..., Path]:
    """Makes an environment with other packages, and gives its Python.

    What they need beside them, such as PyTorch, it finds where these tests run.
    """

    def make(*packages: str) -> Path:
        folder = shared_root / packages[0]
        python = folder / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            (site,) = folder.glob("lib/python*/site-packages")
            (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
            install = [str(python), "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(install, check=False).returncode:
                shutil.rmtree(folder)
                pytest.skip(f"pip cannot install {packages}")
        return python

    return make


@pytest.mark.parametrize(
    ("script", "packages"),
    [
        ("answers.py", ["onnxruntime==1.18.1", "numpy<2", "tokenizers"]),
        ("answers.py", ["onnxruntime", "tokenizers"]),
        ("answers_of_optimum.py", ["optimum-onnx[onnxruntime]", "transformers<4.58"]),
    ],
)
def test_python(
    case: Case, environment: Callable[..., Path], script: str, packages: list[str]
) -> None:
    python = environment(*packages)
    given = case.parent / "texts.json"
    given.write_text(json.dumps(SHORT))
    run = program(python, Path(__file__).with_name(script), case.parent / "web", given)
    case.assert_answers([*SHORT], json.loads(run.stdout))


def test_node_example(case: Case, node: Path) -> None:
    shutil.copy(EXAMPLES / "classify.mjs", node)
    lines = "".join(f"{text}\n" for text in LINES)
    run = program("node", "classify.mjs", case.parent / "web", cwd=node, input=lines)
    assert run.stdout.splitlines() == case.lines([*LINES], [*case.labels])


@pytest.mark.parametrize("layout", ["web", "classifier"])
def test_card_in_node(case: Case, node: Path, layout: str) -> None:
    folder = case.parent / layout
    if layout == "classifier":
        pack(case.engines, folder, FP32, "fast")
    (case.parent / "OWNER").mkdir()
    (case.parent / "OWNER" / "NAME").symlink_to(folder)
    (code,) = re.findall(r"```js\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    here = "import { env } from '@huggingface/transformers'; env.allowRemoteModels = false;"
    here += f"env.localModelPath = {json.dumps(str(case.parent))};\n"
    (node / "card.mjs").write_text(here + code)
    run = program("node", "card.mjs", cwd=node)
    logits, _ = case.answers(["turn on the light"])
    assert f"label: '{case.labels[logits.argmax()]}'" in run.stdout


def test_browser(case: Case, node: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    (case.parent / "node_modules").symlink_to(node / "node_modules")
    page = (EXAMPLES / "index.html").read_text(encoding="utf-8")
    page = page.replace("turn on the light", "\n".join(LINES))
    (case.parent / "index.html").write_text(page, encoding="utf-8")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(case.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        options = ["--headless", "--no-sandbox", "--virtual-time-budget=60000", "--dump-dom"]
        run = program(browser, *options, url)
        server.shutdown()
    found = run.stdout.split("<pre>")[1].split("</pre>")[0]
    assert found.splitlines() == case.lines([*LINES], [*case.labels])


def test_cpp(case: Case) -> None:
    example = case.parent / "classify"
    build = ["g++", "-std=c++17", str(EXAMPLES / "classify.cpp"), "-o", str(example)]
    build += ["-I/usr/include/onnxruntime", "-lonnxruntime"]
    if (
        shutil.which("g++") is None
        or subprocess.run(build, capture_output=True, check=False).returncode
    ):
        pytest.skip("libonnxruntime-dev is not installed")
    consumer = Consumer(case.parent / "web")
    ids = [consumer.tokenizer(text)["input_ids"] for text in SHORT]
    given = "".join(f"{' '.join(map(str, each))}\n" for each in ids)
    run = program(example, consumer.model, input=given)
    numbers = [str(label) for label in range(len(case.labels))]
    assert run.stdout.splitlines() == case.lines([*SHORT], numbers)

    assert "missing.onnx" in program(example, "missing.onnx", code=1).stderr
