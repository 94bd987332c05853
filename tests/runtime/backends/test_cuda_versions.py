"""CUDA 12 and 13 are not mixed: extras, the driver, cuda-bindings and inference libraries."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from fpabee.runtime import BackendError, machine
from fpabee.runtime.backends import cuda, onnxruntime_cuda, tensorrt
from fpabee.runtime.backends.cuda import check_cuda
from fpabee.runtime.machine import CudaDevice

from ...doubles.device import set_gpu


@pytest.mark.parametrize(
    ("driver", "bindings", "library", "says"),
    [
        ((13, 0), 13, 13, ""),
        ((13, 0), 12, 12, ""),
        ((12, 6), 12, 0, ""),
        ((13, 0), 0, 13, ""),
        ((12, 6), 13, 0, r"cuda-bindings for CUDA 13.* 12\.6 -> .*580 or later.*\[gpu-cu12\]"),
        (
            (12, 6),
            12,
            13,
            r"x uses lib for CUDA 13.*\(580 or later .*, or pip .*\[gpu-cu12\]",
        ),
        ((13, 0), 13, 12, r"lib was built for CUDA 12, but cuda-bindings .* 13 -> .*gpu-cu13"),
        ((13, 0), 12, 13, r"lib was built for CUDA 13, but cuda-bindings .* 12 -> .*gpu-cu13"),
    ],
)
def test_drivers_bindings_and_libraries(
    driver: tuple[int, int],
    bindings: int,
    library: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gpu(monkeypatch, CudaDevice("a GPU", "8.6", driver))
    monkeypatch.setattr(cuda, "bindings_cuda", lambda: bindings)
    if not says:
        check_cuda("x", "lib", library, "gpu")
        return
    with pytest.raises(BackendError, match=says):
        check_cuda("x", "lib", library, "gpu")


@pytest.mark.parametrize(("version", "is_old"), [(11040, True), (12020, True), (12040, False)])
def test_a_driver_must_be_for_cuda_12_4(
    version: int, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sets(number: int) -> Callable[..., int]:
        def call(place: Any, *_: object) -> int:
            place._obj.value = number
            return 0

        return call

    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=sets(1),
        cuDriverGetVersion=sets(version),
        cuDeviceGetName=lambda *_: 0,
        cuDeviceGetAttribute=sets(8),
    )
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    device = machine.cuda_device.__wrapped__()
    if not is_old:
        assert device == CudaDevice("", "8.8", (12, 4))
        return
    set_gpu(monkeypatch, device)
    says = r"needs an NVIDIA GPU, but its driver is for CUDA 1.\..; .*NVIDIA driver 550, JetPack"
    with pytest.raises(BackendError, match=says):
        cuda.required_gpu("tensorrt-fp16-sm86")


def test_what_installed_libraries_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"tensorrt_rtx": ["tensorrt_rtx_cu12"], "tensorrt": ["tensorrt"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: packages)
    assert tensorrt._built_for("tensorrt_rtx") == 12
    assert tensorrt._built_for("tensorrt") == 0, "JetPack's does not tell"
    assert onnxruntime_cuda._built_for() == 0, "onnxruntime for the CPU is installed here"
