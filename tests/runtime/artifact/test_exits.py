"""The exits of a model, and the passes of which they are made."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from fpabee.runtime.artifact.exits import Exits, Pass, exits_of
from fpabee.runtime.artifact.manifest import ExitZeroSpec, FirstStageSpec, Manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "manifest.json"


@pytest.fixture
def manifest() -> Manifest:
    return msgspec.json.decode(GOLDEN.read_bytes(), type=Manifest)


def test_exits_of_a_manifest_are_those_it_says(manifest: Manifest) -> None:
    ngrams = ExitZeroSpec(file="exit_0.npz", sha256="0" * 64, unigrams=8, buckets=8)
    scores = FirstStageSpec(weights=(1.0, 0.0, 0.0), bias=0.0)
    texts = msgspec.structs.replace(manifest, exit_0=ngrams)
    ranking = msgspec.structs.replace(manifest, first_stage=scores)
    for each in (manifest, texts, ranking):
        exits = exits_of(each)
        assert exits.numbers == each.exits
        assert exits.layers == each.exit_layers
        assert len(exits) == len(each.exits)
        assert exits.last == each.exits[-1]
    assert [each.reads for each in exits_of(texts).passes] == ["ngrams", "tokens"]
    assert [each.reads for each in exits_of(manifest).passes] == ["tokens"]
    assert [each.reads for each in exits_of(ranking).passes] == ["scores", "tokens"]


@pytest.mark.parametrize(("layers", "first"), [((0, 2, 4, 6), 0), ((2, 4, 6), 1)])
def test_exit_0_is_a_pass_without_segments(layers: tuple[int, ...], first: int) -> None:
    exits = Exits.of_layers(layers)
    assert exits.passes[-1] == Pass("tokens", (2, 4, 6), segments=3)
    assert [*exits.numbers] == [*range(first, 4)]
    assert exits.first == first
    assert [*exits.before_layers] == [0] * (first == 0)
    assert exits.from_first_layer() == Exits.of_layers((2, 4, 6))
    last_two = np.array([[2, 3]])
    assert exits.place(last_two).tolist() == [[2 - first, 3 - first]]
    assert exits.depths(last_two).tolist() == [[4, 6]]


def test_numbered_exits_have_a_layer_each() -> None:
    assert Exits.numbered(0, 3) == Exits.of_layers((0, 1, 2))
    assert Exits.numbered(1, 3).layers == (1, 2, 3)
