"""Some exits of an engines folder give the same logits from fewer, longer segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.precision.formats import Half
from fpabee.exporter.prune.drop_exits import DropExitsOptions, drop_exits
from fpabee.exporter.prune.keep import keep_exits
from fpabee.runtime import Engine, FPabee, ModelError
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text

TEXTS: list[Text] = [
    "turn on the light",
    "",
    "is it not a good film",
    "book a table " * 5,
    ("a", "the plot"),
]


def heads(path: Path) -> set[str]:
    """The modules of a graph that belong to a head."""
    names = [node.name for node in onnx.load(path).graph.node]
    return {name for name in names if name.startswith("head")}


@pytest.mark.parametrize(
    ("family", "exits"),
    [
        *(("bert", exits) for exits in ((1, 3), (2, 3), (3,))),
        *(("albert", exits) for exits in ((1, 3), (2,))),
        *((family, (2,)) for family in ("mpnet", "deberta-v2", "modernbert")),
    ],
)
def test_kept_exits_give_the_same_logits(
    engines: Mapping[str, Path], tmp_path: Path, family: str, exits: tuple[int, ...]
) -> None:
    source, again = engines[family], tmp_path / "again"
    with Engine.load(source) as engine:
        before = engine.trace(TEXTS).logits[[number - 1 for number in exits]]

    manifest, agreement = keep_exits(source, read_manifest(source), exits, tmp_path)

    assert read_manifest(tmp_path) == manifest
    assert manifest.exit_layers == exits
    assert manifest.model.layers == exits[-1]
    assert agreement.passed
    assert agreement.max_logit_difference < 1e-5
    assert manifest.targets["onnxruntime-fp32"].tolerance == 1e-5
    with Engine.load(tmp_path) as engine:
        np.testing.assert_allclose(engine.trace(TEXTS).logits, before, atol=1e-5)
    _, logits = read_reference(tmp_path, manifest)
    np.testing.assert_array_equal(
        logits, read_reference(source, read_manifest(source))[1][[n - 1 for n in exits]]
    )
    again.mkdir()
    last, agreement = keep_exits(tmp_path, manifest, (len(exits),), again)
    assert last.exit_layers == exits[-1:]
    assert agreement.passed


@pytest.mark.parametrize("exits", [(2, 3), (1, 3)])
def test_only_dropped_heads_are_missing(
    exits: tuple[int, ...], engines: Mapping[str, Path], tmp_path: Path
) -> None:
    source = engines["bert"]
    old = read_manifest(source)
    manifest, _ = keep_exits(source, old, exits, tmp_path)
    (tmp_path / "again").mkdir()
    again, _ = keep_exits(source, old, exits, tmp_path / "again")
    assert again.graphs == manifest.graphs, "the same bytes every time"
    (dropped,) = {1, 2, 3} - {*exits}
    before = [len(onnx.load(source / g.file).graph.node) for g in old.graphs.values()]
    after = [len(onnx.load(tmp_path / g.file).graph.node) for g in manifest.graphs.values()]
    missing = heads(source / old.graphs[f"segment_{dropped:02d}"].file)
    assert sum(before) - sum(after) == len(missing)
    for graph, number in zip(manifest.graphs.values(), exits, strict=True):
        kept = heads(source / old.graphs[f"segment_{number:02d}"].file)
        assert len(heads(tmp_path / graph.file)) == len(kept)
    leaving = [spec.name for spec in manifest.graphs["segment_01"].outputs]
    # The last segment reads the token weights of the first.
    assert leaving == ["next_token_weights", "next_hidden_states", "logits"]
    assert [spec.name for spec in manifest.graphs["segment_02"].outputs] == ["logits"]


def test_shared_layers_stay_one_graph(engines: Mapping[str, Path], tmp_path: Path) -> None:
    source = engines["albert"]
    manifest, _ = keep_exits(source, read_manifest(source), (2, 3), tmp_path)
    assert [segment.calls for segment in manifest.segments] == [
        ("embeddings", "block_01", "block_01", "head_02"),
        ("block_01", "head_03"),
    ]
    for graph in manifest.graphs.values():
        assert (tmp_path / graph.file).read_bytes() == (source / graph.file).read_bytes()
    assert sorted(manifest.graphs) == ["block_01", "embeddings", "head_02", "head_03"]


def test_every_precision_is_merged_and_no_operating_point_is_copied(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    source = engine_copy("mpnet")
    set_points(source, default="fast", fast=FPabee(threshold=(0.1, 0.1, 0.1)))
    add_targets(source, AddTargetsOptions(precisions=(Half.FP16,), backends=()))
    folder = tmp_path / "new"
    folder.mkdir()
    manifest, _ = keep_exits(source, read_manifest(source), (2, 3), folder)
    graphs = manifest.precisions["fp16"]
    assert graphs.keys() == manifest.graphs.keys()
    leaving = {spec.name: spec.dtype for spec in graphs["segment_01"].outputs}
    assert leaving["next_hidden_states"] == "float16"
    assert leaving["logits"] == "float32"
    for graph in graphs.values():
        onnx.checker.check_model(folder / graph.file, full_check=True)
    assert "onnxruntime-fp16-cuda" in manifest.targets
    target = manifest.targets["onnxruntime-fp32"]
    assert (target.operating_points, target.default_operating_point) == ({}, "")


def test_merged_segments_can_be_converted(engines: Mapping[str, Path], tmp_path: Path) -> None:
    """Also the hidden state that one segment left for the next one becomes fp16."""
    drop_exits(engines["bert"], tmp_path / "new", DropExitsOptions((3,)))
    options = AddTargetsOptions(precisions=(Half.FP16,), backends=())
    manifest = add_targets(tmp_path / "new", options).manifest
    for graph in manifest.precisions["fp16"].values():
        onnx.checker.check_model(tmp_path / "new" / graph.file, full_check=True)


@pytest.mark.parametrize("exits", [(), (0, 3), (3, 2), (1, 4)])
def test_exits_that_do_not_exist_are_refused(
    engines: Mapping[str, Path], tmp_path: Path, exits: tuple[int, ...]
) -> None:
    source = engines["bert"]
    with pytest.raises(ModelError, match="a model with 3 exits"):
        keep_exits(source, read_manifest(source), exits, tmp_path)
    assert list(tmp_path.iterdir()) == []
