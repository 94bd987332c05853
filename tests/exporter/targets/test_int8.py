"""int8: one set of graphs for CPUs, quantized with NNCF, and another one for TensorRT."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fpabee.exporter.add_targets import AddTargetsOptions, AddTargetsResult, add_targets
from one_graph import write_one_graph
from onnx import numpy_helper

from fpabee.exporter import add_targets as additions
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.cli.export import main
from fpabee.exporter.onnx_file import in_head
from fpabee.exporter.targets import cpu, int8
from fpabee.exporter.targets.backends import unavailable_reason
from fpabee.exporter.targets.check import exact_logits
from fpabee.exporter.targets.int8 import graph_inputs
from fpabee.runtime import (
    BackendError,
    Budget,
    Engine,
    InputError,
    Manifest,
    MissingExtraError,
    VerificationError,
    machine,
    read_manifest,
)
from fpabee.runtime.agreement import REQUIREMENTS
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.artifact.manifest import Target, with_target
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends import openvino
from fpabee.runtime.backends.onnxruntime import cpu_session
from fpabee.runtime.encoding import Text
from fpabee.runtime.progress import Progress

from ...closeness import assert_close

pytest.importorskip("openvino")
pytest.importorskip("nncf")

WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play", "music", "table")
TEXTS = [" ".join(pair) for pair in itertools.permutations(WORDS, 2)]
NAMES = ("onnxruntime-int8", "openvino-int8")
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in _FAMILIES if family != "bert"]

BOTH = AddTargetsOptions(int8=True, calibration_data=TEXTS, backends=("openvino", "onnxruntime"))
OTHERS = replace(BOTH, calibration_data=TEXTS[::-1])  # as if they gave other ranges


def names_of(result: AddTargetsResult, backend: str) -> set[str]:
    return {one.name for one in result.checked if one.name.startswith(backend)}


def require(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    required = replace(REQUIREMENTS["int8"], labels=share, exits=share)
    monkeypatch.setitem(REQUIREMENTS, "int8", required)


@pytest.fixture(scope="module", autouse=True)
def lenient_and_fast() -> Any:
    """A tiny random model has no robust answers, and what is quantized takes long, so only once."""
    quantized: dict[object, dict[str, Any]] = {}
    quantize = int8.quantize

    def remember(
        folder: Path, manifest: Manifest, texts: Sequence[Text], form: str, progress: Progress
    ) -> dict[str, Any]:
        key = *(graph.sha256 for graph in manifest.graphs.values()), len(texts), form
        if key not in quantized:
            quantized[key] = quantize(folder, manifest, texts, form, progress)
        protos = copy.deepcopy(quantized[key])
        if texts[0] == OTHERS.calibration_data[0]:
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
    add_targets(folder, replace(BOTH, default_target=NAMES[1]))
    return folder


@pytest.fixture
def added(template: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(template, tmp_path / "engines"))


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package be missing."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == package else find(n))
    monkeypatch.setitem(sys.modules, package, None)
    openvino._core.cache_clear()


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
        if in_head(node.name) and node.op_type == "Gemm":
            assert types[node.input[1]] == onnx.TensorProto.FLOAT
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
    folder, one = engine_copy(family), tmp_path / "one"
    assert not [checked.refused for checked in add_targets(folder, BOTH).checked if checked.refused]
    manifest = read_manifest(folder)
    first, second = (manifest.targets[name] for name in NAMES)
    assert first.files == second.files
    assert (first.rest_precision, second.rest_precision) == ("", openvino.rest_precision())
    protos = [onnx.load(folder / file.file) for file in first.files.values()]
    assert any(node.op_type == "QuantizeLinear" for p in protos for node in p.graph.node)
    assert sum(map(check_content, protos)) >= 2
    for file in first.files.values():
        check_graph(folder / file.file)
    assert not any(EnginesFolder(folder, manifest).damage())
    one.mkdir()
    write_one_graph(folder, one)
    logits = []
    for name in NAMES:
        with Engine.load(folder, name) as engine, Engine.load(one, name) as whole:
            logits.append(engine.trace(TEXTS[:8]).logits)
            found = whole.trace(TEXTS[:8]).logits
            assert np.abs(found - logits[-1][-1:]).mean() < 0.05
    # The libraries round halves differently.
    assert np.abs(logits[0] - logits[1]).mean() < 0.05


def test_int8_that_changes_answers_is_not_kept(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(monkeypatch, 1.1)
    folder = engine_copy()
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    texts = ("--calibration-data", str(file))
    backends = ("--backend", "openvino", "--backend", "onnxruntime")
    result = CliRunner().invoke(main, ["--from", str(folder), "--int8", *texts, *backends])
    assert result.exit_code == 1
    for name in NAMES:
        assert re.search(f"not added: {name}: .*from exit", result.stdout)
    assert "added openvino-fp32" in result.stdout
    assert f"{' and '.join(NAMES)} did not pass: " in result.stderr
    assert not set(NAMES) & read_manifest(folder).targets.keys()
    assert not (folder / "targets" / "cpu-int8").exists()


@pytest.mark.parametrize("interrupted", ["", "at the check", "before the manifest"])
def test_earlier_int8_stays_until_the_new_one_has_passed(
    interrupted: str, added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(added)

    def interrupt(path: Path, manifest: Manifest) -> None:
        if manifest.targets[NAMES[0]].files != before.targets[NAMES[0]].files:
            raise ZeroDivisionError
        EnginesFolder(path, manifest).write()

    if interrupted:
        if interrupted == "at the check":
            monkeypatch.setattr(cpu, "check_target", lambda *_: 1 / 0)
        monkeypatch.setattr(additions, "write_manifest", interrupt)
        with pytest.raises(ZeroDivisionError):
            add_targets(added, OTHERS)
    else:
        require(monkeypatch, 1.1)
        assert all(checked.refused for checked in add_targets(added, OTHERS).checked)
    manifest = read_manifest(added)
    for name in NAMES:
        assert manifest.targets[name].files == before.targets[name].files
        for file in manifest.targets[name].files.values():
            assert sha256_of(added / file.file) == file.sha256
    assert (manifest.default_target, manifest.default_is_fixed) == (NAMES[1], True)
    files = manifest.targets[NAMES[0]].files.values()
    assert set((added / "targets/cpu-int8").iterdir()) == {added / file.file for file in files}


def test_int8_made_again_keeps_what_runs_its_graphs(
    added: Path,
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_points(added, NAMES[1], fast=Budget(exit=1))
    before = read_manifest(added).targets[NAMES[1]]
    with monkeypatch.context() as patch:
        without(patch, "openvino")
        result = add_targets(added, replace(BOTH, backends=("onnxruntime",)))
    openvino._core.cache_clear()
    assert result.manifest.targets[NAMES[1]] == before, "the graphs are the same"
    result = add_targets(added, replace(OTHERS, backends=("openvino",)))
    assert result.default.startswith(f"default target: {NAMES[1]}, as chosen by hand")
    assert result.lost_points == {NAMES[1]: ("fast",)}
    files = result.manifest.targets[NAMES[0]].files
    assert files == result.manifest.targets[NAMES[1]].files
    left = set((added / "targets" / "cpu-int8").iterdir())
    assert left == {added / file.file for file in files.values()}, "older graphs are deleted"
    for name in NAMES:
        with Engine.load(added, name) as engine:
            engine.check()


def test_int8_needs_a_cpu_with_vnni(
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other x86 CPUs cut off large sums, so a verified target would give other answers there."""
    folder = engine_copy()
    manifest = read_manifest(folder)
    like_int8: dict[str, Any] = {"precision": "int8", "graph_precision": "fp32", "tolerance": None}
    for name in NAMES:
        target = Target(backend=name.removesuffix("-int8"), **like_int8)
        manifest = with_target(manifest, name, target)
    EnginesFolder(folder, manifest).with_manifest(default_target=NAMES[1]).write()
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "avx2 avx512f"})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in NAMES:
        with pytest.raises(BackendError, match=f"{name} needs a CPU with VNNI instructions"):
            Engine.load(folder, name)
    with Engine.load(folder) as engine:
        assert engine.target == "onnxruntime-fp32"
    assert "needs a CPU with VNNI instructions" in caplog.text
    with pytest.raises(BackendError, match="int8 for CPUs needs VNNI instructions"):
        add_targets(folder, BOTH)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with Engine.load(folder, NAMES[1]) as engine:
        engine.predict(TEXTS[:1])


