"""int8: one set of graphs for CPUs, quantized with NNCF, which several targets run."""

from __future__ import annotations

import copy
import itertools
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from one_graph import write_one_graph

from fpabee.calibration.progress import Progress
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.onnx_file import in_head
from fpabee.exporter.targets import build, build_targets, check, int8
from fpabee.exporter.targets.builders import INT8_TARGETS
from fpabee.exporter.targets.check import checked_target
from fpabee.exporter.targets.int8 import graph_inputs
from fpabee.runtime import (
    BackendError,
    Budget,
    Engine,
    InputError,
    MissingExtraError,
    machine,
    read_manifest,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends import openvino
from fpabee.runtime.backends.onnxruntime import cpu_session
from fpabee.runtime.check import REQUIREMENTS, Agreement
from fpabee.runtime.encoding import Text, TextEncoder

from ...bad_input.cases import contents
from ...closeness import assert_close
from ...programs import hide
from ...runtime.test_engine_check import swap_logits
from ..conftest import require

pytest.importorskip("openvino")
pytest.importorskip("nncf")

WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play", "music", "table")
TEXTS = [" ".join(pair) for pair in itertools.permutations(WORDS, 2)]
NAMES = ("onnxruntime-int8", "openvino-int8")
HERE = (*NAMES, *["openvino-int8-bf16"] * openvino.has_bf16())
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in _FAMILIES if family != "bert"]

OTHERS = TEXTS[::-1]  # as if they gave other ranges


@pytest.fixture(scope="module", autouse=True)
def lenient_and_fast() -> Any:
    """A tiny random model has no robust answers, and what is quantized takes long, so only once."""
    quantized: dict[object, dict[str, Any]] = {}
    quantize = int8.quantize

    def remember(
        engines: EnginesFolder, texts: Sequence[Text], progress: Progress
    ) -> dict[str, Any]:
        key = *(graph.sha256 for graph in engines.manifest.graphs.values()), len(texts)
        if key not in quantized:
            quantized[key] = quantize(engines, texts, progress)
        protos = copy.deepcopy(quantized[key])
        if texts[0] == OTHERS[0]:
            for proto in protos.values():
                proto.graph.name = "other ranges"
        return protos

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantize", remember)
        require(patch, 0.0)
        yield


