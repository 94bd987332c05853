"""Engines folders with targets that run on a double of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...doubles.device import Double, install, install_cuda_provider


@pytest.fixture
def double(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Double]:
    """Makes a folder with a target of TensorRT, or of ONNX Runtime's CUDA provider."""

    def make(family: str = "bert", **settings: Any) -> Double:
        if settings.get("backend") == "onnxruntime":
            return install_cuda_provider(monkeypatch, engine_copy(family))
        return install(monkeypatch, engine_copy(family), **settings)

    return make


@pytest.fixture
def made(double: Callable[..., Double]) -> Double:
    """A folder with a target of TensorRT."""
    return double()