def test_int8_is_for_this_machine_or_for_the_gpus_of_fp16(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = MissingExtraError("it is not installed")
    monkeypatch.setattr(
        additions,
        "unavailable_reason",
        lambda name: missing if name.startswith("tensorrt") else unavailable_reason(name),
    )
    folder = engine_copy()
    result = add_targets(folder, replace(BOTH, backends=None))
    assert set(NAMES) < result.manifest.targets.keys()
    assert not names_of(result, "tensorrt"), "nobody asked for plans in fp32"
    assert "int8" not in result.manifest.precisions
    without(monkeypatch, "nncf")
    with pytest.raises(MissingExtraError, match=r"nncf.*quantize"):
        add_targets(folder, replace(BOTH, backends=None))
    result = add_targets(folder, replace(BOTH, backends=None, fp16=True))
    assert {"fp16", "int8"} == result.manifest.precisions.keys()
    assert {"tensorrt-fp16", "tensorrt-int8"} <= names_of(result, "tensorrt")


def test_cpus_need_texts(engine_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = engine_copy()
    for _ in range(2):
        with pytest.raises(InputError, match=r"there are 0 .*`calibration_data`"):
            add_targets(folder, replace(BOTH, calibration_data=()))
        manifest = read_manifest(folder)  # graphs for plans do not help
        precisions = {"int8": manifest.graphs}
        EnginesFolder(folder, manifest).with_manifest(precisions=precisions).write()
    with pytest.raises(InputError, match="at least 32 texts, but there are 10"):
        add_targets(folder, replace(BOTH, calibration_data=TEXTS[:10]))
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:10]))
    (tmp_path / "model").mkdir()
    command = [str(tmp_path / "model"), "--int8", "--calibration-data", str(tmp_path / "few.txt")]
    result = CliRunner().invoke(main, command)
    assert "there are 10" in result.stderr, "before the export begins"


