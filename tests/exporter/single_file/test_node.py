"""A packed folder in Node: transformers.js finds its files, and onnxruntime-node gives exits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fpabee.exporter.single_file import pack
from fpabee.runtime import Confidence, Engine

from .test_packing import FP32, PAIRS, SINGLE

PACKAGES = ("@huggingface/transformers@4", "onnxruntime-node@1")


@pytest.fixture(scope="session")
def node(shared_root: Path) -> Path:
    """A folder with the script and what it imports."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = shared_root / "node"
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("answers.mjs"), folder)
    install = ["npm", "install", "--silent", *PACKAGES]
    environment = os.environ | {"ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    if subprocess.run(install, cwd=folder, env=environment, check=False).returncode:
        pytest.skip("npm cannot install the packages")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_node_gives_the_answers_of_the_engine(
    family: str,
    node: Path,
    exit_0_engines: Mapping[str, Path],
    set_points: Callable[..., None],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(exit_0_engines[family], tmp_path / "engines"))
    set_points(folder, FP32, fast=Confidence(threshold=0.6, exit_0_threshold=0.9))
    pack(folder, tmp_path / "packed", FP32, "fast", for_transformers_js=True)
    # transformers.js cuts off the last special token of long texts, and takes "" for no text.
    singles = [text for text in SINGLE[:100] if "rain rain rain" not in text]
    texts = [*singles, *(pair for pair in PAIRS[8:14] if all(pair))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    arguments = [tmp_path, "packed", tmp_path / "texts.json", tmp_path / "answers.json"]
    subprocess.run(["node", "answers.mjs", *map(str, arguments)], cwd=node, check=True)
    found = json.loads((tmp_path / "answers.json").read_text())
    with Engine.load(folder, FP32, "fast") as engine:
        trace, answers = engine.trace(texts, rule=engine.rule), engine.predict(texts)
        labels = engine.labels
    exits = [answer.exit for answer in answers]
    assert [each["exit"] for each in found] == exits
    assert len(set(exits)) > 2
    logits = trace.logits[exits, np.arange(len(texts))]
    np.testing.assert_allclose([each["logits"] for each in found], logits, atol=1e-5)
    best = logits.argmax(axis=-1)[: len(singles)]
    assert [each["label"] for each in found[: len(singles)]] == [labels[label] for label in best]
