"""Rows, wishes and folders that fpabee-calibrate cannot use: the manifest stays as it is."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fpabee.calibration.trace import trace_rows
from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import read_manifest, write_manifest
from fpabee.runtime.files import read_rows

from .cases import Arguments, Case, Place, changed_heads, check, no_space

LABELS = ("music", "weather", "alarm", "travel")
WORDS = ("the", "good", "bad", "film", "music", "stop", "turn", "on", "light", "rain")

Rows = Sequence[dict[str, Any]]


def rows(count: int = 80, **more: object) -> Rows:
    """Random texts and labels."""
    chosen = random.Random(3)
    return [
        {
            "text": " ".join(chosen.choices(WORDS, k=chosen.randint(1, 9))),
            "label": chosen.choice(LABELS),
            **more,
        }
        for _ in range(count)
    ]


def file(place: Place, content: Rows, name: str = "dev.jsonl") -> Path:
    return place.file(name, "".join(json.dumps(row) + "\n" for row in content))


def calibrate(folder: Path, data: object, *options: object) -> Arguments:
    return [folder, "--data", data, "--threads", 1, "--quiet", *options]


def given(content: Rows, *options: object) -> Callable[[Place], Arguments]:
    """These rows, for a copy of the folder."""
    return lambda place: calibrate(place.engines(), file(place, content), *options)


def goal(*options: object) -> Callable[[Place], Arguments]:
    """Good rows, and options that do not fit: found before the model is run."""
    return given(rows(), *options)


def traced(*options: object) -> Callable[[Place], Arguments]:
    """The same where the rows must be run: an earlier calibration kept their trace."""

    def make(place: Place) -> Arguments:
        folder, data = place.engines(), file(place, rows())
        with Engine.load(folder, threads=1) as engine:
            trace_rows(engine, list(read_rows(data)), folder / "calibration")
        return calibrate(folder, data, *options)

    return make


def held_out(content: Rows, *options: object) -> Callable[[Place], Arguments]:
    """More rows, to report on."""
    return lambda place: calibrate(
        place.engines(), file(place, rows()), "--test", file(place, content, "test.jsonl"), *options
    )


def multi_label(*options: object, **more: object) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        content = [{"text": row["text"], "labels": ["food"], **more} for row in rows()]
        return calibrate(place.engines("mpnet"), file(place, content), *options)

    return make


def neighbours(place: Place) -> Arguments:
    """A target in which rows influence each other."""
    folder = place.engines()
    manifest = read_manifest(folder)
    name = manifest.default_target
    target = msgspec.structs.replace(manifest.targets[name], row_invariant=False)
    write_manifest(folder, msgspec.structs.replace(manifest, targets={name: target}))
    return calibrate(folder, file(place, rows()), "--risk", 5)


def not_numbers(value: str) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        number = np.float32(value)
        folder = changed_heads(
            place.engines(), "onnx/fp32/segment_02.onnx", lambda values: values * 0 + number
        )
        return calibrate(folder, file(place, rows()))

    return make


def in_the_way(name: str, *options: object) -> Callable[[Place], Arguments]:
    """A file where a folder is to be."""

    def make(place: Place) -> Arguments:
        folder = place.engines()
        (folder / name).write_text("mine")
        paths = [folder / name if option == "HERE" else option for option in options]
        paths = [folder / name / "in" if option == "BELOW" else option for option in paths]
        return calibrate(folder, file(place, rows()), *paths)

    return make


UNLABELLED = [{"text": row["text"]} for row in rows()]
ROWS = [
    Case("no label", given([*rows(), {"text": "rain"}]),
         ("dev.jsonl, line 81 has no label", "--unlabelled")),
    Case("an unknown label", given([*rows(), {"text": "rain", "label": "jazz"}]),
         ("dev.jsonl, line 81 has label 'jazz'", "music, weather, alarm, travel")),
    Case("a label that is a number", given(rows(label=1)), ("line 1 has label '1'",)),
    Case("labels in another case", given(rows(label="Music")), ("line 1 has label 'Music'",)),
    Case("two labels", given(rows(label=None, labels=["music", "alarm"])), ("has 2 labels",)),
    Case("an empty list of labels", given(rows(label=None, labels=[])), ("has 0 labels",)),
    Case("an unknown label of many", multi_label(labels=["food", "x"]), ("has label 'x'",)),
    Case("a label that is a list", given(rows(label=["music"])), ('"label" is not a name',)),
    Case("one class", given(rows(label="music")), ("all rows have the same label", "every label")),
    Case("one set of labels", multi_label(), ("all rows have the same label",)),
    Case("no labels at all", multi_label(labels=[]), ("all rows have the same label",)),
    Case("one row", given(rows(1)), ("1 rows are too few", "at least 50")),
    Case("fewer rows than are needed", given(rows(49)), ("49 rows are too few", "at least 50")),
    Case("few rows without labels", given(UNLABELLED[:9], "--unlabelled"), ("9 rows are too few",)),
    Case("test rows without labels", held_out(UNLABELLED), ("test.jsonl, line 1 has no label",)),
    Case("test rows of other labels", held_out(rows(label="a")), ("test.jsonl, line 1 has",)),
    Case("no test rows", held_out([]), ("test.jsonl has no rows",)),
    Case("test rows that are those that choose", held_out(rows()), ("rows that choose", "--test")),
    Case("a model that gives NaN", not_numbers("nan"), ("are not finite numbers at exit 2",)),
    Case("a model that gives infinity", not_numbers("inf"), ("not finite numbers at exit 2",)),
]  # fmt: skip

MORE_LOSS = "give more than 0 and less than 100"
WISHES = [
    Case("20 times as fast", traced("--speedup", 20), ("20 times as fast", "the fastest is")),
    Case("10^300 times as fast", traced("--speedup", 1e300), ("is 1e+300 times",)),
    Case("a risk that few rows cannot show", traced("--risk", 0.1),
         ("no setting is certain", "48 rows")),
    Case("a confidence that few rows cannot give",
         traced("--risk", 5, "--confidence", 99.9999), ("no setting is certain",)),
    Case("no risk", goal("--risk", 0), ("risk is 0 %", MORE_LOSS)),
    Case("less than no risk", goal("--risk", -1), ("risk is -1 %", MORE_LOSS)),
    Case("a risk of all", goal("--risk", 100), ("risk is 100 %", MORE_LOSS)),
    Case("full confidence", goal("--risk", 1, "--confidence", 100), (MORE_LOSS,)),
    Case("no confidence", goal("--risk", 1, "--confidence", 0), ("confidence is 0 %",)),
    Case("a risk of F1", goal("--risk", 5, "--metric", "macro_f1"), ("not a mean over rows",)),
    Case("a risk of MCC", goal("--risk", 5, "--metric", "matthews"), ("--risk-of disagreement",)),
    Case("a risk where rows influence each other", neighbours, ("depends on the other rows",)),
    Case("a metric of another task", goal("--metric", "exact_match"),
         ("metric 'exact_match' does not exist for this task", "accuracy, macro_f1")),
    Case("a metric of labels without labels", goal("--metric", "accuracy", "--unlabelled"),
         ("metric accuracy needs labels", "leave out")),
    Case("thresholds of one label", goal("--tune-label-thresholds"),
         ("a multi-label model", "--tune-label-thresholds")),
    Case("thresholds without labels", multi_label("--tune-label-thresholds", "--unlabelled"),
         ("labelled rows",)),
    Case("an unknown target", goal("--target", "tensorrt"), ("has no target 'tensorrt'",)),
    Case("10^9 threads", goal("--threads", 10**9), ("threads is 1000000000",)),
]  # fmt: skip

FOLDERS = [
    Case("calibration/ is a file", in_the_way("calibration"), ("cannot write", "--output")),
    Case("the output is a file", in_the_way("x", "--output", "HERE"), ("cannot write", "--output")),
    Case("the output is below a file", in_the_way("x", "--output", "BELOW"), ("Not a directory",)),
    Case("the report is a file", in_the_way("x", "--report", "HERE"),
         ("cannot write the report", "is a file", "another folder")),
    Case("the report is below a file", in_the_way("x", "--report", "BELOW"), ("is a file",)),
    Case("no space for the trace",
         no_space("numpy.savez", lambda p: [*goal()(p), "--output", p.root]),
         ("No space left on device", "--output")),
    Case("no space for the manifest",
         no_space("fpabee.runtime.artifact.folder.os.fsync", traced("--max-drop", 5)),
         ("cannot write", "manifest.json: No space left", "free space")),
    Case("no engines folder", lambda p: calibrate(p.root / "none", file(p, rows())),
         ("does not exist", "fpabee-export")),
    Case("a model", lambda p: calibrate(p.shared_model(), file(p, rows())), ("no manifest.json",)),
]  # fmt: skip

USAGE: list[tuple[Sequence[object], str]] = [
    (("--max-drop", 1, "--speedup", 2), "give one goal at a time"),
    (("--max-drop", 1, "--risk", 2), "give one goal at a time"),
    (("--max-drop", "nan"), "'nan' is not a finite number"),
    (("--max-drop", -1), "--max-drop"),
    (("--max-drop", 101), "--max-drop"),
    (("--speedup", "nan"), "not a finite number"),
    (("--speedup", "inf"), "not a finite number"),
    (("--speedup", 0.5), "--speedup"),
    (("--risk", "nan"), "not a finite number"),
    (("--risk", 1, "--confidence", "nan"), "not a finite number"),
    (("--confidence", 90), "only with --risk"),
    (("--risk-of", "disagreement"), "only with --risk"),
    (("--name", "x"), "--name can be used only with"),
    (("--max-drop", 1, "--name", ""), "cannot be read and typed"),
    (("--max-drop", 1, "--name", "a\nb"), r"--name 'a\nb'"),
    (("--rule", "nobody"), "'nobody'"),
    (("--rule", "auto", "--rule", "fpabee"), "--rule auto"),
    (("--measure", "cosine"), "'cosine'"),
    (("--metric", "f2"), "'f2'"),
    (("--batch-size", 0), "--batch-size"),
    (("--threads", 0), "--threads"),
    (("--seed", -1), "--seed"),
    (("--no-texts",), "only with --report"),
]


@pytest.mark.parametrize("case", [*ROWS, *WISHES, *FOLDERS], ids=lambda case: case.name)
def test_a_bad_calibration(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(dataclasses.replace(case, command="calibrate"), place, capfd)


@pytest.mark.parametrize(("options", "says"), USAGE, ids=str)
def test_options_that_do_not_go_together(
    options: Sequence[object], says: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(says, lambda p: ["engines", "--data", "x", *options], (says,), "calibrate", 2)
    check(case, place, capfd)