@pytest.fixture(scope="module")
def template(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with int8, whose default target is that of OpenVINO. Read-only."""
    folder = tmp_path_factory.mktemp("int8") / "engines"
    shutil.copytree(engines["bert"], folder)
    assert build_targets(folder, NAMES, TEXTS).refused == {}
    fixed = {"default_target": NAMES[1], "default_is_fixed": True}
    EnginesFolder.read(folder).with_manifest(**fixed).write()
    return folder


@pytest.fixture
def added(template: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(template, tmp_path / "engines"))


def check_content(proto: Any) -> int:
    """Heads are in fp32, and the rest is quantized; returns how many products are within attention.

    Weights and what they are multiplied with are quantized, and products within attention are not.
    """
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    made_by = {output: node.op_type for node in proto.graph.node for output in node.output}
    products = 0
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[2]] == onnx.TensorProto.UINT8
        if in_head(node.name) and node.op_type in ("Gemm", "MatMul"):
            assert "DequantizeLinear" not in [made_by.get(name) for name in node.input], node.name
        if node.op_type == "MatMul" and not in_head(node.name):
            kinds = [made_by.get(name) == "DequantizeLinear" for name in node.input]
            assert kinds[0] == kinds[1], node.name
            products += not any(kinds)
    return products


@pytest.mark.parametrize("family", ["bert", *SLOW])
def test_both_libraries_run_the_same_graphs(
    family: str, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    """And one graph of the whole model gives the same."""
    folder = engine_copy(family)
    one = tmp_path / "one"
    assert build_targets(folder, HERE, TEXTS).refused == {}
    manifest = read_manifest(folder)
    files = manifest.targets[NAMES[0]].files
    for name in HERE:
        assert manifest.targets[name].files == files
    protos = [onnx.load(folder / file.file) for file in files.values()]
    assert any(node.op_type == "QuantizeLinear" for p in protos for node in p.graph.node)
    assert sum(map(check_content, protos)) >= 2
    for file in files.values():
        check_graph(folder / file.file)
    assert not any(EnginesFolder(folder, manifest).damage())
    one.mkdir()
    write_one_graph(folder, one)
    logits = []
    for name in HERE:
        with Engine.load(folder, name) as engine, Engine.load(one, name) as whole:
            logits.append(engine.trace(TEXTS[:8]).logits)
            found = whole.trace(TEXTS[:8]).logits
            assert np.abs(found - logits[-1][-1:]).mean() < 0.05
    # The libraries round halves differently, and bf16 rounds the rest.
    for other in logits[1:]:
        assert np.abs(logits[0] - other).mean() < 0.05


def test_tables_are_looked_up_in_int8(added: Path, tmp_path: Path) -> None:
    """A whole table of words is not dequantized for a few of them, and no value changes."""
    manifest = read_manifest(added)
    file = manifest.targets["onnxruntime-int8"].files["segment_01"].file
    proto = onnx.load(added / file)
    made = {output: node for node in proto.graph.node for output in node.output}
    tables = {tensor.name: tensor for tensor in proto.graph.initializer}
    lookups = [node for node in proto.graph.node if node.op_type == "Gather"]
    of_bytes = [
        node
        for node in lookups
        if node.input[0] in tables and tables[node.input[0]].data_type == onnx.TensorProto.INT8
    ]
    assert len(of_bytes) >= 2
    assert not [
        node
        for node in lookups
        if node.input[0] in made and made[node.input[0]].op_type == "DequantizeLinear"
    ]


@pytest.mark.parametrize("zero_point", [0, 3])
def test_a_lookup_before_dequantizing_changes_no_value(zero_point: int) -> None:
    random_numbers = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "table": random_numbers.integers(-127, 128, (50, 8)).astype(np.int8),
        "scales": random_numbers.uniform(0.01, 2.0, 50).astype(np.float32),
        "zero": np.full(50, zero_point, np.int8),
    }
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("DequantizeLinear", [*arrays], ["floats"], axis=0),
            onnx.helper.make_node("Gather", ["floats", "ids"], ["found"], axis=0),
        ],
        "lookup",
        [tensor("ids", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [tensor("found", onnx.TensorProto.FLOAT, ["batch", "sequence", 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    ids = {"ids": random_numbers.integers(0, 50, (3, 5))}
    (before,) = cpu_session(proto.SerializeToString()).run(None, ids)
    int8._look_up_first(proto)
    onnx.checker.check_model(proto, full_check=True)
    (after,) = cpu_session(proto.SerializeToString()).run(None, ids)
    np.testing.assert_array_equal(before, after)
    operators = [node.op_type for node in proto.graph.node]
    assert ("DequantizeLinear" in operators) == bool(zero_point), "only tables around 0 are changed"


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("albert", "mpnet"))]
)
def test_heads_that_attend_are_not_quantized(
    family: str, attending_engines: Mapping[str, Path]
) -> None:
    """Neither their products with weights nor those of weights of tokens with states."""
    engines = EnginesFolder.read(attending_engines[family])
    rows = TextEncoder(engines.path, engines.manifest.tokenizer).encode(TEXTS[:8])
    attending = 0
    for name, batches in graph_inputs(engines, rows):
        proto = int8.quantized(engines.path / engines.manifest.graphs[name].file, batches)
        check_content(proto)
        heads = [node.op_type for node in proto.graph.node if in_head(node.name)]
        attending += heads.count("MatMul") == 2 and heads.count("Softmax") == 1
    assert attending == 3


def test_int8_that_changes_answers_is_not_kept(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that gave ranges do not judge it."""
    folder = engine_copy()
    before = contents(folder)
    require(monkeypatch, 1.1)
    checked: list[list[Text]] = []
    logits_of = check._logits

    def noted(engine: Engine, texts: list[Text], *others: Any) -> Any:
        if engine.target in NAMES:
            checked.append(texts)
        return logits_of(engine, texts, *others)

    monkeypatch.setattr(check, "_logits", noted)
    passed = Agreement(12, 0.0, 1.0, 1.0, 0, REQUIREMENTS["int8"])
    monkeypatch.setattr(Engine, "check", lambda _: passed)
    texts = [text for pair in TEXTS[::2] for text in (pair, WORDS[0])]
    result = build_targets(folder, NAMES, texts)
    assert list(result.refused) == [*NAMES]
    for refused in result.refused.values():
        assert re.search("int8 changes answers from exit .* give more texts", str(refused))
    assert checked == [[WORDS[0]] * (len(texts) // 2)] * len(NAMES)
    assert contents(folder) == before


def test_the_texts_that_are_given_judge_int8_and_odd_texts_do_not(
    added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without texts, those of the reference do."""
    EnginesFolder.read(added).keep_targets(lambda name, _: name != NAMES[1]).write()
    _, logits = read_reference(EnginesFolder.read(added))
    swap_logits(added, -logits)
    require(monkeypatch, 0.5)
    refused = build_targets(added, NAMES[1:]).refused
    assert re.search("answers agree for .* give more texts", str(refused[NAMES[1]]))
    result = build_targets(added, NAMES, TEXTS)
    assert result.refused == {}
    for name in NAMES:
        agreement = result.added[name]
        assert agreement is not None
        assert agreement.rows == len(TEXTS) // 2
        with Engine.load(added, name) as engine:
            assert engine.check().label_agreement < 0.5


def test_a_target_that_is_refused_does_not_take_its_graphs_along(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    refused = BackendError("not this one")

    def check(*arguments: Any) -> Any:
        if arguments[1] == NAMES[0]:
            raise refused
        return checked_target(*arguments)

    monkeypatch.setattr(build, "checked_target", check)
    result = build_targets(folder, NAMES, TEXTS)
    assert result.refused == {NAMES[0]: refused}
    with Engine.load(folder, NAMES[1]) as engine:
        engine.check()


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_earlier_int8_stays_until_the_new_one_has_passed(
    how: str, added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(added)
    if how == "interrupted":
        monkeypatch.setattr(build, "checked_target", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_targets(added, NAMES, OTHERS)
    else:
        require(monkeypatch, 1.1)
        assert list(build_targets(added, NAMES, OTHERS).refused) == [*NAMES]
    assert contents(added) == before


def test_each_target_keeps_the_graphs_that_it_was_checked_with(
    added: Path, set_points: Callable[..., None]
) -> None:
    set_points(added, NAMES[1], fast=Budget(exit=1))
    before = read_manifest(added).targets
    result = build_targets(added, NAMES[1:], TEXTS)
    assert result.lost_points == {}, "the graphs are the same"
    result = build_targets(added, NAMES[1:], OTHERS)
    assert result.default.startswith(f"default target: {NAMES[1]}, as chosen by hand")
    assert result.lost_points == {NAMES[1]: ("fast",)}
    first, second = (result.manifest.targets[name].files for name in NAMES)
    assert first == before[NAMES[0]].files != second
    result = build_targets(added, NAMES[:1], OTHERS)
    assert result.manifest.targets[NAMES[0]].files == second
    left = {f"targets/int8/{path.name}" for path in (added / "targets" / "int8").iterdir()}
    assert left == {file.file for file in second.values()}, "older graphs are deleted"
    for name in NAMES:
        with Engine.load(added, name) as engine:
            engine.check()


def test_without_texts_another_target_runs_the_same_graphs(
    added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no quantizer."""
    EnginesFolder.read(added).keep_targets(lambda name, _: name != NAMES[0]).write()
    monkeypatch.setattr(int8, "quantize", lambda *_: 1 / 0)
    result = build_targets(added, NAMES[:1])
    assert result.refused == {}
    first, second = (result.manifest.targets[name].files for name in NAMES)
    assert first == second


def test_int8_needs_a_cpu_with_vnni(
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other x86 CPUs cut off large sums, so a verified target would give other answers there."""
    folder = engine_copy()
    engines = EnginesFolder.read(folder)
    like_int8: dict[str, Any] = {"precision": "int8", "graph_precision": "fp32", "tolerance": None}
    for name in NAMES:
        target = Target(backend=name.removesuffix("-int8"), **like_int8)
        engines = engines.with_target(name, target)
    engines.with_manifest(default_target=NAMES[1]).write()
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "avx2 avx512f"})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in NAMES:
        with pytest.raises(BackendError, match=f"{name} needs a CPU with VNNI instructions"):
            Engine.load(folder, name)
    with Engine.load(folder) as engine:
        assert engine.target == "onnxruntime-fp32"
    assert "needs a CPU with VNNI instructions" in caplog.text
    refused = build_targets(folder, INT8_TARGETS, TEXTS).refused
    assert list(refused) == [*INT8_TARGETS]
    for name in NAMES:
        assert f"{name} needs a CPU with VNNI instructions" in str(refused[name])
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with Engine.load(folder, NAMES[1]) as engine:
        engine.predict(TEXTS[:1])


def test_int8_without_its_packages_is_refused_and_the_rest_is_built(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "nncf")
    result = build_targets(engine_copy(), [*NAMES, "openvino-fp32"], TEXTS)
    assert list(result.refused) == [*NAMES]
    assert list(result.added) == ["openvino-fp32"]
    for refused in result.refused.values():
        assert isinstance(refused, MissingExtraError)
        assert re.search("nncf.*quantize", str(refused))


def test_too_few_texts_are_refused_before_anything_is_built(added: Path) -> None:
    for few in (TEXTS[:10], TEXTS[:31]):
        with pytest.raises(
            InputError, match=rf"at least 32 different texts, .* {len(few)} .*`texts`"
        ):
            build_targets(added, ["openvino-fp32", *NAMES], few)
    EnginesFolder.read(added).keep_targets(lambda name, _: name not in NAMES).write()
    with pytest.raises(InputError, match="at least 32 different texts, but there are 0"):
        build_targets(added, ["openvino-fp32", *NAMES])
    assert "openvino-fp32" not in read_manifest(added).targets


def test_a_quantizer_that_fails_is_named_and_loses_nothing(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def fail(module: str, *_: object) -> str:
        runs.append(module)
        return "KeyError: 'x'"

    monkeypatch.setattr(int8, "run_worker", fail)
    result = build_targets(engine_copy(), [*NAMES, "openvino-fp32"], [*TEXTS, "one", "two more"])
    assert list(result.added) == ["openvino-fp32"]
    for name in NAMES:
        assert "segment_01 could not be quantized: KeyError: 'x'" in str(result.refused[name])
    assert runs == ["int8"], "it does not fail twice"


FOUR = ["rain", "the film is not good", "", "play music"]


def test_the_last_graph_on_its_inputs_gives_the_last_exit(engines: Mapping[str, Path]) -> None:
    folder = engines["albert"]
    manifest = read_manifest(folder)
    with Engine.load(folder) as engine:
        expected = engine.trace(FOUR).logits[-1]
        found = dict(graph_inputs(EnginesFolder.read(folder), engine.core.encode(FOUR), batch=2))
    name = manifest.segments[-1].calls[-1]
    session = cpu_session(folder / manifest.graphs[name].file)
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in found[name]])
    assert_close(logits, expected)
    calls = [call for segment in manifest.segments for call in segment.calls]
    assert found.keys() == set(calls)
    for graph, feeds in found.items():
        assert len(feeds) == 2 * calls.count(graph), "a shared block once for each call"
