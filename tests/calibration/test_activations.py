"""Graph inputs are those of the chain, padding included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from fpabee.calibration.activations import graph_inputs, padded_inputs
from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.artifact.manifest import MASK_FILL
from fpabee.runtime.backends.onnxruntime_session import session_options

TEXTS = ["rain", "the film is not good", "", "play music"]


def test_padding_is_the_tokenizers(engines: Mapping[str, Path]) -> None:
    manifest = read_manifest(engines["mpnet"])
    with Engine.load(engines["mpnet"]) as engine:
        rows = engine.encode(TEXTS)
    first, second = padded_inputs(rows, manifest.tokenizer, batch=3)
    assert first["input_ids"].shape == (3, len(rows[1]))
    assert second["input_ids"].shape == (1, len(rows[3]))
    padding = first["input_ids"][0, len(rows[0]) :]
    assert (padding == manifest.tokenizer.pad_id).all()
    bias = first["attention_bias"]
    assert (bias[0, ..., len(rows[0]) :] == np.float32(MASK_FILL)).all()
    assert not bias[0, ..., : len(rows[0])].any()


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_the_last_graph_on_its_inputs_gives_the_last_exit(
    family: str, engines: Mapping[str, Path]
) -> None:
    manifest = read_manifest(engines[family])
    with Engine.load(engines[family]) as engine:
        expected = engine.trace(TEXTS).logits[-1]
        found = graph_inputs(engines[family], manifest, engine.encode(TEXTS), batch=2)
    name = manifest.segments[-1].calls[-1]
    session = ort.InferenceSession(
        str(engines[family] / manifest.graphs[name].file),
        session_options(),
        providers=["CPUExecutionProvider"],
    )
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in found[name]])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    calls = sum(segment.calls.count("block_01") for segment in manifest.segments)
    assert len(found.get("block_01", ())) == 2 * calls, "a shared block once for each call"
