"""Rows, goals and folders that fpabee-calibrate cannot use: the manifest stays as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fpabee.calibration.trace import trace_rows
from fpabee.runtime import Engine
from fpabee.runtime.files import read_rows

from ..conftest import WORDS
from .cases import (
    COMMANDS,
    QUIET,
    Arguments,
    Case,
    Change,
    Make,
    Place,
    check,
    each,
    no_space,
    with_nan,
)

LABELS = ("music", "weather", "alarm", "travel")

Rows = Sequence[dict[str, Any]]


def rows() -> list[dict[str, Any]]:
    """Random texts and labels."""
    chosen = random.Random(3)
    texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 9))) for _ in range(80)]
    return [{"text": text, "label": chosen.choice(LABELS)} for text in texts]


def file(place: Place, content: Rows, name: str = "dev.jsonl") -> Path:
    return place.file(name, "".join(json.dumps(row) + "\n" for row in content))


def given(content: Rows, *options: object, change: Change = lambda _: None) -> Make:
    """Rows for a copy of the folder, which may be changed."""
    return lambda place: [
        *("calibrate", place.engines(change), "--data", file(place, content), *QUIET, *options)
    ]


def goal(*options: object, change: Change = lambda _: None) -> Make:
    """Good rows and options that do not fit."""
    return given(rows(), *options, change=change)


def traced(*options: object) -> Make:
    """The same where an earlier calibration has kept the trace, so that none is written."""

    def make(place: Place) -> Arguments:
        arguments = goal(*options)(place)
        folder = place.root / "engines"
        with Engine.load(folder, threads=1) as engine:
            trace_rows(engine, list(read_rows(place.root / "dev.jsonl")), folder / "calibration")
        return arguments

    return make


def again(place: Place) -> Arguments:
    """The same calibration a second time, which only writes the manifest."""
    arguments = goal("--max-drop", 5)(place)
    COMMANDS["calibrate"].main([str(each) for each in arguments[1:]], standalone_mode=False)
    return arguments


def held_out(content: Rows) -> Make:
    """Other rows to report on."""
    return lambda place: [*goal()(place), "--test", file(place, content, "test.jsonl")]


def in_the_way(name: str, *options: str) -> Make:
    """A file where a folder is to be."""

    def make(place: Place) -> Arguments:
        path = place.root / "engines" / name
        paths = [str(path) if option == "HERE" else option for option in options]
        return goal(*paths, change=lambda folder: (folder / name).write_text("mine"))(place)

    return make


def same_text(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"text": "rain"}


def set_default(name: str, *options: object) -> Make:
    return lambda place: ["calibrate", place.engines(), "--set-default", name, *options]


def full_disk(what: str, make: Make) -> Make:
    def full(place: Place) -> Arguments:
        arguments = make(place)
        no_space(place, what)
        return arguments

    return full


UNLABELLED = [{"text": row["text"]} for row in rows()]
CASES = [
    Case("no label", given([*rows(), {"text": "rain"}]), "dev.jsonl", "81", "--metric"),
    Case("identical rows", given([same_text(row) for row in rows()])),
    Case("an unknown label", given([*rows(), {"text": "a", "label": "food"}]), "81", "food"),
    Case("an unknown point", set_default("slow"), "'slow'", "onnxruntime-fp32"),
    Case("a point of an unknown target", set_default("fast", "--target", "tpu"), "'tpu'",
         "onnxruntime-fp32", "--target"),
    Case("too few rows", given(UNLABELLED[:49], "--metric", "agreement"), "48", "50"),
    Case("test rows without labels", held_out(UNLABELLED), "test.jsonl", "1"),
    Case("a model that gives NaN", goal(change=with_nan), "exit 2"),
    Case("20 times as fast", traced("--speedup", 20), "20"),
    Case("a rule without a list of thresholds", goal("--changed", 5, "--rule", "fpabee"),
         "fpabee", "before any row is seen", code=2),
    Case("a label that does not exist", goal("--changed", 5, "--threshold", "food=0.7"), "food",
         "music"),
    Case("a threshold of 70 %", goal("--missed", 5, "--threshold", "music=70"), "70", "0 and 1",
         code=2),
    Case("a metric of another task", goal("--metric", "exact_match"), "exact_match", "macro_f1"),
    Case("calibration/ is a file", in_the_way("calibration"), "engines/calibration/trace"),
    Case("no space for the trace",
         full_disk("fpabee.runtime.artifact.folder.os.fsync",
                   goal(change=lambda folder: (folder / "calibration").mkdir())),
         "calibration/trace", "No space left"),
    Case("no space for the manifest",
         full_disk("fpabee.runtime.artifact.folder.os.fsync", again),
         "manifest.json", "No space left"),
]  # fmt: skip


def together(*options: object) -> Make:
    """Options that do not go together."""
    return lambda _: ["calibrate", "engines", "--data", "x", *options]


# Options, and what the message names.
WRONG: list[tuple[tuple[object, ...], str]] = [
    (("--max-drop", 1, "--speedup", 2), "--speedup"),
    (("--speedup", 0.5), "0.5"),
    (("--confidence", 90, "--max-drop", 1), "--risk"),
    (("--confidence", 40), "--confidence"),
    (("--changed", 0), "--changed"),
    (("--changed", "abc"), "--changed"),
    (("--missed", 2), "--threshold"),
    (("--risk", 2, "--threshold", "music=0.7"), "--changed"),
    (("--changed", 2, "--threshold", "music"), "LABEL=P"),
    (("--changed", 2, "--max-drop", 1), "one goal at a time"),
    (("--rule", "fastbert"), "fastbert"),
    (("--set-default", "fast"), "--set-default"),
    (("--threshold", "music=0.7", "--set-default", "fast"), "--set-default"),
]
USAGE = [
    *(Case(str(options), together(*options), fact, code=2) for options, fact in WRONG),
    Case("neither rows nor a default", lambda _: ["calibrate", "engines"], "--data", code=2),
]


@each(CASES, USAGE)
def test_a_bad_calibration(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)
