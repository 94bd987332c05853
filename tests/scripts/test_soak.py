"""The soak: a short one that passes, and what it must find."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from fpabee.runtime import Budget, Engine, FPabee
from fpabee.runtime.encoding import Text

from ..conftest import WORDS

MIB = 2**20
TEXTS: list[Text] = [" ".join(random.Random(n).choices(WORDS, k=1 + n % 9)) for n in range(24)]


@pytest.fixture(scope="module")
def soak(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("soak")


@pytest.fixture
def folder(engine_copy: Callable[..., Path], set_points: Callable[..., None]) -> Path:
    """An engines folder with two points that give most texts other exits."""
    folder = engine_copy()
    set_points(folder, fast=Budget(exit=1), safe=FPabee(threshold=0.5))
    return folder


def plan(soak: ModuleType, folder: Path) -> Any:
    return soak.Plan(folder, 0.7, 2, 1)


def test_the_command(soak: ModuleType, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(map(str, TEXTS)), encoding="utf-8")
    arguments = [str(folder), "--input", str(path), "--minutes", "0.02"]
    result = CliRunner().invoke(soak.main, [*arguments, "--threads", "2", "--processes", "2"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["problems"] == []
    assert [process["wrong"] for process in content["processes"]] == [0, 0]
    assert all(process["rows"] > 0 for process in content["processes"])
    assert all(process["switches"] > 0 for process in content["processes"])


def test_the_points_give_other_exits(soak: ModuleType, folder: Path) -> None:
    answers = soak.reference_of(folder, TEXTS).answers
    exits = {name: {answer.exit for answer in given} for name, given in answers.items()}
    assert exits["fast"] == {1}
    assert exits["full depth"] == {3}
    assert exits["safe"] >= {2, 3}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("none",)},
        {"exit": 9},
        {"probabilities": (0.25, 0.25, 0.25, 0.25)},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("rule", ["fast", "full depth"])
def test_a_wrong_answer_is_found(
    soak: ModuleType, folder: Path, change: dict[str, Any], rule: str
) -> None:
    reference = soak.reference_of(folder, TEXTS)
    first, *others = reference.answers[rule]
    planted = (dataclasses.replace(first, near=False, **change), *others)
    changed = dataclasses.replace(reference, answers={**reference.answers, rule: planted})
    outcome = soak.soak(plan(soak, folder), changed)
    assert 0 < outcome.wrong < outcome.rows
    assert any(f"under {rule}: {TEXTS[0]!r} gives" in line for line in outcome.errors)
    assert soak.problems([outcome])


def test_a_point_that_is_not_in_force_is_found(
    soak: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = soak.reference_of(folder, TEXTS)
    monkeypatch.setattr(Engine, "use", lambda engine, name: None)
    outcome = soak.soak(plan(soak, folder), reference)
    assert outcome.wrong > 0


def test_near_a_threshold_is_counted_apart(soak: ModuleType, folder: Path) -> None:
    reference = soak.reference_of(folder, TEXTS)
    first, *others = reference.answers["fast"]
    near = (dataclasses.replace(first, near=True, exit=9), *others)
    changed = dataclasses.replace(reference, answers={**reference.answers, "fast": near})
    outcome = soak.soak(plan(soak, folder), changed)
    assert outcome.near > 0
    assert (outcome.wrong, outcome.errors) == (0, [])


def test_an_error_in_a_thread_is_found(
    soak: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = soak.reference_of(folder, TEXTS)
    monkeypatch.setattr(Engine, "stream", lambda *_: 1 / 0)
    monkeypatch.setattr(Engine, "predict", lambda *_, **__: 1 / 0)
    outcome = soak.soak(plan(soak, folder), reference)
    assert len(outcome.errors) == 2
    assert "process 1 answered nothing" in soak.problems([outcome])


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        ([100] * 100, False),
        ([50] * 15 + [100] * 85, False),  # warming up
        ([100] * 50 + [131] * 50, False),
        ([100] * 50 + [133] * 50, True),
        ([1000 + n // 2 for n in range(100)], False),
        ([1000 + n for n in range(100)], True),
        ([100] * 95 + [900] * 5, False),  # a peak
        ([100], False),
    ],
)
def test_growth_is_judged_after_warm_up(soak: ModuleType, samples: list[int], found: bool) -> None:
    sizes = [sample * MIB for sample in samples]
    assert soak.grows(sizes) is found
    outcome = soak.Outcome(rows=1, rss=sizes)
    assert bool(soak.problems([outcome])) is found


def test_a_folder_without_points_is_refused(
    soak: ModuleType, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("rain\n", encoding="utf-8")
    result = CliRunner().invoke(soak.main, [str(engine_copy()), "--input", str(path)])
    assert result.exit_code == 1
    assert "fpabee-calibrate" in result.output
