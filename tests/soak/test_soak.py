"""Soaks an engine for a short time, and tests that the soak finds what is wrong."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime import Budget, Engine, FPabee

from ..child_process import MIB
from ..conftest import WORDS
from . import soak
from .soak import Reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's /proc")

TEXTS = [" ".join(random.Random(n).choices(WORDS, k=1 + n % 9)) for n in range(24)]


@pytest.fixture
def folder(engine_copy: Callable[..., Path], set_points: Callable[..., None]) -> Path:
    """An engines folder with two operating points, under which most texts have other exits."""
    folder = engine_copy()
    set_points(folder, fast=Budget(exit=1), safe=FPabee(threshold=0.5))
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, threads=1) as engine:
        yield engine


@pytest.mark.slow
def test_soaking_finds_nothing(folder: Path, pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.getoption("--engines") or folder
    seconds = pytestconfig.getoption("--seconds")
    assert soak.soak(folder, TEXTS, seconds, threads=4, processes=2) == []


def test_a_few_calls_are_right(engine: Engine) -> None:
    reference = Reference(engine, TEXTS)
    exits = {name: {a.exit for a in given} for name, given in reference.answers.items()}
    assert (exits["fast"], exits[soak.FULL_DEPTH]) == ({1}, {3})
    assert exits["safe"] >= {2, 3}
    problems, memory = soak.ask(engine, reference, 0.5, threads=2)
    assert problems == []
    assert min(memory) > MIB


@pytest.mark.parametrize(
    "change", [{"labels": ("none",)}, {"exit": 9}, {"probabilities": (0.25,) * 4}], ids=str
)
def test_a_wrong_answer_is_found(engine: Engine, change: dict[str, Any]) -> None:
    reference, rule = Reference(engine, TEXTS), soak.FULL_DEPTH
    first, *others = reference.answers[rule]
    reference.unsure[rule] = set()
    reference.answers[rule] = [dataclasses.replace(first, **change), *others]
    assert f"under {rule}" in reference.wrong([rule], [1, 0], [others[0], first])
    reference.unsure[rule] = {0}
    assert reference.wrong([rule], [1, 0], [others[0], first]) == ""
    other = reference.answers["fast"][1]
    assert reference.wrong(["fast", rule], [2, 1], [others[1], other]), "under no one point"


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        ([50] * 15 + [100] * 85, False),  # warming up
        ([100] * 50 + [133] * 50, True),
        ([100] * 95 + [900] * 5, False),  # a peak
    ],
)
def test_growth_is_judged_after_warming_up(samples: list[int], found: bool) -> None:
    assert bool(soak.growth([sample * MIB for sample in samples])) is found
