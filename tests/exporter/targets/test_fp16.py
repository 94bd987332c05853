"""16-bit formats are checked before they are written: what overflows, where, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fpabee.exporter.onnx_file import load_graphs
from fpabee.exporter.targets.fp16 import add_lowered
from fpabee.runtime import Engine, Manifest, VerificationError, read_manifest
from fpabee.runtime.agreement import Agreement
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.encoding import Text
from fpabee.runtime.progress import silent

from ...bad_input.cases import corrected

LARGE = 1e5


def add_fp16(folder: Path, texts: Sequence[Text] = ()) -> tuple[Manifest, Agreement]:
    manifest = read_manifest(folder)
    protos = load_graphs(folder, manifest.graphs)
    return add_lowered(folder, manifest, "fp16", protos, texts, "what to do", silent)


@pytest.fixture(scope="module")
def scaled(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engines folder whose second segment has activations far beyond fp16."""
    folder = tmp_path_factory.mktemp("scaled") / "engines"
    shutil.copytree(engines["bert"], folder)

    def scale(path: Path) -> None:
        proto = onnx.load(path)
        weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        for prefix, factor in (("intermediate.dense", LARGE), ("output.dense/MatMul", 1 / LARGE)):
            for node in proto.graph.node:
                if node.name.startswith(f"blocks.0.layer.{prefix}"):
                    weight = weights[node.input[1]]
                    value = numpy_helper.to_array(weight) * np.float32(factor)
                    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
        onnx.save(proto, path)

    corrected("onnx/fp32/segment_02.onnx", scale)(folder)
    texts, _ = read_reference(folder, read_manifest(folder))
    with Engine.load(folder) as engine:
        logits = engine.trace(texts).logits
    corrected("reference.npz", lambda _: write_reference(folder, texts, logits))(folder)
    return folder


@pytest.mark.parametrize("family", ["albert", "mpnet"])
def test_graphs_are_written_beside_those_of_fp32(
    family: str, engine_copy: Callable[..., Path]
) -> None:
    folder = engine_copy(family)
    before = read_manifest(folder)
    manifest, agreement = add_fp16(folder)
    assert agreement.passed
    assert agreement.rows == 12
    assert 0 < agreement.max_logit_difference < 0.5
    graphs = manifest.graphs_in("fp16")
    assert graphs.keys() == before.graphs.keys()
    assert read_manifest(folder).precisions == {}, "the manifest is the caller's to write"
    kinds = {"float32": 1, "int64": 7, "float16": 10}
    for graph in graphs.values():
        proto = onnx.load(folder / graph.file)
        assert sha256_of(folder / graph.file) == graph.sha256
        ends = [*proto.graph.input, *proto.graph.output]
        for value, spec in zip(ends, [*graph.inputs, *graph.outputs], strict=True):
            assert (value.name, value.type.tensor_type.elem_type) == (spec.name, kinds[spec.dtype])


def test_a_graph_that_overflows_is_named(scaled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scaled, tmp_path / "engines"))
    message = "in fp16, segment_02 gives values that are not finite numbers -> what to do"
    with pytest.raises(VerificationError, match=message):
        add_fp16(folder)
    assert not (folder / "onnx" / "fp16").exists()


def test_more_texts_are_also_checked_with_exit_0(
    exit_0_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    manifest = read_manifest(folder)
    known, _ = read_reference(folder, manifest)
    _, agreement = add_fp16(folder, [*known, "the film", "the film", ("a", "b")])
    assert agreement.passed
    assert agreement.rows == len(known) + 2, "texts that are new run too, once"


def test_answers_that_change_are_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    texts, logits = read_reference(folder, manifest)
    turned = (texts, np.ascontiguousarray(logits[..., ::-1]))
    monkeypatch.setattr("fpabee.exporter.targets.fp16.read_reference", lambda *_: turned)
    message = r"changes answers from exit 1 on.*at least 99\.9% required"
    with pytest.raises(VerificationError, match=message):
        add_fp16(folder)
