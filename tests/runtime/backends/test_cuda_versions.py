"""CUDA 12 and 13 are not mixed: extras, the driver, cuda-bindings and inference libraries."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from fpabee.runtime import BackendError, machine
from fpabee.runtime.backends import cuda, onnxruntime_cuda, tensorrt
from fpabee.runtime.backends.cuda import check_cuda
from fpabee.runtime.machine import CudaDevice

from ...doubles.device import set_gpu

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
ROOT = Path(__file__).parents[3]
NAMES = ["gpu", "tensorrt", "tensorrt-rtx"]
BINDINGS = ["12.8.0", "12.9.0", "12.9.1", "12.9.10", "13.0.0", "13.5.0", "14.0.0"]


def requirements(name: str) -> dict[str, Requirement]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = map(Requirement, extras["optional-dependencies"][name])
    return {requirement.name: requirement for requirement in found}


def test_extras_for_different_cuda_versions_exclude_each_other() -> None:
    for one, other in itertools.product(NAMES, NAMES):
        old = requirements(f"{one}-cu12")["cuda-bindings"].specifier
        new = requirements(f"{other}-cu13")["cuda-bindings"].specifier
        assert not any(version in old and version in new for version in BINDINGS)
        assert any(version in old for version in BINDINGS)
        assert any(version in new for version in BINDINGS)
        assert "12.9.0" not in old, "it holds the GIL while it waits"


def test_onnxruntime_brings_its_cuda_libraries() -> None:
    old, new = (requirements(f"gpu-{cuda}")["onnxruntime-gpu"] for cuda in ("cu12", "cu13"))
    assert old.extras == new.extras == {"cuda", "cudnn"}
    assert "1.26.0" in old.specifier
    assert "1.27.0" not in old.specifier, "the first release for CUDA 13"
    assert "1.27.0" not in new.specifier, "its extras name packages that do not exist"


@pytest.mark.parametrize("cuda", ["cu12", "cu13"])
def test_a_release_of_tensorrt_for_rtx_that_hangs_is_not_installed(cuda: str) -> None:
    found = requirements(f"tensorrt-rtx-{cuda}")[f"tensorrt-rtx-{cuda}"].specifier
    assert "1.7.1.116" in found
    assert "1.5.0.114" not in found, "it hangs: NVIDIA/TensorRT-RTX#37"


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
