"""Graph inputs are those of the chain, padding included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fpabee.calibration.activations import graph_inputs
from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.backends.onnxruntime_session import cpu_session

TEXTS = ["rain", "the film is not good", "", "play music"]


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_the_last_graph_on_its_inputs_gives_the_last_exit(
    family: str, engines: Mapping[str, Path]
) -> None:
    manifest = read_manifest(engines[family])
    with Engine.load(engines[family]) as engine:
        expected = engine.trace(TEXTS).logits[-1]
        found = graph_inputs(engines[family], manifest, engine.encode(TEXTS), batch=2)
    name = manifest.segments[-1].calls[-1]
    session = cpu_session(engines[family] / manifest.graphs[name].file)
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in found[name]])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    calls = sum(segment.calls.count("block_01") for segment in manifest.segments)
    assert len(found.get("block_01", ())) == 2 * calls, "a shared block once for each call"
