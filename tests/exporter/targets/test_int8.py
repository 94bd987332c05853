"""int8 for TensorRT: symmetric Q/DQ, judged on texts that gave no ranges, and really built."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.targets.check import exact_logits
from fpabee.exporter.targets.int8 import graph_inputs
from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.agreement import REQUIREMENTS
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends.onnxruntime import cpu_session
from fpabee.runtime.encoding import Text

WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play", "music", "table")
TEXTS = [" ".join(pair) for pair in itertools.permutations(WORDS, 2)]


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Require nothing: a tiny random model has no robust answers, and the written graphs matter."""
    required = replace(REQUIREMENTS["int8"], labels=0.0, exits=0.0)
    monkeypatch.setitem(REQUIREMENTS, "int8", required)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in _FAMILIES if family != "albert"]


@pytest.mark.parametrize("family", ["albert", *SLOW])
def test_products_with_weights_are_quantized_symmetrically(
    family: str, engine_copy: Callable[..., Path], lenient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy(family)
    judged: list[Text] = []

    def noted(*given: Any) -> Any:
        judged.extend(given[2])
        return exact_logits(*given)

    monkeypatch.setattr("fpabee.exporter.targets.fp16.exact_logits", noted)
    texts = folder.parent / "texts.txt"
    texts.write_text("\n".join(text for pair in TEXTS[::2] for text in (pair, WORDS[0])))
    added = add_targets(folder, AddTargetsOptions(int8=True, calibration_data=texts, backends=()))
    assert added.precisions["int8"].rows == 12 + 1
    assert set(judged) == {WORDS[0]}, "texts that gave ranges are not judged"
    quantized = 0
    for graph in added.manifest.graphs_in("int8").values():
        assert graph.file.startswith("onnx/int8/")
        check_graph(folder / graph.file)
        proto = onnx.load(folder / graph.file)
        tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            assert not node.name.startswith("head")
            zero = tensors[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any(), "symmetric"
            quantized += 1
    assert quantized > 10


FOUR = ["rain", "the film is not good", "", "play music"]


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_the_last_graph_on_its_inputs_gives_the_last_exit(
    family: str, engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that shares the pool of this process.
    sessions = SimpleNamespace(InferenceSession=lambda path, **_: cpu_session(path))
    monkeypatch.setattr("fpabee.exporter.targets.int8.ort", sessions)
    manifest = read_manifest(engines[family])
    with Engine.load(engines[family]) as engine:
        expected = engine.trace(FOUR).logits[-1]
        found = dict(graph_inputs(engines[family], manifest, engine.encode(FOUR), batch=2))
    name = manifest.segments[-1].calls[-1]
    session = cpu_session(engines[family] / manifest.graphs[name].file)
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in found[name]])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    calls = [call for segment in manifest.segments for call in segment.calls]
    assert found.keys() == set(calls)
    for graph, feeds in found.items():
        assert len(feeds) == 2 * calls.count(graph), "a shared block once for each call"