def test_a_quantizer_that_fails_is_named_and_loses_nothing(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "run_worker", lambda *_: "KeyError: 'x'")
    folder = engine_copy()
    with pytest.raises(VerificationError, match="segment_01 could not be quantized: KeyError: 'x'"):
        add_targets(folder, replace(BOTH, calibration_data=[*TEXTS, "one more"]))
    assert "openvino-fp32" in read_manifest(folder).targets


@pytest.mark.parametrize("family", ["bert", *SLOW])
def test_products_with_weights_are_quantized_symmetrically(
    family: str, engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy(family)
    judged: list[Text] = []

    def noted(*given: Any) -> Any:
        judged.extend(given[2])
        return exact_logits(*given)

    monkeypatch.setattr("fpabee.exporter.targets.fp16.exact_logits", noted)
    texts = [text for pair in TEXTS[::2] for text in (pair, WORDS[0])]
    added = add_targets(folder, AddTargetsOptions(int8=True, calibration_data=texts, backends=()))
    (checked,) = added.checked
    assert checked.agreement is not None
    assert checked.agreement.rows == 12 + 1
    assert set(judged) == {WORDS[0]}, "texts that gave ranges are not judged"
    quantized = 0
    for graph in added.manifest.graphs_in("int8").values():
        assert graph.file.startswith("onnx/int8/")
        check_graph(folder / graph.file)
        proto = onnx.load(folder / graph.file)
        tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            assert not node.name.startswith("head")
            zero = tensors[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any(), "symmetric"
            quantized += 1
    assert quantized > 10


FOUR = ["rain", "the film is not good", "", "play music"]


def test_the_last_graph_on_its_inputs_gives_the_last_exit(engines: Mapping[str, Path]) -> None:
    folder = engines["albert"]
    manifest = read_manifest(folder)
    with Engine.load(folder) as engine:
        expected = engine.trace(FOUR).logits[-1]
        found = dict(graph_inputs(folder, manifest, engine.core.encode(FOUR), batch=2))
    name = manifest.segments[-1].calls[-1]
    session = cpu_session(folder / manifest.graphs[name].file)
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in found[name]])
    assert_close(logits, expected)
    calls = [call for segment in manifest.segments for call in segment.calls]
    assert found.keys() == set(calls)
    for graph, feeds in found.items():
        assert len(feeds) == 2 * calls.count(graph), "a shared block once for each call"
