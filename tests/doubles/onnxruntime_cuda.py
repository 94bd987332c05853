"""Doubles that run ONNX graphs over the double of the driver."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpabee.runtime.backends.onnxruntime import cpu_session

from .cuda import FakeCuda

Place = tuple[int, Any, Any]
"""Address, type and shape of a tensor."""


@functools.lru_cache(maxsize=64)
def _session(content: bytes) -> Any:
    """A session of a graph, which all tests share, because making one takes long."""
    return cpu_session(content)


class DeviceGraph:
    """A graph that reads and writes device memory, and runs on the CPU."""

    def __init__(self, cuda: FakeCuda, path: Path) -> None:
        self._cuda = cuda
        self._session = _session(path.read_bytes())

    def run(self, inputs: Mapping[str, Place], outputs: Mapping[str, tuple[int, Any]]) -> None:
        """Run the graph on inputs at given places; outputs have an address and a type."""
        feed = {name: self._array(*place) for name, place in inputs.items()}
        values = self._session.run(list(outputs), feed)
        for (pointer, dtype), value in zip(outputs.values(), values, strict=True):
            self._array(pointer, dtype, value.shape)[...] = value

    def _array(self, pointer: int, dtype: Any, shape: Any) -> NDArray[Any]:
        memory = self._cuda.view(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.asarray(memory.view(dtype).reshape(shape))


class FakeBinding:
    """An IO binding: where each input and output is."""

    def __init__(self) -> None:
        self.inputs: dict[str, Place] = {}
        self.outputs: dict[str, tuple[int, Any]] = {}

    def bind_input(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.inputs[name] = (pointer, dtype, shape)

    def bind_output(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.outputs[name] = (pointer, dtype)


class FakeCudaSession:
    """A session of ONNX Runtime's CUDA provider, which runs in a stream of the double."""

    def __init__(self, cuda: FakeCuda, path: Path, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._graph = DeviceGraph(cuda, path)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.put(self._stream, lambda: self._graph.run(binding.inputs, binding.outputs))
