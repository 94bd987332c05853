"""The driver must be new enough for our kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fpabee.runtime import BackendError, machine
from fpabee.runtime.backends import cuda
from fpabee.runtime.machine import CudaDevice

from ...doubles.device import set_gpu


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
