"""Precisions that change a model too much, plans that cannot be built: nothing is written."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fpabee.runtime import agreement

from .cases import Arguments, Case, Change, Make, Place, check, corrected, each, with_nan

SECOND = "onnx/fp32/segment_02.onnx"
TEXTS = "".join(f"{a} {b}\n" for a, b in itertools.permutations(("a", "is", "not", "good"), 2)) * 4


def shared(*options: object) -> Make:
    """A good folder, which stays as it is."""
    return lambda place: ["export", "--from", place.shared["bert"], "--quiet", *options]


def folder(change: Change, *options: object) -> Make:
    """A copy of the folder, changed."""
    return lambda place: ["export", "--from", place.engines(change), "--quiet", *options]


def texts(content: str) -> Make:
    """Texts for the ranges of int8."""
    return lambda p: shared("--int8", "--calibration-data", p.file("t.txt", content))(p)


def scaled(factor: float) -> Change:
    """A layer whose weights, and so its activations, are that much larger."""

    def change(path: Path) -> None:
        proto = onnx.load(path)
        users = {name: node.name for node in proto.graph.node for name in node.input}
        for tensor in proto.graph.initializer:
            if "intermediate.dense" in users[tensor.name] and tensor.data_type == 1:
                values = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, path)

    return corrected(SECOND, change)


def changed_answers(precision: str, make: Make) -> Make:
    """As if answers changed, which those of a tiny model seldom do."""

    def case(place: Place) -> Arguments:
        required = dataclasses.replace(agreement.REQUIREMENTS[precision], labels=1.1)
        place.patch.setitem(agreement.REQUIREMENTS, precision, required)
        return make(place)

    return case


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
    Case("activations beyond fp16", folder(scaled(1e5), "--fp16"), "fp16", "segment_02",
         "fp32"),
    Case("weights beyond fp16", folder(scaled(1e38), "--fp16"), "e+37", "fp16"),
    Case("heads of NaN", folder(with_nan, "--fp16"), "fp16", "2", "fp32"),
    Case("answers that change in fp16", changed_answers("fp16", shared("--fp16")), "fp16"),
    Case("answers that change in int8", changed_answers("int8", texts(TEXTS)), "int8"),
    Case("int8 without texts", shared("--int8"), "int8", "--calibration-data"),
    Case("too few texts", texts("rain\n" * 31), "31", "32"),
    Case("no graph", folder(lambda f: (f / SECOND).unlink(), "--fp16"), SECOND),
    Case("a file where graphs are to be",
         folder(lambda f: (f / "onnx/fp16").write_text("mine"), "--fp16"), "onnx/fp16"),
    Case("a full disk", full_disk, "No space left"),
]  # fmt: skip

RTX = ("--backend", "tensorrt-rtx")
PLANS = [
    Case("a file where plans are to be",
         folder(lambda f: (f / "targets").write_text("mine"), *RTX, "--sm", "86"), "targets"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@each(CASES)
def test_a_bad_precision(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


@each(PLANS)
def test_plans_that_cannot_be(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    check(case, place, capfd)
