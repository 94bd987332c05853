"""What `scripts/check_arm` runs on an emulated processor, on this one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import check_arm
import numpy as np
import pytest

import fpabee.runtime
from fpabee.runtime import CheckError, Engine, Trace

Check = Callable[[], list[str]]


@pytest.fixture(scope="module")
def packed(exit_0_engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engines folder and its packed file, as `make` leaves them. Read-only."""
    case = tmp_path_factory.mktemp("packed") / "bert"
    check_arm.add_case(case, exit_0_engines["bert"])
    check_arm.make_packed(case)
    return case


@pytest.fixture
def case(packed: Path, tmp_path: Path) -> Path:
    """A copy of them, which a test may damage, in a folder of its own."""
    return Path(shutil.copytree(packed, tmp_path / "models" / "bert", symlinks=True))


@pytest.fixture
def check(case: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Checks the folder, and returns what failed: the model, the target or library, the check."""

    def check() -> list[str]:
        code = 0
        try:
            check_arm.main(["check", str(case.parent)], standalone_mode=False)
        except SystemExit as error:
            code = int(str(error.code))
        printed = capsys.readouterr().out
        table, _, repeated = printed.partition("\nfailed:\n")
        failed = [line for line in table.splitlines() if " FAILED " in line]
        assert repeated.splitlines() == failed
        assert code == bool(failed)
        assert " passed " in table
        return [" ".join(line.partition(" FAILED ")[0].split()[1:]) for line in failed]

    return check


def test_answers_are_right_where_they_were_made(check: Check) -> None:
    assert check() == []


def test_attended_padding_is_a_failure(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Engine.trace

    def attends(engine: Engine, texts: Any, **options: Any) -> Trace:
        traced = trace(engine, texts, **options)
        if len(texts) > 1:
            traced.logits[1] += 0.01
        return traced

    monkeypatch.setattr(Engine, "trace", attends)
    assert check() == ["onnxruntime-fp32 bert padded batch as single texts"]


def test_other_exits_of_the_command_are_a_failure(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check_arm.run_command

    def stops_elsewhere(*arguments: Any) -> list[dict[str, Any]]:
        first, *others = run(*arguments)
        return [first | {"exit": first["exit"] + 1}, *others]

    monkeypatch.setattr(check_arm, "run_command", stops_elsewhere)
    assert check() == ["onnxruntime-fp32 bert fpabee-run as on x86"]


@pytest.mark.parametrize("moved", [(0.01, 0), (0.0, 1)])
def test_other_answers_of_the_packed_file_are_a_failure(
    check: Check, case: Path, moved: tuple[float, int]
) -> None:
    with np.load(case / check_arm.ANSWERS) as file:
        logits = file["logits"] + moved[0]
        exits = file["exits"] + moved[1]
    np.savez(case / check_arm.ANSWERS, logits=logits, exits=exits)
    kinds = ("single texts", "a padded batch")
    libraries = ("onnxruntime", "openvino")
    assert check() == [f"{name} bert packed, {kind}" for name in libraries for kind in kinds]


@pytest.mark.parametrize(
    ("name", "failed"), [("bert", ["onnxruntime-fp32 bert Engine.load"]), ("1.0-engines", [])]
)
def test_only_folders_of_1_0_may_be_refused(
    check: Check, case: Path, monkeypatch: pytest.MonkeyPatch, name: str, failed: list[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Engine:
        raise CheckError("not the model that was exported", "export again")

    case.rename(case.with_name(name))
    monkeypatch.setattr(Engine, "load", refuse)
    assert check() == failed


def test_a_warning_in_the_package_is_a_failure(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine = Engine.check

    def warns(engine: Engine) -> Any:
        for file in ("elsewhere.py", f"{Path(fpabee.runtime.__file__).parent}/exit_0.py"):
            warnings.warn_explicit("an overflow", RuntimeWarning, file, 164)
        return check_engine(engine)

    monkeypatch.setattr(Engine, "check", warns)
    assert check() == ["no warning in fpabee"]
