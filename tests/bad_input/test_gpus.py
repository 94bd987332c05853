"""Drivers, libraries, plans and requests that do not fit a GPU, which is a double here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fpabee.runtime.machine import CudaDevice

from ..doubles.device import Double, install, set_gpu
from .cases import Arguments, Case, Make, Place, check, each


def on_gpu(
    change: Callable[[Place, Double], object] = lambda place, double: None,
    **settings: Any,
) -> Make:
    """Run texts on a target of TensorRT, after a change."""

    def make(place: Place) -> Arguments:
        double = install(place.patch, place.engines(), **settings)
        change(place, double)
        texts = place.file("texts.txt", "rain\n")
        return place.run(texts, "--target", double.target, folder=double.folder)

    return make


def other_gpu(place: Place, _: Double) -> None:
    set_gpu(place.patch, CudaDevice("Thor", "11.0", (13, 0)))


def lacks_memory(_: Place, double: Double) -> None:
    double.cuda.room = 64


def rebuilt_graph(_: Place, double: Double) -> None:
    double.change_plan("segment_02", onnx_sha256="0" * 64)


REBUILD = "build target tensorrt-fp16 here"
CASES = [
    Case("plans for another GPU", on_gpu(other_gpu), "8.6", "11.0", "Thor", REBUILD),
    Case("plans of another release", on_gpu(versions={"tensorrt": "10.3.0"}),
         "tensorrt 10.3.0", REBUILD),
    Case("a plan made before its graph changed", on_gpu(rebuilt_graph), "another graph", REBUILD),
    Case("no room on the GPU", on_gpu(lacks_memory), "MiB of device memory are free",
         "smaller batches"),
]  # fmt: skip


@each(CASES)
def test_what_does_not_fit_a_gpu(
    case: Case, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    check(case, place, capfd)
