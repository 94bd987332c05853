"""`fpabee-inspect`: what a folder holds, and why a target cannot run here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fpabee import __version__
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.inspect import main, target_states
from fpabee.runtime.manifest import read_manifest

from .device_double import install


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_folder_is_described(engines: Mapping[str, Path]) -> None:
    result = run(engines["mpnet"])
    assert result.exit_code == 0, result.output
    for part in ("mpnet, 3 layers of 32", "exits: 1, 2, 3", "onnxruntime-fp32 (default)", "runs"):
        assert part in result.stdout


def test_json_holds_the_same(engines: Mapping[str, Path]) -> None:
    content = json.loads(run(engines["bert"], "--env", "--json").stdout)
    assert content["exits"] == [1, 2, 3]
    (target,) = content["targets"]
    assert target["name"] == "onnxruntime-fp32"
    assert target["why_not"] == ""
    assert target["size"] > 10_000
    assert content["environment"]["fpabee"] == __version__
    assert "onnxruntime" in content["environment"]


def test_targets_that_cannot_run_say_why(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    made = install(monkeypatch, folder)
    states = {s.name: s.why_not for s in target_states(folder, read_manifest(folder))}
    assert states == {"onnxruntime-fp32": "", made.target: ""}
    none = CudaDevice(error="no NVIDIA driver is installed")
    monkeypatch.setattr("fpabee.runtime.backends.tensorrt.cuda_device", lambda: none)
    states = {s.name: s.why_not for s in target_states(folder, read_manifest(folder))}
    assert "needs an NVIDIA GPU, and here no NVIDIA driver" in states[made.target]
    (folder / "targets" / made.target / "segment_01.plan").unlink()
    states = {s.name: s.why_not for s in target_states(folder, read_manifest(folder))}
    assert "segment_01.plan is missing" in states[made.target]


def test_usage_and_missing_folders(tmp_path: Path) -> None:
    assert run().exit_code == 2
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "fpabee-export" in result.stderr
