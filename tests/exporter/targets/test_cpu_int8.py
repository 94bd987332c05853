"""int8 for CPUs: one set of graphs, quantized with NNCF, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from fpabee.calibration import CalibrationOptions, calibrate
from fpabee.exporter import add_targets as targets_module
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.cli.export import main
from fpabee.exporter.merge import write_one_graph
from fpabee.exporter.onnx_file import in_head
from fpabee.exporter.targets import cpu, int8
from fpabee.exporter.targets.backends import unavailable_reason
from fpabee.runtime import (
    BackendError,
    Budget,
    Engine,
    Goal,
    InputError,
    Manifest,
    MissingExtraError,
    Row,
    VerificationError,
    machine,
    read_manifest,
)
from fpabee.runtime.agreement import REQUIREMENTS
from fpabee.runtime.artifact.folder import damage, sha256_of, write_manifest
from fpabee.runtime.artifact.manifest import Target, with_target
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends import openvino
from fpabee.runtime.progress import silent

pytest.importorskip("openvino")
pytest.importorskip("nncf")

WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play", "music", "table")
TEXTS = [" ".join(pair) for pair in itertools.permutations(WORDS, 2)]
NAMES = ("onnxruntime-int8", "openvino-int8")
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in _FAMILIES if family != "albert"]


_QUANTIZED: dict[object, dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the same graphs be quantized with the same texts only once, because that takes long."""
    quantize = int8.quantize

    def remember(folder: Path, manifest: Manifest, texts: Any, *others: Any) -> dict[str, Any]:
        graphs = tuple(graph.sha256 for graph in manifest.graphs.values())
        key = graphs, tuple(texts), others[0]
        if key not in _QUANTIZED:
            _QUANTIZED[key] = quantize(folder, manifest, texts, *others)
        return _QUANTIZED[key]

    monkeypatch.setattr(int8, "quantize", remember)


@pytest.fixture
def options(tmp_path: Path) -> AddTargetsOptions:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return AddTargetsOptions(
        int8=True, calibration_data=tmp_path / "texts.txt", backends=("openvino", "onnxruntime")
    )


