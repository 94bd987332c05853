"""ONNX Runtime on the CPU.

Three things make a chain of sessions as fast as one graph (measured: up to 18x and 1.2x):
one process-wide thread pool, since idle pools spin against each other; one shared arena,
so that segments reuse the same warm memory; and prepared IO bindings over pooled buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.folder import resolve, verified_graph
from ..artifact.manifest import ATTENTION_BIAS, MASK_FILL, NEXT, Manifest, Target, TensorSpec
from ..encoding import EncodedRow, padding_values, write_rows
from ..errors import ArtifactError, BackendError, first_line
from .base import Bucket, Limits, Rows
from .buffers import BufferName, Store, carried_specs, crop_of, plan_buffers, shape_of
from .onnxruntime_session import (
    DISABLED_OPTIMIZERS,
    check_installed,
    is_out_of_memory,
    ort_errors,
    session_options,
)

# Buffer sets that no group uses are kept up to this size: about what a cache holds. A
# larger store would hand out cold memory where the allocator hands out warm.
_FREE_BYTES = 32 * 2**20
# Measured: a binding takes so much beside the buffers, which for one short text is a third of all.
_BINDING_BYTES = 5 * 2**10
# Measured on two cores: fewer tokens waste matrix kernels, more leave the caches.
_GROUP_TOKENS = 1024
_MAX_BATCH = 256


class _Buffers:
    """The memory of one group at one padded shape, with prepared bindings over it."""

    def __init__(self, backend: OnnxRuntimeBackend, bucket: Bucket) -> None:
        self.bucket = bucket
        self.nbytes = 0
        self._backend = backend
        self._values: dict[BufferName, tuple[NDArray[Any], Any]] = {}
        self._prepared: dict[int, tuple[list[_Run], _Ready]] = {}

    def array(self, buffer: BufferName) -> NDArray[Any]:
        """A buffer as an array; its memory is taken when first asked for."""
        return self._buffer(buffer)[0]

    def free(self) -> None:
        """Memory goes with the object."""

    def prepared(self, segment: int) -> tuple[list[_Run], _Ready]:
        """What runs a segment over these buffers, and its outputs."""
        known = self._prepared.get(segment)
        if known is None:
            known = self._prepared[segment] = self._prepare(segment)
        return known

    def _buffer(self, buffer: BufferName) -> tuple[NDArray[Any], Any]:
        known = self._values.get(buffer)
        if known is None:
            import onnxruntime as ort

            spec = self._backend.specs[buffer[0]]
            array = np.empty(shape_of(spec, self.bucket), spec.dtype)
            known = self._values[buffer] = (array, ort.OrtValue.ortvalue_from_numpy(array))
            self.nbytes += array.nbytes
        return known

    def _prepare(self, segment: int) -> tuple[list[_Run], _Ready]:
        runs: list[_Run] = []
        outputs = {}
        for call in self._backend.stages[segment].calls:
            session = self._backend.session(call.graph)
            binding = session.io_binding()
            for name, buffer in call.inputs:
                binding.bind_ortvalue_input(name, self._buffer(buffer)[1])
            for name, buffer in call.outputs:
                array, value = self._buffer(buffer)
                binding.bind_ortvalue_output(name, value)
                if not name.startswith(NEXT):
                    outputs[name] = array
            runs.append((call.graph, session.run_with_iobinding, binding))
            self.nbytes += _BINDING_BYTES
        return runs, _Ready(outputs)


_Run = tuple[str, Callable[[Any], None], Any]


@dataclass(slots=True, eq=False)
class CpuHidden:
    """A group between two segments."""

    rows: int
    buffers: _Buffers
    segment: int
    """The segment that runs next, from 0."""

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""
        return self.buffers.bucket


class _Ready:
    """Outputs that are there: the CPU has run by the time `enqueue` returns."""

    __slots__ = ("_outputs",)

    def __init__(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        self._outputs = outputs

    def result(self) -> Mapping[str, NDArray[Any]]:
        """The outputs by name."""
        return self._outputs

    def first(self, rows: int) -> _Ready:
        """The outputs without the padding rows."""
        return _Ready({name: array[:rows] for name, array in self._outputs.items()})


class OnnxRuntimeBackend:
    """Segments as ONNX Runtime sessions, loaded when first needed.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        target: which files to run.
        threads: size of the process-wide thread pool; default: the usable cores.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or twice.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None
    ) -> None:
        check_installed()
        self._folder = folder
        self._manifest = manifest
        self._target = target
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        # Whether all files are there is asked now; each is hashed when its segment loads.
        for name in manifest.graphs:
            resolve(folder, self._file(name)[0])
        self.specs = carried_specs(manifest.graphs_in(target.precision))
        self.stages = plan_buffers(manifest)
        self.padding = padding_values(manifest.tokenizer)

    def limits(self) -> Limits:
        """Any shape up to the model's longest sequence."""
        shapes = self._manifest.shapes
        rows = min(_MAX_BATCH, shapes.batch.max)
        return Limits(rows, shapes.sequence.max, _GROUP_TOKENS)

    def open(self) -> OnnxRuntimeExecution:
        """A new execution, for one thread."""
        return OnnxRuntimeExecution(self)

    def preload(self) -> None:
        """Load all segments now."""
        for name in self._manifest.graphs:
            self.session(name)

    def close(self) -> None:
        """Drop the sessions."""
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def session(self, name: str) -> Any:
        """The session of a graph, loaded on first use."""
        session = self._sessions.get(name)
        if session is None:
            with self._lock:
                if self._closed:
                    raise BackendError("this engine is closed", "load it again with Engine.load")
                session = self._sessions.get(name) or self._load(name)
                self._sessions[name] = session
        return session

    def _file(self, name: str) -> tuple[str, str]:
        file = self._target.files.get(name) or self._manifest.graphs[name]
        return file.file, file.sha256

    def _load(self, name: str) -> Any:
        import onnxruntime as ort

        path = verified_graph(self._folder, *self._file(name))
        options = session_options(self._threads)
        try:
            session = ort.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except ort_errors() as error:
            raise ArtifactError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {first_line(error)}",
                "update it: pip install -U 'fpabee[cpu]', or export again with fpabee-export",
            ) from error
        graph = self._manifest.graphs[name]
        described = {spec.name for spec in (*graph.inputs, *graph.outputs)}
        found = {tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())}
        if found != described:
            raise ArtifactError(
                f"{path} is another graph than the manifest describes: it has "
                f"{', '.join(sorted(found))}; expected {', '.join(sorted(described))}",
                "copy the engines folder again, or export again with fpabee-export",
            )
        return session


