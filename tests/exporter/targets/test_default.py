"""The default target is the most exact one, or another one that is clearly faster."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration.progress import silent
from fpabee.calibration.result import make_default
from fpabee.commands.inspect import main as inspect
from fpabee.exporter.targets import BuildResult, build_targets, default
from fpabee.exporter.targets.builders import OPENVINO_TARGETS, buildable
from fpabee.runtime import BackendError, Budget, Engine, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import openvino
from fpabee.runtime.check import REQUIREMENTS
from fpabee.runtime.core import Core

from ...programs import printed

pytest.importorskip("openvino")

ONNX = "onnxruntime-fp32"
FP32 = "openvino-fp32"
BF16 = "openvino-bf16"
needs_bf16 = pytest.mark.skipif(not openvino.has_bf16(), reason="this CPU has no bf16")
SECONDS = {ONNX: 2.0, FP32: 1.0, BF16: 1.5}


def add(folder: Path) -> BuildResult:
    return build_targets(folder, buildable(OPENVINO_TARGETS))


def in_turns(seconds: Mapping[str, float], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The same seconds in three turns, at two shapes."""
    return {name: np.full((3, 2), seconds[name]) for name in names}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is measured instead of times."""
    made_up = dict(SECONDS)
    monkeypatch.setattr(default, "_seconds", lambda _, names, __: in_turns(made_up, names))
    return made_up


@pytest.fixture(scope="module")
def added(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all targets, whose default is `openvino-fp32`. Read-only."""
    folder = tmp_path_factory.mktemp("added") / "engines"
    shutil.copytree(engines["bert"], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "_seconds", lambda _, names, __: in_turns(SECONDS, names))
        add(folder)
    return folder


@pytest.fixture
def folder(added: Path, seconds: dict[str, float], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(added, tmp_path / "engines"))


def chosen(folder: Path, **changes: str) -> tuple[str, str]:
    """The default target that is chosen after a change of the manifest, and what is said."""
    engines = EnginesFolder.read(folder).with_manifest(**changes)
    changed, said = default.with_fastest_default(engines, silent)
    return changed.manifest.default_target, said


def test_the_fastest_target_is_the_default_and_speeds_are_shown(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert list(manifest.targets) == [ONNX, *buildable(OPENVINO_TARGETS)]
    assert manifest.default_target == FP32
    for name, target in manifest.targets.items():
        assert target.tolerance is not None
        assert target.tolerance < REQUIREMENTS[target.precision].tie
        assert target.relative_speed == pytest.approx(2 / SECONDS[name], abs=1e-3)
    shown = printed(inspect, folder)
    assert "openvino-fp32 (default)" in shown
    assert "2.00x" in shown


@pytest.mark.parametrize(
    ("measured", "expected", "why"),
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
    measured: dict[str, float], expected: str, why: str, folder: Path, seconds: dict[str, float]
) -> None:
    seconds.update({ONNX: 1.0} | measured)
    name, said = chosen(folder, default_target=ONNX)
    assert name == expected
    assert why in said


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([0.8, 0.8, 0.8, 0.8, 0.8, 9.0], FP32),  # something else ran in one turn
        ([0.8, 0.8, 0.8, 0.8, 9.0, 9.0], ONNX),  # a gain that does not last
        ([0.95, 0.95, 0.95, 0.95, 0.01, 0.01], ONNX),  # on average, it would be far faster
        ([0.92] * 6, ONNX),
    ],
)
def test_a_gain_must_show_in_nearly_every_turn(
    measured: list[float], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = EnginesFolder.read(folder).keep_targets(lambda name, _: name != BF16)
    times = {ONNX: np.ones((6, 1)), FP32: np.array(measured)[:, None]}
    monkeypatch.setattr(default, "_seconds", lambda *_: times)
    engines = engines.with_manifest(default_target=ONNX)
    changed, _ = default.with_fastest_default(engines, silent)
    assert changed.manifest.default_target == expected


def test_the_best_run_of_each_turn_counts(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 1000))
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Core, "time_exits", lambda *_: [float(next(clock))] * 3)
    found = default._seconds(
        EnginesFolder.read(added), [ONNX, FP32], lambda _, *counts: seen.append(counts)
    )
    assert seen == [(turn, 6) for turn in range(6)]
    assert {name: times.shape for name, times in found.items()} == {ONNX: (6, 2), FP32: (6, 2)}
    assert found[ONNX][:2].tolist() == [[3.0, 15.0], [33.0, 45.0]]
    assert found[FP32][:2].tolist() == [[9.0, 21.0], [27.0, 39.0]]


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ({ONNX: 3.0, FP32: 3.0}, FP32),
        ({ONNX: 1.0, FP32: 3.0}, ONNX),  # it is slower, and fewer of its layers run
        ({ONNX: 1.0, FP32: 1.9}, ONNX),  # a little faster is not enough
        ({ONNX: 1.0, FP32: 1.8}, FP32),
        ({ONNX: 0.0, FP32: 0.0}, ONNX),  # exit 0 answers everything
        ({ONNX: 3.0}, ONNX),
        pytest.param({ONNX: 3.0, FP32: 3.0, BF16: 1.0}, BF16, marks=needs_bf16),
    ],
)
def test_with_early_exits_the_layers_that_run_count(
    depths: dict[str, float], expected: str, folder: Path
) -> None:
    engines = EnginesFolder.read(folder).with_manifest(default_target=ONNX)
    assert default.fastest_with_exits(engines.manifest, depths) == expected


def test_a_default_that_was_chosen_by_hand_stays(
    folder: Path, set_points: Callable[..., None]
) -> None:
    set_points(folder, ONNX, fast=Budget(exit=1))
    make_default(folder, "fast", ONNX)
    assert "as chosen by hand" in add(folder).default
    assert read_manifest(folder).default_target == ONNX


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
    assert chosen(folder)[0] == FP32


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
        assert f"{FP32} cannot run here; {ONNX} runs instead" in printed(inspect, folder)
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
    engines = EnginesFolder.read(folder)
    targets = engines.manifest.targets
    engines = engines.with_target(
        "slow", msgspec.structs.replace(targets[ONNX], relative_speed=0.1)
    ).with_target("default", msgspec.structs.replace(targets[FP32], precision="bf16"))
    engines.with_manifest(default_target="default").write()
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": "avx2"})
    with Engine.load(folder) as engine:
        assert engine.target == FP32
    set_points(folder, "default", fast=Budget(exit=1), safe=Budget(exit=2))
    set_points(folder, "slow", fast=Budget(exit=1))
    with Engine.load(folder, operating_point="fast") as engine:
        assert engine.target == "slow"
    assert re.search("slow runs instead of .* default, without .* safe", caplog.text)
