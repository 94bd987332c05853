"""How a model is cut, and what its ONNX files contain."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from fpabee.exporter import segments
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Manifest, TensorSpec

FAMILIES = (
    "bert",
    "albert",
    "mpnet",
    "roberta",
    "electra",
    "distilbert",
    "deberta-v2",
    "modernbert",
)
WIDTH = 32
INNER = 64


Exported = tuple[Manifest, dict[str, Any]]


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, engines: Mapping[str, Path]) -> Exported:
    return load(engines[request.param])


def load(folder: Path) -> Exported:
    """The manifest of an engines folder, and its graphs by name."""
    manifest = read_manifest(folder)
    files = {name: folder / graph.file for name, graph in manifest.graphs.items()}
    return manifest, {name: onnx.load(path) for name, path in files.items()}


def wide_weights(proto: Any) -> int:
    """The number of feed-forward weights in a graph, two for each layer."""
    weights = [w for w in proto.graph.initializer if "embeddings" not in w.name]
    return sum(tuple(w.dims) in ((WIDTH, INNER), (INNER, WIDTH)) for w in weights)


def test_graphs_are_valid_and_as_the_manifest_says(exported: Exported) -> None:
    manifest, graphs = exported
    for name, proto in graphs.items():
        onnx.checker.check_model(proto, full_check=True)
        assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
        graph = manifest.graphs[name]
        shapes = [size for spec in (*graph.inputs, *graph.outputs) for size in spec.shape]
        assert {size for size in shapes if isinstance(size, str)} <= {"batch", "sequence"}
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                assert abs(onnx.numpy_helper.to_array(tensor)).max() < 65504, "fits into fp16"
    last = manifest.graphs[manifest.segments[-1].calls[-1]]
    assert [spec.name for spec in last.outputs] == ["logits"]
    assert last.outputs[0].shape == ("batch", len(manifest.task.labels))


def test_files_reveal_nothing_of_this_machine(exported: Exported) -> None:
    here = [str(Path(place)).encode() for place in (Path(__file__).parents[2], sys.prefix)]
    for proto in exported[1].values():
        content = proto.SerializeToString()
        for trace in (b"site-packages", b"modeling_", b"Traceback", b"pkg.torch", *here):
            assert trace not in content
        for field in ("metadata_props", "doc_string"):
            assert field not in str(proto)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("albert", "head_01"),
        pytest.param("deberta-v2", "segment_01", marks=pytest.mark.slow),
        pytest.param("modernbert", "segment_02", marks=pytest.mark.slow),
    ],
)
def test_the_same_graph_has_the_same_bytes(
    family: str,
    name: str,
    engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    manifest = read_manifest(engines[family])
    model = load_checkpoint(tiny_models[family])
    cut = segments.cut(model, (1, 2, 3), "token_type_ids" in manifest.tokenizer.inputs)
    path = tmp_path / "again.onnx"
    segments.export_graph(model, cut.modules[name], path, "again.onnx")
    assert path.read_bytes() == (engines[family] / manifest.graphs[name].file).read_bytes()


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "distilbert"])
def test_each_segment_holds_its_own_layer_and_nothing_else(
    family: str, engines: Mapping[str, Path]
) -> None:
    manifest, graphs = load(engines[family])
    found = [(segment.layer, segment.calls) for segment in manifest.segments]
    assert found == [(number, (f"segment_0{number}",)) for number in (1, 2, 3)]
    embeddings = [
        any("embeddings" in weight.name for weight in proto.graph.initializer)
        for proto in graphs.values()
    ]
    assert embeddings == [True, False, False]
    assert [wide_weights(proto) for proto in graphs.values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("mpnet", "position_bias", (1, 4, "sequence", "sequence")),
        ("modernbert", "rotary", (4, "sequence", 8)),
    ],
)
def test_carried_tensors_are_computed_once(
    family: str, name: str, shape: tuple[Any, ...], engines: Mapping[str, Path]
) -> None:
    manifest, graphs = load(engines[family])
    carried = TensorSpec(name=name, dtype="float32", shape=shape)
    first, *later = manifest.graphs.values()
    assert f"next_{name}" in [spec.name for spec in first.outputs]
    for graph in later:
        assert carried in graph.inputs
        assert f"next_{name}" not in [spec.name for spec in graph.outputs]
    for proto in graphs.values():
        assert not {"Cos", "Sin"} & {node.op_type for node in proto.graph.node}


def test_a_shared_block_is_stored_once(engines: Mapping[str, Path]) -> None:
    _, graphs = load(engines["albert"])
    holds = {name: wide_weights(proto) for name, proto in graphs.items()}
    heads = {"head_01": 0, "head_02": 0, "head_03": 0}
    assert holds == {"embeddings": 0, "block_01": 2, **heads}


def test_a_single_segment_gives_nothing_but_logits(tiny_models: Mapping[str, Path]) -> None:
    (part,) = segments.cut(load_checkpoint(tiny_models["bert"]), (3,)).modules.values()
    assert part.outputs == ["logits"]
