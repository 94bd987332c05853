"""Precisions that a model does not survive, and plans that cannot be: nothing is written."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fpabee.exporter.precision.float16 import add_half
from fpabee.exporter.precision.formats import Half
from fpabee.runtime import ExitRule, agreement
from fpabee.runtime.artifact.folder import read_manifest, write_manifest

from .cases import Arguments, Case, Place, changed_heads, check, corrected

SECOND = "onnx/fp32/segment_02.onnx"
INTERMEDIATE, OUTPUT = "intermediate.dense", "layer.output.dense"
WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play")
TEXTS = "".join(f"{a} {b}\n" for a, b in itertools.permutations(WORDS, 2))


def extend(*options: object) -> Callable[[Place], Arguments]:
    """For the folder as it is, which a case must not change."""
    return lambda place: ["--from", place.shared_engines(), "--quiet", *options]


def fresh(*options: object) -> Callable[[Place], Arguments]:
    """For a new folder, which there will be none of."""

    def make(place: Place) -> Arguments:
        place.patch.setitem(sys.modules, "tensorrt", None)
        place.patch.setattr(util, "find_spec", lambda name, *_: None if name == "tensorrt" else 1)
        return [place.shared_model(), "-o", place.root / "out", "--quiet", *options]

    return make


def own(change: Callable[[Path], object], *options: object) -> Callable[[Place], Arguments]:
    """For a copy of the folder, changed."""

    def make(place: Place) -> Arguments:
        folder = place.engines()
        change(folder)
        return ["--from", folder, "--quiet", *options]

    return make


def scaled(factor: float, part: str = INTERMEDIATE) -> Callable[[Path], None]:
    """A layer whose activations, or whose weights, are that much larger."""

    def change(folder: Path) -> None:
        proto = onnx.load(folder / SECOND)
        found = 0
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and part in _users(proto, tensor.name):
                values = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                found += 1
        assert found
        onnx.save(proto, folder / SECOND)
        corrected(folder, SECOND)

    return change


def _users(proto: onnx.ModelProto, tensor: str) -> str:
    return " ".join(node.name for node in proto.graph.node if tensor in node.input)


def not_numbers(folder: Path) -> None:
    changed_heads(folder, SECOND, lambda values: values * np.float32("nan"))


def in_the_way(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("mine")


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut_short(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])


def texts(content: str, *options: object) -> Callable[[Place], Arguments]:
    """Texts for the ranges of int8."""
    return lambda place: extend("--int8", "--calibration-data", place.file("t.txt", content))(place)


def other_bars(make: Callable[[Place], Arguments], precision: str) -> Callable[[Place], Arguments]:
    """As if the answers changed: a tiny model's seldom do."""

    def case(place: Place) -> Arguments:
        bars = dataclasses.replace(agreement.BARS[precision], labels=1.1, exits=1.1)
        place.patch.setitem(agreement.BARS, precision, bars)
        return make(place)

    return case


def full_disk(make: Callable[[Place], Arguments]) -> Callable[[Place], Arguments]:
    """A disk that takes the beginning of a file."""

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def case(place: Place) -> Arguments:
        bars = dataclasses.replace(agreement.BARS["int8"], labels=0.0, exits=0.0)
        place.patch.setitem(agreement.BARS, "int8", bars)
        arguments = make(place)
        place.patch.setattr(Path, "write_bytes", full)
        return arguments

    return case


def fp16_again(place: Place) -> Arguments:
    """A folder that has fp16, which must stay whole."""
    folder = place.engines()
    rule = ExitRule.from_dict(read_manifest(folder).default_rule)
    manifest, _ = add_half(folder, read_manifest(folder), Half.FP16, rule)
    write_manifest(folder, manifest)
    return ["--from", folder, "--quiet", "--fp16", "--keep-fp32", "auto"]


AUTO = "in fp32: --keep-fp32 auto"
PRECISIONS = [
    Case("activations beyond fp16", own(scaled(1e6), "--fp16"),
         ("fp16 overflows first in segment_02 at blocks.0.layer.intermediate.dense", AUTO)),
    Case("weights beyond fp16", own(scaled(1e9), "--fp16"), ("fp16 overflows", AUTO)),
    Case("weights beyond bf16", own(scaled(1e38), "--bf16"), ("bf16 changes", "stay with fp32")),
    Case("activations beyond fp16 on old GPUs", own(scaled(1e6), "--fp16", "--sm", "75"), (AUTO,)),
    Case("heads of NaN", own(not_numbers, "--fp16"), ("from exit 2 on", "use bf16")),
    Case("heads of NaN in bf16", own(not_numbers, "--bf16"), ("logits differ by nan", "fp32")),
    Case("answers that change in fp16", other_bars(extend("--fp16"), "fp16"),
         ("fp16 changes answers", "--keep-fp32")),
    Case("answers that change in bf16", other_bars(extend("--bf16"), "bf16"),
         ("bf16 changes answers", "stay with fp32")),
    Case("answers that change in int8", other_bars(texts(TEXTS), "int8"),
         ("int8 changes answers", "more texts as --calibration-data")),
    Case("a node that is not there", extend("--fp16", "--keep-fp32", "segment_01:nothing"),
         ("no graph has such a node", "names such as segment_01:")),
    Case("a node of another graph", extend("--fp16", "--keep-fp32", "segment_09:hidden_states"),
         ("no graph has such a node", "or auto")),
    Case("a node of no name", extend("--fp16", "--keep-fp32", ""), ("no graph has such a node",)),
]  # fmt: skip

