"""The exit rules in the package are what their source gives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from fpabee.runtime.backends.decide import PTX


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("decide_ptx")


def test_the_ptx_names_its_source(script: ModuleType) -> None:
    assert PTX.read_bytes().startswith(script.first_line()), "run scripts/decide_ptx.py"


def test_the_ptx_is_for_all_supported_gpus_and_drivers() -> None:
    lines = PTX.read_text().splitlines()
    assert ".version 8.4" in lines, "drivers for CUDA 12.4 accept no newer one"
    assert ".target sm_75" in lines


def test_the_source_gives_this_ptx(script: ModuleType) -> None:
    library = script.nvrtc()
    if library is None:
        pytest.skip("NVRTC 12.4 is not installed: pip install 'nvidia-cuda-nvrtc-cu12==12.4.*'")
    assert PTX.read_bytes() == script.compile_ptx(library)


def test_an_error_in_the_source_is_shown(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = script.nvrtc()
    if library is None:
        pytest.skip("NVRTC 12.4 is not installed: pip install 'nvidia-cuda-nvrtc-cu12==12.4.*'")
    monkeypatch.setattr(script, "_OPTIONS", (b"--gpu-architecture=compute_75", b"-DLANE=gone"))
    with pytest.raises(ValueError, match="decide"):
        script.compile_ptx(library)
