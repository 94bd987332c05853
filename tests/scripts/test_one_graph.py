"""One graph of the whole model gives the logits of the last exit of the chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from one_graph import write_one_graph

from fpabee.exporter.targets import build_targets
from fpabee.runtime import Engine, FPabee, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text

from ..closeness import assert_close

TEXTS: list[Text] = ["turn on the light", "", "book a table " * 5, ("a", "the plot")]


def heads(path: Path) -> int:
    """How many nodes of a graph belong to a head."""
    return sum(node.name.startswith("head") for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "deberta-v2", "modernbert"])
def test_one_graph_gives_the_logits_of_the_last_exit(
    engines: Mapping[str, Path], tmp_path: Path, family: str
) -> None:
    source = engines[family]
    old = read_manifest(source)
    manifest = write_one_graph(source, tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.exit_layers == old.exit_layers[-1:]
    with Engine.load(source) as before, Engine.load(tmp_path) as after:
        expected, found = before.trace(TEXTS).logits[-1:], after.trace(TEXTS).logits
    assert_close(found, expected)
    stored, logits = read_reference(EnginesFolder(tmp_path, manifest))
    texts, expected = read_reference(EnginesFolder(source, old))
    assert stored == texts
    np.testing.assert_array_equal(logits, expected[-1:])


def test_only_the_other_heads_are_missing(engines: Mapping[str, Path], tmp_path: Path) -> None:
    source, again = engines["bert"], tmp_path / "again"
    old, manifest = read_manifest(source), write_one_graph(source, tmp_path)
    again.mkdir()
    assert write_one_graph(source, again).graphs == manifest.graphs, "the same bytes every time"
    (graph,) = manifest.graphs.values()
    before = [source / graph.file for graph in old.graphs.values()]
    missing = sum(len(onnx.load(path).graph.node) for path in before)
    missing -= len(onnx.load(tmp_path / graph.file).graph.node)
    assert missing == sum(map(heads, before[:-1]))
    assert heads(tmp_path / graph.file) == heads(before[-1])
    assert [spec.name for spec in graph.outputs] == ["logits"]


def test_shared_layers_stay_one_graph(engines: Mapping[str, Path], tmp_path: Path) -> None:
    source = engines["albert"]
    manifest = write_one_graph(source, tmp_path)
    (segment,) = manifest.segments
    assert segment.calls == ("embeddings", "block_01", "block_01", "block_01", "head_03")
    for graph in manifest.graphs.values():
        assert (tmp_path / graph.file).read_bytes() == (source / graph.file).read_bytes()
    assert sorted(manifest.graphs) == ["block_01", "embeddings", "head_03"]


def test_every_precision_is_merged_and_no_operating_point_is_copied(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    source, folder = engine_copy("mpnet"), tmp_path / "new"
    set_points(source, default="fast", fast=FPabee(threshold=(0.1, 0.1, 0.1)))
    build_targets(source, ["onnxruntime-fp16-cuda"])
    folder.mkdir()
    manifest = write_one_graph(source, folder)
    for graph in manifest.graphs_in("fp16").values():
        onnx.checker.check_model(folder / graph.file, full_check=True)
    assert "onnxruntime-fp16-cuda" in manifest.targets
    target = manifest.targets["onnxruntime-fp32"]
    assert (target.operating_points, target.default_operating_point) == ({}, "")
