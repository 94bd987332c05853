"""Targets that cannot be built, or that change a model too much: nothing is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fpabee.exporter import staging

from .cases import Arguments, Case, Change, Make, Place, check, each, with_nan

SECOND = "onnx/fp32/segment_02.onnx"
FP16 = "onnxruntime-fp16-cuda"
INT8 = "onnxruntime-int8"


def shared(*options: object) -> Make:
    """A good folder, which stays as it is."""
    return lambda place: ["build", place.shared["bert"], "--quiet", *options]


def folder(change: Change, *options: object) -> Make:
    """A copy of the folder, changed."""
    return lambda place: ["build", place.engines(change), "--quiet", *options]


def texts(content: str) -> Make:
    """Texts for the ranges of int8."""
    return lambda p: shared(INT8, "--texts", p.file("t.txt", content))(p)


FEW_TEXTS = "".join(f"rain {number}\n" for number in range(31))


def few_texts_of_an_export(place: Place) -> Arguments:
    texts = place.file("t.txt", FEW_TEXTS)
    return place.export(place.models["bert"], "--int8", "--texts", texts)


def full_disk(place: Place) -> Arguments:
    """A disk that takes the beginning of a file."""

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(28, os.strerror(28))

    arguments = folder(lambda _: None, FP16)(place)
    place.patch.setattr(Path, "write_bytes", full)
    return arguments


CASES = [
    Case("heads of NaN", folder(with_nan, FP16), FP16, "2", "fp32"),
    Case("int8 without texts", shared(INT8), "0", "32", "--texts"),
    Case("too few texts", texts(FEW_TEXTS), "31", "32 different", "--texts"),
    Case("too few texts of an export", few_texts_of_an_export, "31", "32 different", "--texts"),
    Case("no graph", folder(lambda f: (f / SECOND).unlink(), FP16), FP16, SECOND),
    Case("a file where graphs are to be",
         folder(lambda f: (f / "onnx/fp16").write_text("mine"), FP16), "onnx/fp16"),
    Case("a full disk", full_disk, "No space left"),
]  # fmt: skip


@each(CASES)
def test_a_bad_precision(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot lock folders")
def test_two_builds_at_the_same_time(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    make = folder(lambda _: None, FP16)
    arguments = make(place)
    with staging.locked(Path(str(arguments[1]))):
        check(Case("two builds", lambda _: arguments, "another process"), place, capfd)


@pytest.mark.usefixtures("rtx")
def test_a_file_where_plans_are_to_be(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("tensorrt-rtx-fp16", "--sm", "86")
    make = folder(lambda f: (f / "targets").write_text("mine"), *options)
    check(Case("a file", make, "targets"), place, capfd)
