"""Targets of OpenVINO are added if they agree with the model; the fastest is the default."""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from fpabee.exporter import add_targets as additions
from fpabee.exporter.add_targets import AddTargetsOptions, AddTargetsResult, add_targets
from fpabee.exporter.cli.export import main
from fpabee.exporter.targets import backends, cpu
from fpabee.exporter.targets.backends import OPENVINO
from fpabee.exporter.targets.check import Checked, check_target, exact_logits
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    Engine,
    Manifest,
    VerificationError,
    read_manifest,
)
from fpabee.runtime.agreement import EXPORT_LIMIT, REQUIREMENTS, logit_differences
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.artifact.manifest import keep_targets, with_target
from fpabee.runtime.backends import openvino
from fpabee.runtime.cli.inspect import main as inspect
from fpabee.runtime.progress import silent

pytest.importorskip("openvino")

ONNX, FP32, BF16 = "onnxruntime-fp32", "openvino-fp32", "openvino-bf16"
ADDED = [FP32, *[BF16] * openvino.has_bf16()]
needs_bf16 = pytest.mark.skipif(not openvino.has_bf16(), reason="this CPU has no bf16")
SECONDS = {ONNX: 2.0, FP32: 1.0, BF16: 1.5}


def add(folder: Path, default: str | None = None) -> AddTargetsResult:
    return add_targets(folder, AddTargetsOptions(backends=(OPENVINO,), default_target=default))


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def no_labels_suffice(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    for precision in precisions:
        required = dataclasses.replace(REQUIREMENTS[precision], labels=1.1)
        monkeypatch.setitem(REQUIREMENTS, precision, required)


def in_turns(seconds: Mapping[str, float], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The same seconds in three turns, at two shapes."""
    return {name: np.full((3, 2), seconds[name]) for name in names}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is measured instead of times."""
    made_up = dict(SECONDS)

    monkeypatch.setattr(cpu, "_seconds", lambda *given: in_turns(made_up, given[2]))
    return made_up


@pytest.fixture(scope="module")
def added(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all targets, whose default is `openvino-fp32`. Read-only."""
    folder = tmp_path_factory.mktemp("added") / "engines"
    shutil.copytree(engines["bert"], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_seconds", lambda *given: in_turns(SECONDS, given[2]))
        add(folder)
    return folder


@pytest.fixture
def folder(added: Path, seconds: dict[str, float], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(added, tmp_path / "engines"))


def test_targets_are_verified_and_the_fastest_is_the_default(
    engine_copy: Callable[..., Path], seconds: dict[str, float]
) -> None:
    folder = engine_copy()
    result = export("--from", folder, "--backend", "openvino")
    assert result.exit_code == 0, result.output
    assert "added openvino-fp32: verified on 12 texts\n" in result.stdout
    assert f"default target: {FP32}, 2.00 times as fast as {ONNX} here" in result.stdout
    manifest = read_manifest(folder)
    assert list(manifest.targets) == [ONNX, *ADDED]
    assert manifest.default_target == FP32
    for name, target in manifest.targets.items():
        assert target.tolerance is not None
        assert target.tolerance < REQUIREMENTS[target.precision].tie
        assert target.relative_speed == pytest.approx(2 / SECONDS[name], abs=1e-3)
    assert add(folder).checked == [], "they are not checked again"
    shown = CliRunner().invoke(inspect, [str(folder)])
    assert "openvino-fp32 (default)" in shown.stdout
    assert "2.00x" in shown.stdout


@pytest.mark.parametrize(
    ("measured", "default", "why"),
    [
        ({FP32: 0.95, BF16: 0.92}, ONNX, "no other target for CPUs is clearly faster"),
        ({FP32: 0.8, BF16: 2.0}, FP32, f"{FP32}, 1.25 times as fast as {ONNX}"),
        # Of two that are about as fast, the more exact one.
        ({FP32: 0.8, BF16: 0.75}, FP32, f"{FP32}, 1.25 times as fast as {ONNX}"),
        pytest.param({FP32: 0.95, BF16: 0.88}, FP32, f"{FP32}, 1.05 times", marks=needs_bf16),
        pytest.param({FP32: 0.8, BF16: 0.5}, BF16, f"{BF16}, 2.00 times", marks=needs_bf16),
    ],
)
def test_a_little_faster_is_not_enough(
    measured: dict[str, float], default: str, why: str, folder: Path, seconds: dict[str, float]
) -> None:
    seconds.update({ONNX: 1.0} | measured)
    manifest = msgspec.structs.replace(read_manifest(folder), default_target=ONNX)
    changed, said = cpu.with_fastest_default(folder, manifest, silent)
    assert changed.default_target == default
    assert why in said


@pytest.mark.parametrize(
    ("measured", "default"),
    [
        ([0.8, 0.8, 0.8, 0.8, 0.8, 9.0], FP32),  # something else ran in one turn
        ([0.8, 0.8, 0.8, 0.8, 9.0, 9.0], ONNX),  # a gain that does not last
        ([0.95, 0.95, 0.95, 0.95, 0.01, 0.01], ONNX),  # on average, it would be far faster
        ([0.92] * 6, ONNX),
    ],
)
def test_a_gain_must_show_in_nearly_every_turn(
    measured: list[float], default: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = keep_targets(read_manifest(folder), lambda name, _: name != BF16)
    manifest = msgspec.structs.replace(manifest, default_target=ONNX)
    times = {ONNX: np.ones((6, 1)), FP32: np.array(measured)[:, None]}
    monkeypatch.setattr(cpu, "_seconds", lambda *_: times)
    assert cpu.with_fastest_default(folder, manifest, silent)[0].default_target == default


def test_the_best_run_of_each_turn_counts(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 1000))
    monkeypatch.setattr(Engine, "time_exits", lambda *_: [float(next(clock))] * 3)
    found = cpu._seconds(added, read_manifest(added), [ONNX, FP32])
    assert {name: times.shape for name, times in found.items()} == {ONNX: (6, 2), FP32: (6, 2)}
    assert found[ONNX][:2].tolist() == [[3.0, 9.0], [27.0, 33.0]]
    assert found[FP32][:2].tolist() == [[15.0, 21.0], [39.0, 45.0]]


def test_a_target_that_changes_answers_is_not_kept(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    no_labels_suffice(monkeypatch, "fp32")
    first = add(folder).checked[0]
    assert first.name == FP32
    assert "not the model that was exported" in str(first.refused)
    assert FP32 not in read_manifest(folder).targets
    with pytest.raises(VerificationError, match=f"{FP32} is not kept: "):
        add(folder, FP32)


def test_a_default_that_was_chosen_by_hand_stays(folder: Path) -> None:
    assert "as chosen by hand" in add(folder, ONNX).default
    changed, _ = cpu.with_fastest_default(folder, read_manifest(folder), silent)
    assert changed.default_target == ONNX
    with pytest.raises(BackendError, match="no target 'other'"):
        add(folder, "other")


def test_a_default_with_operating_points_stays(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    seconds: dict[str, float],
) -> None:
    folder = engine_copy()
    set_points(folder, fast=Budget(exit=1))
    assert "has operating points" in add(folder).default
    assert read_manifest(folder).default_target == ONNX
    set_points(folder, FP32, fast=Budget(exit=1))
    changed, _ = cpu.with_fastest_default(folder, read_manifest(folder), silent)
    assert changed.default_target == FP32


@pytest.mark.parametrize(
    ("name", "expected"),
    [(ONNX, []), (FP32, ["openvino"]), ("tensorrt-rtx-fp32", ["tensorrt-rtx-fp32"])],
)
def test_with_a_default_target_alone_no_other_one_is_built(
    name: str,
    expected: list[str],
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither is that one, if it is there."""
    built: list[str] = []

    def plans(_: object, backend: str, precision: str) -> None:
        built.append(f"{backend}-{precision}")

    def openvino(_: Path, manifest: Manifest, *__: object) -> tuple[Manifest, list[Checked]]:
        built.append("openvino")
        return manifest, []

    monkeypatch.setattr(additions._Addition, "_add_plans", plans)
    monkeypatch.setattr(cpu, "add_openvino", openvino)
    found = export("--from", engine_copy(), "--target", name)
    assert built == expected
    assert found.exit_code == bool(expected), "what is only noted cannot be the default"


def test_given_texts_are_checked_and_within_the_tolerance(folder: Path) -> None:
    manifest = read_manifest(folder)
    target = manifest.targets[FP32]
    texts, logits = exact_logits(folder, manifest, ["the film is good", "turn on the light"])
    for difference in (0.0, 0.5):
        more = texts, logits + np.float32(difference)
        found, _ = check_target(folder, manifest, FP32, target, silent, more)
        tolerance = found.targets[FP32].tolerance
        assert tolerance is not None
        expected = logit_differences(logits, more[1]).max()
        assert abs(tolerance - expected) <= max(EXPORT_LIMIT, target.tolerance or 0.0)
    found, checked = check_target(folder, manifest, FP32, target, silent, (texts, -logits))
    assert FP32 not in found.targets
    assert "fp32 changes answers from exit 1 on (2 texts)" in str(checked.refused)
    assert "use another target" in str(checked.refused)
    write_manifest(folder, keep_targets(manifest, lambda name, _: name != ONNX))
    with pytest.raises(BackendError, match=f"no target '{ONNX}'"):
        exact_logits(folder, manifest, texts)


def test_another_target_runs_where_the_default_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        openvino._core.cache_clear()
        patch.setitem(sys.modules, "openvino", None)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with Engine.load(folder) as engine:
                    assert engine.target == ONNX
        assert len(caplog.messages) == 1
        assert f"{ONNX} runs instead of the default target {FP32}" in caplog.messages[0]
        shown = CliRunner().invoke(inspect, [str(folder)])
        assert f"{FP32} cannot run here; {ONNX} runs instead" in shown.stdout
        with pytest.raises(BackendError, match="not installed"):
            Engine.load(folder, FP32)
    with Engine.load(folder) as engine:
        assert engine.target == FP32


def test_a_target_with_the_operating_points_of_the_default_runs_instead(
    folder: Path,
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a CPU without bf16; if the default has no points, the fastest other target."""
    manifest = read_manifest(folder)
    slow = msgspec.structs.replace(manifest.targets[ONNX], relative_speed=0.1)
    default = msgspec.structs.replace(manifest.targets[FP32], precision="bf16")
    manifest = with_target(with_target(manifest, "slow", slow), "default", default)
    write_manifest(folder, msgspec.structs.replace(manifest, default_target="default"))
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": "avx2"})
    with Engine.load(folder) as engine:
        assert engine.target == FP32
    set_points(folder, "default", fast=Budget(exit=1), safe=Budget(exit=2))
    set_points(folder, "slow", fast=Budget(exit=1))
    with Engine.load(folder, operating_point="fast") as engine:
        assert engine.target == "slow"
    assert "slow runs instead of the default target default, without the operating points safe" in (
        caplog.text
    )


def test_a_folder_that_cannot_be_written_is_refused_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(cpu, "add_openvino", lambda *_: 1 / 0)
    with pytest.raises(ArtifactError, match=f"cannot write {folder}: Read-only file system"):
        add(folder)


def test_without_openvino_nothing_is_added(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    monkeypatch.setattr(additions, "PLAN_BACKENDS", ())
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino._core.cache_clear()
    result = add_targets(folder, AddTargetsOptions())
    assert [one.name for one in result.checked if one.refused] == ["openvino"]
    assert result.default == ""
    assert not set(ADDED) & read_manifest(folder).targets.keys()
    failed = export("--from", folder, "--backend", "openvino")
    assert failed.exit_code == 1
    assert "OpenVINO is not installed" in failed.stderr
    assert "pip install -U 'fpabee[openvino]'" in failed.stderr


def test_an_openvino_that_cannot_be_used_is_reported_and_the_rest_is_kept(
    tiny_models: Mapping[str, Path],
    ready_graphs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise BackendError("the installed OpenVINO has no CPU plugin")

    monkeypatch.setattr(backends, "openvino_version", refuse)
    monkeypatch.setattr(additions, "PLAN_BACKENDS", ())
    folder = tmp_path / "engines"
    for words in ([tiny_models["bert"], "-o", folder], ["--from", folder]):
        result = export(*words)
        assert result.exit_code == 0, result.output
        assert "not added: openvino: the installed OpenVINO has no CPU plugin" in result.stdout
        assert list(read_manifest(folder).targets) == [ONNX]
