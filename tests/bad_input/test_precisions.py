"""Precisions that change a model too much, plans that cannot be built: nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .cases import Arguments, Case, Change, Make, Place, check, each, with_nan

SECOND = "onnx/fp32/segment_02.onnx"


def shared(*options: object) -> Make:
    """A good folder, which stays as it is."""
    return lambda place: ["export", "--from", place.shared["bert"], "--quiet", *options]


def folder(change: Change, *options: object) -> Make:
    """A copy of the folder, changed."""
    return lambda place: ["export", "--from", place.engines(change), "--quiet", *options]


def texts(content: str) -> Make:
    """Texts for the ranges of int8."""
    return lambda p: shared("--int8", "--calibration-data", p.file("t.txt", content))(p)


def full_disk(place: Place) -> Arguments:
    """A disk that takes the beginning of a file."""

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(28, os.strerror(28))

    arguments = folder(lambda _: None, "--fp16")(place)
    place.patch.setattr(Path, "write_bytes", full)
    return arguments


CASES = [
    Case("heads of NaN", folder(with_nan, "--fp16"), "fp16", "2", "fp32"),
    Case("int8 without texts", shared("--int8"), "int8", "--calibration-data"),
    Case("too few texts", texts("rain\n" * 31), "31", "32"),
    Case("no graph", folder(lambda f: (f / SECOND).unlink(), "--fp16"), SECOND),
    Case("a file where graphs are to be",
         folder(lambda f: (f / "onnx/fp16").write_text("mine"), "--fp16"), "onnx/fp16"),
    Case("a full disk", full_disk, "No space left"),
]  # fmt: skip


@each(CASES)
def test_a_bad_precision(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


def test_a_file_where_plans_are_to_be(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    options = ("--backend", "tensorrt-rtx", "--sm", "86")
    make = folder(lambda f: (f / "targets").write_text("mine"), *options)
    check(Case("a file", make, "targets"), place, capfd)
