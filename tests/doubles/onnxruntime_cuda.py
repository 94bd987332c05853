"""A double of ONNX Runtime's CUDA provider, over the double of the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fpabee.runtime.backends.onnxruntime_session import session_options

from .cuda import FakeCuda


class FakeBinding:
    """An IO binding: what is where."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[int, Any, list[int]]] = {}
        self.outputs: dict[str, tuple[int, Any, list[int]]] = {}

    def bind_input(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.inputs[name] = (pointer, dtype, shape)

    def bind_output(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.outputs[name] = (pointer, dtype, shape)


class FakeCudaSession:
    """A session of ONNX Runtime's CUDA provider, which runs in a stream of the double."""

    def __init__(self, cuda: FakeCuda, path: Path, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._session = ort.InferenceSession(
            str(path), session_options(), providers=["CPUExecutionProvider"]
        )

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.put(self._stream, lambda: self._run(binding))

    def _run(self, binding: FakeBinding) -> None:
        feed = {name: self._array(*place) for name, place in binding.inputs.items()}
        names = list(binding.outputs)
        for name, value in zip(names, self._session.run(names, feed), strict=True):
            self._array(*binding.outputs[name])[...] = value

    def _array(self, pointer: int, dtype: Any, shape: list[int]) -> NDArray[Any]:
        memory = self._cuda.view(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.asarray(memory.view(dtype).reshape(shape))
