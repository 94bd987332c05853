"""Fuzzes every reader of files that may come from strangers, and tests the fuzzer itself."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

import pytest

from fpabee.runtime.errors import ArtifactError

from ..child_process import Child, Report
from . import fuzzer
from .targets import NAMES, Target, every_target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's /proc")

FINDS = Path(__file__).parents[2] / "fuzz-finds"


@pytest.fixture(scope="module")
def folders(engines: Mapping[str, Path], tiny_models: Mapping[str, Path]) -> dict[str, Path]:
    return {"engines": engines["bert"], "model_dir": tiny_models["bert"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fuzzing_finds_nothing(
    name: str, folders: dict[str, Path], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seconds = pytestconfig.getoption("--seconds")
    assert fuzzer.fuzz(name, tmp_path, FINDS / name, seconds, **folders) == {}


def test_every_target_reads_its_seed(folders: dict[str, Path], tmp_path: Path) -> None:
    targets = every_target(tmp_path, **folders)
    assert set(NAMES) == set(targets)
    for target in targets.values():
        target.path.write_bytes(target.seed)
        target.read()


class Panic(BaseException):
    """As a library in Rust raises it."""


def raises(error: BaseException) -> Callable[[], object]:
    def read() -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("defect", "limits", "found"),
    [
        (raises(Panic("x")), {}, ["Panic"]),
        (raises(ArtifactError("it is damaged")), {}, []),
        (lambda: sum(range(10**6)), {"seconds": 0.001}, ["more than 0.001 s"]),
        (lambda: bytearray(b"x") * 2**26, {"mebibytes": 32}, ["more than 32 MiB"]),
    ],
    ids=["panic", "refused", "slow", "large"],
)
def test_the_judge_finds_a_defect(
    tmp_path: Path, defect: Callable[[], object], limits: dict[str, float], found: list[str]
) -> None:
    path = tmp_path / "input"

    def read() -> None:
        if path.read_bytes() == b"bad":
            defect()

    judge = fuzzer.Judge(Target(b"good", lambda data, _: data, path, read), **limits)
    assert judge(b"good") == []
    assert judge(b"bad") == found


def aborts(report: Report) -> None:
    report("before")
    os.abort()


def never_ends(report: Report) -> None:
    report("before")
    while True:
        pass


@pytest.mark.parametrize(
    ("function", "seconds", "failure"),
    [(aborts, 60, "exit code -6: .*Aborted"), (never_ends, 5, "within 5 s")],
)
def test_how_a_process_ends(
    function: Callable[[Report], None], seconds: float, failure: str
) -> None:
    ended = Child(function).wait(seconds)
    assert ended.reports == ["before"]
    assert re.search(failure, ended.failure)


def test_inputs_that_are_too_large_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Iterator[MemoryError | bytes] = iter([MemoryError(), b"too large", b"small"])

    def mutate(data: bytes, _: Random) -> bytes:
        found = next(made)
        if isinstance(found, MemoryError):
            raise found
        return data + found

    monkeypatch.setattr(fuzzer, "_LARGEST", 8)
    target = Target(b"", mutate, tmp_path, tmp_path.stat)
    assert fuzzer._changed(target, b"as ", Random()) == b"as small"
