"""What `scripts/gpu_check` reports, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from fpabee.runtime.backends.cuda_probe import CudaDevice

from ..doubles.device import GPU, install

ROOT = Path(__file__).parents[2]
GREEN = {"exit_code": 0, "tail": ["3 passed in 0.1s"]}


@pytest.fixture
def script(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with one repetition; there is a GPU, and the tests pass."""
    module = load_script("gpu_check")
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "run_tests", lambda root: GREEN)
    monkeypatch.setattr(module, "cuda_device", lambda: GPU)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("rain\nthe film is not good\n", encoding="utf-8")
    return str(path)


def test_every_target_is_timed_or_says_why_not(
    script: ModuleType,
    engine_copy: Callable[..., Path],
    texts: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = engine_copy()
    made = install(monkeypatch, folder)
    script.main(str(folder), texts)
    report = json.loads(capsys.readouterr().out)
    assert report["tests"] == GREEN
    for name in ("onnxruntime-fp32", made.target):
        times = report["milliseconds"][name]
        assert len(times) == 4
        assert all(value > 0 for kind in times.values() for value in kind.values())
    monkeypatch.setattr(
        "fpabee.runtime.backends.cuda_probe.cuda_device", lambda: CudaDevice("", "7")
    )
    script.main(str(folder), texts)
    report = json.loads(capsys.readouterr().out)
    assert "compute capability" in report["milliseconds"][made.target]["unavailable"]


def test_what_fails_is_an_error_and_the_json_is_whole(
    script: ModuleType,
    engines: Mapping[str, Path],
    texts: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed = {"exit_code": 1, "tail": ["1 failed"]}
    for name, value, message in (
        ("cuda_device", CudaDevice(error="there is no GPU"), "nothing ran on a GPU"),
        ("run_tests", failed, "tests failed: 1 failed"),
    ):
        monkeypatch.setattr(script, name, lambda *_, value=value: value)
        with pytest.raises(SystemExit, match=f"error: {message}"):
            script.main(str(engines["bert"]), texts)
        report = json.loads(capsys.readouterr().out)
        assert "onnxruntime-fp32" in report["milliseconds"]
    assert report["tests"] == failed


def test_the_exit_code_of_the_gpu_tests(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    lines = ["import pytest", "@pytest.mark.gpu", "def test_x():", "    assert False"]
    lines += ["def test_not_run():", "    assert False"]
    (tmp_path / "test_x.py").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    result = load_script("gpu_check").run_tests(tmp_path)
    assert result["exit_code"] == 1
    assert "1 deselected" in result["tail"][-1]


def test_its_environment_gets_tensorrt_once(tmp_path: Path) -> None:
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "FPABEE_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    for _ in range(2):
        command = [str(ROOT / "scripts" / "gpu_check"), "engines", "texts.txt"]
        subprocess.run(command, env=environment, capture_output=True, check=True)
    pip, install, *runs = log.read_text(encoding="utf-8").splitlines()
    assert pip.endswith("--upgrade pip")
    assert install == "-m pip install --quiet --editable .[dev,tensorrt-cu13]"
    assert runs == ["scripts/gpu_check.py engines texts.txt"] * 2
