"""ONNX Runtime on the CPU.

Three things make a chain of sessions as fast as one graph:

- one process-wide thread pool, because the idle threads of several pools spin against each other
  (measured: up to 18 times slower)
- one shared arena, so that segments reuse the same warm memory (1.2 times)
- prepared IO bindings over pooled buffers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..artifact.folder import verified_graph
from ..artifact.manifest import ATTENTION_BIAS, MASK_FILL, NEXT, Target, TensorSpec
from ..encoding import Arrays, EncodedRow, write_rows
from ..errors import COPY_AGAIN, ArtifactError, BackendError, Remedy, first_line
from .backend import Backend, Execution
from .buffers import BufferName, Buffers, Hidden, crop_of, shape_of
from .onnxruntime_session import (
    check_installed,
    cpu_session,
    is_out_of_memory,
    ort_errors,
    session_options,
)
from .shapes import Bucket, Limits, Rows

# Unused buffers are kept up to this size, about what a CPU cache holds. A larger store would
# hand out cold memory where the allocator hands out warm memory.
_FREE_BYTES = 32 * 2**20
# Memory of a binding besides its buffers (measured): a third of the total for one short text.
_BINDING_BYTES = 5 * 2**10
# Measured on two cores: with fewer tokens the matrix kernels are less efficient, and more tokens
# do not fit into the caches.
_GROUP_TOKENS = 1024
_MAX_BATCH = 256


_Value = tuple[NDArray[Any], Any]  # an array, and an OrtValue over its memory
_Run = tuple[str, Callable[[Any], None], Any]  # a graph, its session's `run`, and a binding


class _CpuBuffers(Buffers[_Value, tuple[list[_Run], "_Ready"]]):
    """NumPy arrays with prepared bindings over them."""

    def __init__(self, backend: OnnxRuntimeBackend, bucket: Bucket) -> None:
        super().__init__(bucket)
        self._backend = backend

    def _allocate(self, name: BufferName) -> _Value:
        import onnxruntime as ort

        spec = self._backend.specs[name[0]]
        array = np.empty(shape_of(spec, self.bucket), spec.dtype)
        self.nbytes += array.nbytes
        return array, ort.OrtValue.ortvalue_from_numpy(array)

    def _prepare(self, segment: int) -> tuple[list[_Run], _Ready]:
        runs: list[_Run] = []
        outputs = {}
        for call in self._backend.stages[segment].calls:
            session = self._backend.graph(call.graph)
            binding = session.io_binding()
            for name, buffer in call.inputs:
                binding.bind_ortvalue_input(name, self.buffer(buffer)[1])
            for name, buffer in call.outputs:
                array, value = self.buffer(buffer)
                binding.bind_ortvalue_output(name, value)
                if not name.startswith(NEXT):
                    outputs[name] = array
            runs.append((call.graph, session.run_with_iobinding, binding))
            self.nbytes += _BINDING_BYTES
        return runs, _Ready(outputs)


class _Ready(NamedTuple):
    """Outputs that are ready, because `enqueue` returns when the segment has run."""

    outputs: Arrays

    def result(self) -> Arrays:
        """The outputs by name."""
        return self.outputs

    def first(self, rows: int) -> _Ready:
        """The outputs without the padding rows."""
        return _Ready({name: array[:rows] for name, array in self.outputs.items()})


class OnnxRuntimeBackend(Backend[_CpuBuffers]):
    """Graphs as ONNX Runtime sessions; see `Backend`."""

    @staticmethod
    def check(target: Target, name: str) -> None:
        """Check that exactly one ONNX Runtime is installed; see `Backend.check`."""
        check_installed()

    def limits(self) -> Limits:
        """Any shape up to the model's longest sequence."""
        rows = min(_MAX_BATCH, self._shapes.batch.max)
        return Limits(rows, self._shapes.sequence.max, _GROUP_TOKENS)

    def open(self) -> OnnxRuntimeExecution:
        """A new execution."""
        return OnnxRuntimeExecution(self)

    def _load(self, name: str) -> Any:
        import onnxruntime as ort

        file = self._file(name)
        path = verified_graph(self._folder, file.file, file.sha256)
        try:
            session = cpu_session(path, session_options(self._threads))
        except ort_errors() as error:
            raise ArtifactError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {first_line(error)}",
                "update ONNX Runtime: pip install -U 'fpabee[cpu]'; or export the model again",
            ) from error
        expected = {spec.name for spec in (*self.graphs[name].inputs, *self.graphs[name].outputs)}
        found = {tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())}
        if found != expected:
            raise ArtifactError(
                f"{path} is another graph than the manifest describes: it has "
                f"{', '.join(sorted(found))}; expected {', '.join(sorted(expected))}",
                COPY_AGAIN,
            )
        return session


class OnnxRuntimeExecution(Execution[_CpuBuffers]):
    """Runs segments with prepared bindings; see `Execution`."""

    lookahead = False

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        super().__init__(backend, _FREE_BYTES)
        self._backend = backend

    def enqueue(self, segment: int, hidden: Hidden[_CpuBuffers]) -> _Ready:
        """Run a segment; its outputs are ready when this returns."""
        runs, ready = hidden.buffers.step(segment)
        for graph, run, binding in runs:
            try:
                run(binding)
            except ort_errors() as error:
                raise BackendError(
                    f"ONNX Runtime failed in {graph} on {hidden.rows} rows of "
                    f"{hidden.bucket.sequence} tokens: {first_line(error)}",
                    "use shorter or fewer texts at a time: there is not enough free memory"
                    if is_out_of_memory(error)
                    else Remedy(
                        "export the model again: the graph does not accept these tokens; if only "
                        "long texts fail, give a smaller {max_length}"
                    ),
                ) from error
        hidden.segment = segment + 1
        return ready if hidden.rows == hidden.bucket.batch else ready.first(hidden.rows)

    def _make(self, bucket: Bucket) -> _CpuBuffers:
        return _CpuBuffers(self._backend, bucket)

    def _write(self, buffers: _CpuBuffers, encoded: Sequence[EncodedRow]) -> None:
        for name, buffer in self._stages[0].live.items():
            write_rows(buffers.buffer(buffer)[0], name, encoded, self._padding[name])

    def _gather(
        self,
        spec: TensorSpec,
        buffer: BufferName,
        sources: Sequence[tuple[_CpuBuffers, Rows]],
        target: _CpuBuffers,
    ) -> None:
        out = target.buffer(buffer)[0]
        axis = spec.shape.index("sequence") if "sequence" in spec.shape else None
        # Attention never reads the hidden states of padding, so they only have to be finite.
        fill = MASK_FILL if spec.name == ATTENTION_BIAS else 0
        position = 0
        for buffers, numbers in sources:
            source = buffers.buffer(buffer)[0]
            part = out[position : position + len(numbers)]
            position += len(numbers)
            if axis is None or source.shape[axis] == out.shape[axis]:
                np.take(source, numbers, axis=0, out=part, mode="clip")
                continue
            width = min(source.shape[axis], out.shape[axis])
            inside = (slice(None),) * (axis - 1) + (slice(width),)
            for row, number in zip(part, numbers, strict=True):
                row[inside] = source[number][inside]
            part[(slice(None), *inside[:-1], slice(width, None))] = fill
        out[position:] = fill

    def _crop(
        self, spec: TensorSpec, buffer: BufferName, source: _CpuBuffers, target: _CpuBuffers
    ) -> None:
        target.buffer(buffer)[0][...] = source.buffer(buffer)[0][crop_of(spec, target.bucket)]
