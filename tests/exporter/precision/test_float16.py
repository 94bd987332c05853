"""Half precision is checked before it is written: what overflows, where, and how to mend it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from fpabee.exporter import export
from fpabee.exporter.precision.float16 import AUTO, add_half
from fpabee.exporter.precision.formats import Half
from fpabee.runtime import Engine, ExitRule, FPabee, VerificationError, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.reference import read_reference

RULE = FPabee(threshold=0.5)
LARGE = 1e6


@pytest.fixture(scope="module")
def scaled(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model whose second layer has activations far beyond fp16."""
    folder = tmp_path_factory.mktemp("scaled")
    model = Path(shutil.copytree(tiny_models["bert"], folder / "model"))
    weights = load_file(model / "model.safetensors")
    layer = "bert.encoder.layer.1"
    for name in ("weight", "bias"):
        weights[f"{layer}.intermediate.dense.{name}"] *= LARGE
    weights[f"{layer}.output.dense.weight"] /= LARGE
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return export(model, folder / "engines").folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "engines"))


@pytest.mark.parametrize("half", Half)
@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_graphs_are_written_beside_those_of_fp32(
    family: str, half: Half, engine_copy: Callable[..., Path]
) -> None:
    folder = engine_copy(family)
    before = read_manifest(folder)
    manifest, report = add_half(folder, before, half, RULE)
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


def test_more_texts_are_checked_against_fp32(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    _, report = add_half(
        folder, read_manifest(folder), Half.FP16, RULE, texts=["the film", ("a", "b")]
    )
    assert report.rows == 14


def test_texts_of_the_reference_run_once(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    known, _ = read_reference(folder, read_manifest(folder))
    texts = [*known, "the film", "the film"]
    _, report = add_half(folder, read_manifest(folder), Half.FP16, RULE, texts=texts)
    assert report.rows == len(known) + 1


def test_overflow_names_the_first_segment_and_node(scaled: Path, tmp_path: Path) -> None:
    folder = copy_of(scaled, tmp_path)
    with pytest.raises(VerificationError) as caught:
        add_half(folder, read_manifest(folder), Half.FP16, RULE)
    message = str(caught.value)
    assert "overflows first in segment_02 at blocks.0.layer.intermediate.dense/" in message
    assert message.endswith("--keep-fp32 auto")
    assert not (folder / "onnx" / "fp16").exists()


def test_auto_saves_a_model_that_overflows(scaled: Path, tmp_path: Path) -> None:
    folder = copy_of(scaled, tmp_path)
    manifest, report = add_half(folder, read_manifest(folder), Half.FP16, RULE, [AUTO])
    assert report.passed
    assert report.kept
    assert all(name.startswith("segment_02:blocks.0.layer.") for name in report.kept)
    proto = onnx.load(folder / manifest.graphs_in("fp16")["segment_02"].file)
    low = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert any("attention" in name for name in low), "only what overflows is kept"
    assert not any("intermediate" in name for name in low)


def test_bf16_has_the_range(scaled: Path, tmp_path: Path) -> None:
    folder = copy_of(scaled, tmp_path)
    _, report = add_half(folder, read_manifest(folder), Half.BF16, RULE)
    assert report.overflows == ()


def test_answers_that_change_are_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    texts, logits = read_reference(folder, manifest)
    turned = (texts, np.ascontiguousarray(logits[..., ::-1]))
    monkeypatch.setattr("fpabee.exporter.precision.float16.read_reference", lambda *_: turned)
    with pytest.raises(VerificationError, match=r"changes answers from segment 1 on.*bar 99\.9%"):
        add_half(folder, manifest, Half.FP16, RULE)


def test_reference_is_what_the_model_says(engines: Mapping[str, Path]) -> None:
    folder = engines["mpnet"]
    texts, logits = read_reference(folder, read_manifest(folder))
    with Engine.load(folder) as engine:
        np.testing.assert_allclose(engine.trace(texts).logits, logits, atol=1e-4)
        assert isinstance(engine.rule, ExitRule)


def test_a_check_for_turing_is_stricter_and_writes_the_same(
    engine_copy: Callable[..., Path],
) -> None:
    folder = engine_copy()
    before = read_manifest(folder)
    usual, report = add_half(folder, before, Half.FP16, RULE)
    turing, stricter = add_half(folder, before, Half.FP16, RULE, turing=True)
    assert usual.precisions == turing.precisions
    assert stricter.agreement.max_logit_difference != report.agreement.max_logit_difference