def require(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    required = dataclasses.replace(REQUIREMENTS["int8"], labels=share, exits=share)
    monkeypatch.setitem(REQUIREMENTS, "int8", required)


def without_nncf(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "nncf" else find(n))


@pytest.mark.parametrize("family", ["albert", *SLOW])
def test_both_libraries_run_the_same_graphs(
    family: str,
    engine_copy: Callable[..., Path],
    options: AddTargetsOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require(monkeypatch, 0.0)  # a tiny random model has no robust answers
    folder = engine_copy(family)
    found = {each.name: each for each in add_targets(folder, options).checked}
    assert not [checked.refused for checked in found.values() if checked.refused]
    manifest = read_manifest(folder)
    first, second = (manifest.targets[name] for name in NAMES)
    assert first.files == second.files
    quantized = products = 0
    for file in first.files.values():
        check_graph(folder / file.file)
        proto = onnx.load(folder / file.file)
        types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "QuantizeLinear":
                quantized += 1
                assert types[node.input[2]] == onnx.TensorProto.UINT8
        for node in proto.graph.node:
            if in_head(node.name) and node.op_type == "Gemm":
                assert types[node.input[1]] == onnx.TensorProto.FLOAT
        made_by = {output: node.op_type for node in proto.graph.node for output in node.output}
        for node in proto.graph.node:
            if node.op_type == "MatMul" and not in_head(node.name):
                # Weights and what they are multiplied with are quantized. Products within
                # attention are not.
                kinds = [made_by.get(name) == "DequantizeLinear" for name in node.input]
                assert kinds[0] == kinds[1], node.name
                products += not any(kinds)
    assert quantized
    assert products >= 2
    assert not any(damage(folder, read_manifest(folder)))
    logits = []
    for name in NAMES:
        with Engine.load(folder, name) as engine:
            logits.append(engine.trace(TEXTS[:8]).logits)
    # The libraries round halves differently.
    assert np.abs(logits[0] - logits[1]).mean() < 0.05
    assert first.rest_precision == ""
    assert second.rest_precision == ("bf16" if openvino.has_bf16() else "fp32")


def test_int8_that_changes_answers_is_not_kept(
    engine_copy: Callable[..., Path], options: AddTargetsOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(monkeypatch, 1.1)
    folder = engine_copy()
    texts = ("--calibration-data", str(options.calibration_data))
    backends = ("--backend", "openvino", "--backend", "onnxruntime")
    result = CliRunner().invoke(main, ["--from", str(folder), "--int8", *texts, *backends])
    assert result.exit_code == 1
    for name in NAMES:
        assert re.search(f"{name} is not kept: .*from exit", result.stdout)
    assert "added openvino-fp32" in result.stdout
    assert f"{' and '.join(NAMES)} did not pass: " in result.stderr
    assert not set(NAMES) & read_manifest(folder).targets.keys()
    assert not (folder / "targets" / "cpu-int8").exists()


@pytest.mark.parametrize("interrupted", ["", "at the check", "before the manifest"])
def test_earlier_int8_stays_until_the_new_one_has_passed(
    engine_copy: Callable[..., Path],
    options: AddTargetsOptions,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: str,
) -> None:
    folder = engine_copy()
    with monkeypatch.context() as patch:
        require(patch, 0.0)
        before = add_targets(folder, dataclasses.replace(options, default_target=NAMES[1]))
    (folder.parent / "texts.txt").write_text("\n".join(reversed(TEXTS)))  # other ranges
    if interrupted == "before the manifest":
        require(monkeypatch, 0.0)

        def interrupt(path: Path, manifest: Manifest) -> None:
            if manifest.targets[NAMES[0]].files != before.manifest.targets[NAMES[0]].files:
                raise ZeroDivisionError
            write_manifest(path, manifest)

        monkeypatch.setattr(targets_module, "write_manifest", interrupt)
        with pytest.raises(ZeroDivisionError):
            add_targets(folder, options)
    elif interrupted:
        monkeypatch.setattr(cpu, "check_target", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_targets(folder, options)
    else:
        require(monkeypatch, 1.1)
        assert all(checked.refused for checked in add_targets(folder, options).checked)
    manifest = read_manifest(folder)
    for name in NAMES:
        assert manifest.targets[name].files == before.manifest.targets[name].files
        for file in manifest.targets[name].files.values():
            assert sha256_of(folder / file.file) == file.sha256
    assert (manifest.default_target, manifest.default_is_fixed) == (NAMES[1], True)
    assert [path.name for path in (folder / "targets").iterdir()] == ["cpu-int8"]


def test_int8_made_again_keeps_what_runs_its_graphs(
    engine_copy: Callable[..., Path],
    options: AddTargetsOptions,
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require(monkeypatch, 0.0)
    folder = engine_copy()
    add_targets(folder, dataclasses.replace(options, default_target=NAMES[1]))
    set_points(folder, NAMES[1], fast=Budget(exit=1))
    only_onnxruntime = dataclasses.replace(options, backends=("onnxruntime",))
    only_openvino = dataclasses.replace(options, backends=("openvino",))
    before = read_manifest(folder).targets[NAMES[1]]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        openvino._core.cache_clear()
        result = add_targets(folder, only_onnxruntime)
    assert result.manifest.targets[NAMES[1]] == before, "the graphs are the same"
    (folder.parent / "texts.txt").write_text("\n".join(reversed(TEXTS)))  # other ranges
    result = add_targets(folder, only_openvino)
    assert result.default.startswith(f"default target: {NAMES[1]}, as chosen by hand")
    assert result.lost_points == {NAMES[1]: ("fast",)}
    files = result.manifest.targets[NAMES[0]].files
    assert files == result.manifest.targets[NAMES[1]].files
    left = set((folder / "targets" / "cpu-int8").iterdir())
    assert left == {folder / file.file for file in files.values()}, "older graphs are deleted"
    for name in NAMES:
        with Engine.load(folder, name) as engine:
            engine.check()
    (folder.parent / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino._core.cache_clear()
    result = add_targets(folder, only_onnxruntime)
    assert "OpenVINO is not installed" in str(result.checked[-1].refused)
    assert NAMES[1] not in result.manifest.targets


def test_points_do_not_apply_where_the_rest_runs_in_another_precision(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, name, here = engine_copy(), NAMES[1], openvino.rest_precision()
    other = {"fp32": "bf16", "bf16": "fp32"}[here]
    measured = Target(
        backend="openvino", precision="int8", graph_precision="fp32", rest_precision=other,
        tolerance=None,
    )  # fmt: skip
    write_manifest(folder, with_target(read_manifest(folder), name, measured))
    set_points(folder, name, fast=Budget(exit=1), default="fast")
    for point in (None, "fast"):
        with Engine.load(folder, name, point, threads=1) as engine:
            assert (engine.operating_point, engine.rule) == (None, Budget(exit=3))
    assert len(caplog.messages) == 1
    assert f"runs in {other}, but this CPU runs it in {here}" in caplog.text
    rows = [Row(text, None, ("music",)) for text in TEXTS]
    calibrate(folder, rows, CalibrationOptions(goals={"new": Goal(max_drop=1.0)}, target=name))
    found = read_manifest(folder).targets[name]
    assert (found.rest_precision, list(found.operating_points)) == (here, ["new"])
    with Engine.load(folder, name, threads=1) as engine:
        assert engine.operating_point == "new"


def test_int8_needs_a_cpu_with_vnni(
    engine_copy: Callable[..., Path],
    options: AddTargetsOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other x86 CPUs cut off large sums, so a verified target would give other answers there."""
    folder = engine_copy()
    manifest = read_manifest(folder)
    for name in NAMES:
        backend = name.removesuffix("-int8")
        target = Target(backend=backend, precision="int8", graph_precision="fp32", tolerance=None)
        manifest = with_target(manifest, name, target)
    write_manifest(folder, msgspec.structs.replace(manifest, default_target=NAMES[1]))
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "avx2 avx512f"})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in NAMES:
        with pytest.raises(BackendError, match=f"{name} needs a CPU with VNNI instructions"):
            Engine.load(folder, name)
    with Engine.load(folder) as engine:
        assert engine.target == "onnxruntime-fp32"
    assert "needs a CPU with VNNI instructions" in caplog.text
    with pytest.raises(BackendError, match="int8 for CPUs needs VNNI instructions"):
        add_targets(folder, options)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with Engine.load(folder, NAMES[1]) as engine:
        engine.predict(TEXTS[:1])


def test_ten_texts_are_too_few(
    engine_copy: Callable[..., Path], options: AddTargetsOptions, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:10]))
    with pytest.raises(InputError, match="at least 32 texts, but there are 10"):
        add_targets(engine_copy(), options)
    command = ["model_dir", "--int8", "--calibration-data", str(tmp_path / "texts.txt")]
    result = CliRunner().invoke(main, command)
    assert "there are 10" in result.stderr, "before the export begins"


def test_int8_is_for_this_machine_or_for_the_gpus_of_fp16(
    engine_copy: Callable[..., Path], options: AddTargetsOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(monkeypatch, 0.0)
    missing = MissingExtraError("it is not installed")
    monkeypatch.setattr(
        targets_module,
        "unavailable_reason",
        lambda name: missing if name.startswith("tensorrt") else unavailable_reason(name),
    )
    asked, folder = dataclasses.replace(options, backends=None), engine_copy()
    result = add_targets(folder, asked)
    assert set(NAMES) < result.manifest.targets.keys()
    assert not result.not_built, "nobody asked for plans in fp32"
    assert "int8" not in result.manifest.precisions
    without_nncf(monkeypatch)
    with pytest.raises(MissingExtraError, match="nncf"):
        add_targets(folder, asked)
    result = add_targets(folder, dataclasses.replace(asked, fp16=True))
    assert {"fp16", "int8"} == result.manifest.precisions.keys()
    assert {"tensorrt-fp16", "tensorrt-int8"} < result.not_built.keys()


def test_a_later_failure_does_not_lose_what_was_verified(
    engine_copy: Callable[..., Path], options: AddTargetsOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    monkeypatch.setattr(int8, "quantize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_targets(folder, options)
    assert "openvino-fp32" in read_manifest(folder).targets


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("MemoryError: Unable to allocate 9 GiB", "shorter texts"),
        ("OSError: [Errno 28] No space left on device", "shorter texts"),
        ("KeyError: 'x'", "report this"),
    ],
)
def test_a_quantizer_that_fails_is_explained(
    error: str, hint: str, engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "run_worker", lambda *_: error)
    manifest = read_manifest(engines["bert"])
    with pytest.raises(VerificationError, match="segment_01 could not be quantized: ") as found:
        int8.quantize(engines["bert"], manifest, [], "smooth", silent)
    assert error in found.value.message
    assert hint in found.value.hint


def test_without_texts_or_nncf_the_error_says_so(
    engine_copy: Callable[..., Path], options: AddTargetsOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    only_openvino = Target(
        backend="openvino", precision="int8", graph_precision="fp32", tolerance=None
    )
    for _ in range(2):
        with pytest.raises(InputError, match="no texts are given") as error:
            add_targets(folder, dataclasses.replace(options, calibration_data=None))
        assert "calibration_data" in error.value.hint
        write_manifest(folder, with_target(read_manifest(folder), NAMES[1], only_openvino))
    without_nncf(monkeypatch)
    with pytest.raises(MissingExtraError, match="nncf") as missing:
        add_targets(folder, options)
    assert "quantize" in missing.value.hint


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_one_graph_keeps_int8_without_texts(
    family: str,
    engine_copy: Callable[..., Path],
    options: AddTargetsOptions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    require(monkeypatch, 0.0)
    folder, new = engine_copy(family), tmp_path / "new"
    add_targets(folder, options)
    new.mkdir()
    write_one_graph(folder, new)
    for name in NAMES:
        with Engine.load(folder, name) as before, Engine.load(new, name) as after:
            expected, found = before.trace(TEXTS[:8]).logits, after.trace(TEXTS[:8]).logits
        assert np.abs(found - expected[-1:]).mean() < 0.05
