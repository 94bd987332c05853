"""ONNX Runtime on the CPU.

Three things make a chain of sessions as fast as one graph:

- one process-wide thread pool, because the idle threads of several pools spin against each other
  (measured: up to 18 times slower)
- one shared arena, so that segments reuse the same warm memory (1.2 times)
- prepared IO bindings over pooled buffers
"""

from __future__ import annotations

from functools import partial
from typing import Any

from numpy.typing import NDArray

from ..artifact.manifest import BuiltFile, Graph, Target, TensorSpec
from .buffers import GraphCall
from .host import HostBackend, HostBuffers, Run
from .onnxruntime_session import check_installed, cpu_session, ort_errors, session_options


class OnnxRuntimeBackend(HostBackend):
    """Graphs as ONNX Runtime sessions; see `Backend`."""

    library = "ONNX Runtime"
    update = "pip install -U 'fpabee[cpu]'"
    failures = staticmethod(ort_errors)

    @staticmethod
    def check(target: Target, name: str) -> None:
        """Check that exactly one ONNX Runtime is installed; see `HostBackend.check`."""
        check_installed()
        HostBackend.check(target, name)

    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> Any:
        """An `OrtValue` over an array's memory."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array)

    def bind(self, call: GraphCall, buffers: HostBuffers) -> Run:
        """Bind a session to buffers."""
        session = self.graph(call.graph)
        binding = session.io_binding()
        for name, buffer in call.inputs:
            binding.bind_ortvalue_input(name, buffers.buffer(buffer)[1])
        for name, buffer in call.outputs:
            binding.bind_ortvalue_output(name, buffers.buffer(buffer)[1])
        return partial(session.run_with_iobinding, binding)

    def read(self, file: BuiltFile | Graph) -> Any:
        """A session."""
        return cpu_session(self.verified(file), session_options(self._threads))