class OnnxRuntimeExecution:
    """Runs segments over buffers that are used again and again, with prepared bindings."""

    lookahead = False

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self._backend = backend
        self._store = Store(lambda bucket: _Buffers(backend, bucket), _FREE_BYTES)

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> CpuHidden:
        """Pad token ids and make the attention bias."""
        buffers = self._store.take(bucket)
        for name, buffer in self._backend.stages[0].live.items():
            write_rows(buffers.array(buffer), name, encoded, self._backend.padding[name])
        return CpuHidden(len(encoded), buffers, 0)

    def enqueue(self, segment: int, hidden: CpuHidden) -> tuple[CpuHidden, _Ready]:
        """Run a segment's graphs one after another."""
        runs, ready = hidden.buffers.prepared(segment)
        for graph, run, binding in runs:
            try:
                run(binding)
            except ort_errors() as error:
                raise BackendError(
                    f"ONNX Runtime failed in {graph} at {hidden.bucket}: {first_line(error)}",
                    "use shorter or fewer texts at a time: there is not enough free memory"
                    if is_out_of_memory(error)
                    else "the graph does not take such tokens, or not so many: export again with "
                    "fpabee-export; if only long texts fail, give a smaller --max-length",
                ) from error
        hidden.segment = segment + 1
        return hidden, ready if hidden.rows == hidden.bucket.batch else ready.first(hidden.rows)

    def regroup(
        self, hiddens: Sequence[CpuHidden], rows: Sequence[Rows], bucket: Bucket
    ) -> CpuHidden:
        """Copy rows into new buffers."""
        segment = hiddens[0].segment
        longest = max(hiddens, key=lambda hidden: hidden.bucket.sequence).buffers
        buffers = self._store.take(bucket)
        for name, buffer in self._backend.stages[segment].live.items():
            spec = self._backend.specs[name]
            array = buffers.array(buffer)
            if "batch" in spec.shape:
                _gather(spec, array, [h.buffers.array(buffer) for h in hiddens], rows)
            else:
                array[...] = longest.array(buffer)[crop_of(spec, bucket)]
        for hidden in hiddens:
            self.release(hidden)
        return CpuHidden(sum(len(part) for part in rows), buffers, segment)

    def release(self, hidden: CpuHidden) -> None:
        """Keep the buffers for the next group of their shape."""
        self._store.give(hidden.buffers)


def _gather(
    spec: TensorSpec, out: NDArray[Any], sources: Sequence[NDArray[Any]], rows: Sequence[Rows]
) -> None:
    """Rows of several tensors into one; new padding is masked, so its content is free."""
    axis = spec.shape.index("sequence") if "sequence" in spec.shape else None
    fill = MASK_FILL if spec.name == ATTENTION_BIAS else 0
    position = 0
    for source, numbers in zip(sources, rows, strict=True):
        part = out[position : position + len(numbers)]
        position += len(numbers)
        if axis is None or source.shape[axis] == out.shape[axis]:
            np.take(source, numbers, axis=0, out=part, mode="clip")
            continue
        width = min(source.shape[axis], out.shape[axis])
        inside = (slice(None),) * (axis - 1) + (slice(width),)
        for target, number in zip(part, numbers, strict=True):
            target[inside] = source[number][inside]
        part[(slice(None), *inside[:-1], slice(width, None))] = fill
    out[position:] = fill
