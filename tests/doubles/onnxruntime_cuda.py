"""A double of a session of ONNX Runtime's CUDA provider."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fpabee.runtime.backends.onnxruntime import cpu_session


@functools.lru_cache(maxsize=64)
def shared_session(content: bytes) -> Any:
    """A session of a graph on the CPU, which all tests share, because making one takes long."""
    return cpu_session(content)


class FakeCudaSession:
    """A session that says that it runs on the GPU."""

    def __init__(self, path: Path, options: object, providers: object) -> None:
        self._session = shared_session(path.read_bytes())

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
        values: list[Any] = self._session.run(outputs, inputs)
        return values
