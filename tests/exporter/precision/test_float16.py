"""16-bit formats are checked before they are written: what overflows, where, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fpabee.exporter.precision.float16 import AUTO, add_half
from fpabee.exporter.precision.formats import Half
from fpabee.runtime import Engine, VerificationError, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.reference import read_reference, write_reference

from ...bad_input.cases import corrected

LARGE = 1e6


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


@pytest.mark.parametrize(("family", "half"), [("albert", Half.BF16), ("mpnet", Half.FP16)])
def test_graphs_are_written_beside_those_of_fp32(
    family: str, half: Half, engine_copy: Callable[..., Path]
) -> None:
    folder = engine_copy(family)
    before = read_manifest(folder)
    manifest, report = add_half(folder, before, half)
    assert report.passed
    assert report.rows == 12
    assert 0 < report.agreement.max_logit_difference < 0.5
    graphs = manifest.graphs_in(half.value)
    assert graphs.keys() == before.graphs.keys()
    assert read_manifest(folder).precisions == {}, "the manifest is the caller's to write"
    kinds = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
    for graph in graphs.values():
        proto = onnx.load(folder / graph.file)
        assert sha256_of(folder / graph.file) == graph.sha256
        ends = [*proto.graph.input, *proto.graph.output]
        for value, spec in zip(ends, [*graph.inputs, *graph.outputs], strict=True):
            assert (value.name, value.type.tensor_type.elem_type) == (spec.name, kinds[spec.dtype])


def test_an_overflow_is_named_and_kept_in_fp32(scaled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scaled, tmp_path / "engines"))
    with pytest.raises(VerificationError) as caught:
        add_half(folder, read_manifest(folder), Half.FP16)
    message = str(caught.value)
    assert "overflows first in segment_02 at blocks.0.layer.intermediate.dense/" in message
    assert message.endswith("keep_fp32 auto")
    assert not (folder / "onnx" / "fp16").exists()
    _, bfloat = add_half(folder, read_manifest(folder), Half.BF16)
    assert bfloat.overflows == ()
    manifest, report = add_half(folder, read_manifest(folder), Half.FP16, [AUTO])
    assert report.passed
    assert report.kept
    assert all(name.startswith("segment_02:blocks.0.layer.") for name in report.kept)
    proto = onnx.load(folder / manifest.graphs_in("fp16")["segment_02"].file)
    low = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert any("attention" in name for name in low), "only what overflows is kept"
    assert not any("intermediate" in name for name in low)


def test_more_texts_and_kept_nodes_work_with_exit_0(
    exit_0_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    manifest = read_manifest(folder)
    for texts, kept in ((["a text that is not in the reference"], []), ([], [AUTO])):
        _, report = add_half(folder, manifest, Half.FP16, kept, texts)
        assert report.passed
        assert report.rows == 12 + len(texts)


def test_answers_that_change_are_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    texts, logits = read_reference(folder, manifest)
    turned = (texts, np.ascontiguousarray(logits[..., ::-1]))
    monkeypatch.setattr("fpabee.exporter.precision.float16.read_reference", lambda *_: turned)
    message = r"changes answers from exit 1 on.*at least 99\.9% required"
    with pytest.raises(VerificationError, match=message):
        add_half(folder, manifest, Half.FP16)


def test_a_check_for_turing_is_stricter_and_writes_the_same(
    engine_copy: Callable[..., Path],
) -> None:
    folder = engine_copy()
    before = read_manifest(folder)
    known, _ = read_reference(folder, before)
    texts = [*known, "the film", "the film", ("a", "b")]
    usual, report = add_half(folder, before, Half.FP16, texts=texts)
    assert report.rows == len(known) + 2, "texts that are new run too, once"
    turing, stricter = add_half(folder, before, Half.FP16, texts=texts, turing=True)
    assert usual.precisions == turing.precisions
    assert stricter.agreement.max_logit_difference != report.agreement.max_logit_difference


def test_more_texts_are_also_checked_with_exit_0(
    exit_0_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    manifest = read_manifest(folder)
    _, report = add_half(folder, manifest, Half.FP16, [AUTO], ["the film"])
    assert report.rows == 13
    assert report.passed