INT8 = [
    Case("int8 without texts", extend("--int8"), ("no int8 graphs", "as --calibration-data")),
    Case("too few texts", texts("rain\n" * 31), ("31", "at least 32 texts")),
    Case("no file of texts for a new export", fresh("--int8", "--calibration-data", "none.txt"),
         ("none.txt does not exist",)),
    Case("texts of an unknown kind", fresh("--int8", "--calibration-data", "texts.doc"),
         ("texts.doc",)),
    Case("no TensorRT for a new export", fresh("--fp16", "--backend", "tensorrt"),
         ("tensorrt is not installed",)),
    Case("one text", texts("rain\n"), ("there are 1", "a few hundred")),
]  # fmt: skip

FOLDERS = [
    Case("no engines folder", lambda p: ["--from", p.root, "--fp16"], ("has no manifest.json",)),
    Case("a model", lambda p: ["--from", p.shared_model(), "--fp16"], ("has no manifest.json",)),
    Case("a graph cut short", own(cut_short(SECOND), "--fp16"), ("segment_02.onnx is damaged",)),
    Case("no graph", own(removed(SECOND), "--bf16"), ("segment_02.onnx is missing",)),
    Case("no reference", own(removed("reference.npz"), "--fp16"), ("reference.npz is missing",)),
    Case("a reference cut short", own(cut_short("reference.npz"), "--fp16"), ("is damaged",)),
    Case("a file where graphs are to be", own(in_the_way("onnx/fp16"), "--fp16"),
         ("cannot write", "onnx/fp16: File exists", "permissions and free space")),
    Case("a full disk", full_disk(own(lambda _: None, "--fp16")), ("No space left on device",)),
    Case("a full disk for int8", full_disk(texts(TEXTS)), ("No space left on device",)),
    Case("a full disk for other nodes of fp16", full_disk(fp16_again), ("No space left",)),
    Case("nothing that remains without graphs", own(lambda _: None, "--no-onnx", "--backend", "x"),
         ("'x' is not one of",), code=2),
]  # fmt: skip

PLANS = [
    Case("bf16 for old GPUs", extend("--bf16", "--backend", "tensorrt-rtx", "--sm", "75,86"),
         ("no bf16 matrix products for compute capability 7.5", "out of --sm")),
    Case("fp32 for old GPUs", extend("--backend", "tensorrt-rtx", "--sm", "75"),
         ("no fp32 matrix products", "build fp16 plans")),
    Case("a file where plans are to be",
         own(in_the_way("targets"), "--backend", "tensorrt-rtx", "--sm", "86"),
         ("cannot write", "Not a directory")),
]  # fmt: skip

USAGE = [
    Case("no texts for int8", lambda p: ["m", "--int8"], ("needs --calibration-data",), code=2),
    Case("texts for nothing", lambda p: ["m", "--calibration-data", "a"], ("with --int8",), code=2),
    Case("columns of nothing", lambda p: ["m", "--text-column", "body"],
         ("of --verify-data and --calibration-data: give one",), code=2),
    Case("labels that are not read", extend("--int8", "--calibration-data", "a", "--label-column",
                                             "b"), ("with --from --exits only",), code=2),
    Case("labels of a new export", lambda p: ["m", "--exits", "1", "--verify-data", "a",
                                              "--label-separator", ";"],
         ("with --from --exits only",), code=2),
    Case("texts that nothing is held against", extend("--backend", "tensorrt-rtx",
                                                      "--verify-data", "a"),
         ("with a new export, or with --fp16 or --bf16",), code=2),
    Case("a format of nothing", extend("--fp16", "--input-format", "csv"),
         ("of --verify-data and --calibration-data: give one",), code=2),
    Case("a word for a GPU", extend("--sm", "x"), ("not a list of compute cap",), code=2),
    Case("no GPU", extend("--sm", ""), ("not a list of compute capabilities",), code=2),
    Case("half a GPU", extend("--sm", "8"), ("not a list of compute capabilities",), code=2),
    Case("an unsupported GPU", extend("--fp16", "--sm", "86,90"),
         ("no support for 9.0; it has 7.5, 8.0", "--backend tensorrt"), code=2),
    Case("plans of other versions", extend("--backend", "tensorrt-rtx", "--version-compatible"),
         ("go with --backend tensorrt",), code=2),
    Case("plans of other GPUs", extend("--fp16", "--hardware-compatible"),
         ("go with --backend tensorrt",), code=2),
    Case("two sizes", extend("--batch", "1,2"), ("smallest, typical and largest",), code=2),
    Case("sizes that descend", extend("--sequence", "64,32,128"), ("smallest, typical",), code=2),
    Case("no rows", extend("--batch", "0,8,32"), ("smallest, typical",), code=2),
    Case("more memory than there is", extend("--workspace", 10**30), ("--workspace",), code=2),
    Case("level 9", extend("--optimization-level", 9), ("0<=x<=5",), code=2),
    Case("an unknown backend", extend("--backend", "none"), ("'none' is not one of",), code=2),
    Case("nodes of no precision", extend("--keep-fp32", "auto"), ("needs a precision",), code=2),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("case", [*PRECISIONS, *INT8, *FOLDERS, *USAGE], ids=lambda case: case.name)
def test_a_precision_that_is_refused(
    case: Case, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    check(dataclasses.replace(case, command="export"), place, capfd)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.name)
def test_plans_that_cannot_be(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    check(dataclasses.replace(case, command="export"), place, capfd)
