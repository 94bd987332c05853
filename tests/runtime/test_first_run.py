"""A target is checked once on each new kind of machine, see `first_run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fpabee.runtime import CheckError, Engine, ExitRule, core
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import REFERENCE_NAME
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.base import Backend

from .test_engine_check import swap_logits

GOLDEN = Path(__file__).parents[1] / "golden/1.0/engines"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that were checked, in order."""
    targets: list[str] = []
    check_target = core.check_target

    def noted(engines: EnginesFolder, backend: Backend, rule: ExitRule | None) -> object:
        targets.append(backend.name)
        return check_target(engines, backend, rule)

    monkeypatch.setattr(core, "check_target", noted)
    return targets


def move_to(monkeypatch: pytest.MonkeyPatch, processor: str, cache: Path) -> None:
    """Let this be another processor, with an empty cache directory."""
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def load(folder: Path, check: bool | None = None) -> None:
    Engine.load(folder, threads=1, check=check).close()


def test_the_machine_that_verified_a_target_does_not_check_it_again(
    engines: Mapping[str, Path], checks: list[str]
) -> None:
    load(engines["bert"])
    assert checks == []
    load(engines["bert"], check=True)
    assert checks == ["onnxruntime-fp32"]


def test_another_processor_checks_once(
    engines: Mapping[str, Path],
    checks: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = engines["albert"]  # exported on this machine
    move_to(monkeypatch, "riscv64", tmp_path)
    load(engines["bert"], check=False)
    assert checks == []
    for _ in range(2):
        load(engines["bert"])
        assert len(checks) == 1
    load(other)
    assert len(checks) == 2, "another folder"
    monkeypatch.setattr("onnxruntime.__version__", "1.99.0")
    load(engines["bert"])
    assert len(checks) == 3, "another version of the library"


def test_what_another_processor_computes_wrongly_is_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = engine_copy()
    _, logits = read_reference(EnginesFolder.read(folder))
    swap_logits(folder, -logits)
    load(folder)
    move_to(monkeypatch, "riscv64", tmp_path)
    for _ in range(2):
        with pytest.raises(CheckError, match="not the model that was exported"):
            load(folder)
    load(folder, check=False)


def test_a_folder_of_1_0_is_checked_once_and_keeps_its_revision(
    checks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with Engine.load(GOLDEN, threads=1) as engine:
            assert (
                engine.revision
                == "79b8582186d139be26a5b02e68f6e34a5e541c9354f33944eec0cd627cfd4b6c"
            )
        assert checks == ["onnxruntime-fp32"]


def test_without_a_cache_directory_every_load_checks(
    engines: Mapping[str, Path],
    checks: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = engines["bert"]
    file = tmp_path / "file"
    file.touch()
    move_to(monkeypatch, "riscv64", file)
    for number in (1, 2):
        load(folder)
        assert len(checks) == number


def test_a_folder_without_a_reference_loads_with_a_warning(
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A device need not have the file."""
    folder = engine_copy()
    (folder / REFERENCE_NAME).unlink()
    load(folder)
    assert not caplog.messages
    move_to(monkeypatch, "riscv64", tmp_path)
    load(folder)
    assert f"has no {REFERENCE_NAME}" in caplog.text
    assert "riscv64" in caplog.text
