"""ONNX Runtime on the CPU.

Three things make a chain of sessions as fast as one graph (measured: up to 18x and 1.2x):
one process-wide thread pool, since idle pools spin against each other; one shared arena,
so that segments reuse the same warm memory; and prepared IO bindings over pooled buffers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoding import EncodedRow
from ..errors import ArtifactError, BackendError
from ..manifest import (
    ATTENTION_BIAS,
    MASK_FILL,
    NEXT,
    Graph,
    Manifest,
    Target,
    TensorSpec,
    resolve,
    verified,
)
from .base import Bucket, Limits, Rows
from .onnxruntime_session import check_installed, first_line, ort_errors, session_options

_POOL_BYTES = 256 * 2**20
# A binding keeps its buffers alive; one that many bindings share counts for each of them.
_BINDING_BYTES = 256 * 2**20
# Measured on two cores: fewer tokens waste matrix kernels, more leave the caches.
_GROUP_TOKENS = 1024
_MAX_BATCH = 256


@dataclass(slots=True, eq=False)
class _Buffer:
    """Host memory that numpy and ONNX Runtime both see."""

    array: NDArray[Any]
    value: Any
    key: tuple[tuple[int, ...], str]


class _Pool:
    """Buffers by shape and type; the last given back is the first taken: it is warm."""

    def __init__(self) -> None:
        self._free: OrderedDict[tuple[tuple[int, ...], str], list[_Buffer]] = OrderedDict()
        self._free_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: str) -> _Buffer:
        import onnxruntime as ort

        key = (shape, dtype)
        free = self._free.get(key)
        if free:
            self._free.move_to_end(key)
            buffer = free.pop()
            self._free_bytes -= buffer.array.nbytes
            return buffer
        array = np.empty(shape, dtype)
        return _Buffer(array, ort.OrtValue.ortvalue_from_numpy(array), key)

    def give(self, buffer: _Buffer) -> None:
        self._free.setdefault(buffer.key, []).append(buffer)
        self._free.move_to_end(buffer.key)
        self._free_bytes += buffer.array.nbytes
        while self._free_bytes > _POOL_BYTES:
            oldest, buffers = next(iter(self._free.items()))
            if buffers:
                self._free_bytes -= buffers.pop().array.nbytes
            else:
                del self._free[oldest]


@dataclass(frozen=True, slots=True, eq=False)
class CpuHidden:
    """Tensors of a group by name."""

    rows: int
    bucket: Bucket
    tensors: Mapping[str, _Buffer]


@dataclass(frozen=True, slots=True)
class _Ready:
    outputs: Mapping[str, NDArray[Any]]

    def result(self) -> Mapping[str, NDArray[Any]]:
        """The outputs: the CPU has run by the time `enqueue` returns."""
        return self.outputs


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
        self.live = _live_tensors(manifest)
        self.specs = {name: spec for live in self.live for name, spec in live.items()}
        self.padding = {
            "input_ids": manifest.tokenizer.pad_id,
            "token_type_ids": manifest.tokenizer.pad_type_id,
            ATTENTION_BIAS: MASK_FILL,
        }

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

    def calls(self, segment: int) -> tuple[str, ...]:
        """Graphs of a segment in order."""
        return self._manifest.segments[segment].calls

    def graph(self, name: str) -> Graph:
        """Inputs and outputs of a graph."""
        return self._manifest.graphs[name]

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

        path = verified(self._folder, *self._file(name))
        options = session_options(self._threads)
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except ort_errors() as error:
            raise ArtifactError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {first_line(error)}",
                "update it: pip install -U 'fpabee[cpu]', or export again with fpabee-export",
            ) from error


class OnnxRuntimeExecution:
    """Runs segments over pooled buffers with prepared bindings."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self._backend = backend
        self._pool = _Pool()
        self._bindings: OrderedDict[tuple[str, tuple[int, ...]], tuple[Any, list[_Buffer]]] = (
            OrderedDict()
        )
        self._binding_bytes = 0

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> CpuHidden:
        """Pad token ids and make the attention bias."""
        live = self._backend.live[0]
        tensors = {
            name: self._pool.take(_shape(spec, bucket), spec.dtype) for name, spec in live.items()
        }
        for name, buffer in tensors.items():
            buffer.array[...] = self._backend.padding[name]
            for number, row in enumerate(encoded):
                buffer.array[number, ..., : len(row)] = row.model_input(name)
        return CpuHidden(len(encoded), bucket, tensors)

    def enqueue(self, segment: int, hidden: CpuHidden) -> tuple[CpuHidden, _Ready]:
        """Run a segment's graphs one after another."""
        tensors = dict(hidden.tensors)
        results: dict[str, NDArray[Any]] = {}
        for name in self._backend.calls(segment):
            graph = self._backend.graph(name)
            outputs = {
                spec.name: self._pool.take(_shape(spec, hidden.bucket), spec.dtype)
                for spec in graph.outputs
            }
            self._run(name, [tensors[spec.name] for spec in graph.inputs], list(outputs.values()))
            for output, buffer in outputs.items():
                if output.startswith(NEXT):
                    replaced = tensors.get(output[len(NEXT) :])
                    tensors[output[len(NEXT) :]] = buffer
                    if replaced is not None:
                        self._pool.give(replaced)
                else:
                    results[output] = buffer.array[: hidden.rows].copy()
                    self._pool.give(buffer)
        live = self._backend.live[segment + 1]
        for name in [name for name in tensors if name not in live]:
            self._pool.give(tensors.pop(name))
        return CpuHidden(hidden.rows, hidden.bucket, tensors), _Ready(results)

    def regroup(
        self, hiddens: Sequence[CpuHidden], rows: Sequence[Rows], bucket: Bucket
    ) -> CpuHidden:
        """Copy rows into new buffers."""
        specs = self._backend.specs
        longest = max(hiddens, key=lambda hidden: hidden.bucket.sequence)
        tensors = {}
        for name, source in longest.tensors.items():
            spec = specs[name]
            buffer = self._pool.take(_shape(spec, bucket), spec.dtype)
            if "batch" in spec.shape:
                _gather(spec, buffer.array, [h.tensors[name].array for h in hiddens], rows)
            else:
                buffer.array[...] = source.array[_crop(spec, bucket)]
            tensors[name] = buffer
        for hidden in hiddens:
            self.release(hidden)
        return CpuHidden(sum(len(part) for part in rows), bucket, tensors)

    def release(self, hidden: CpuHidden) -> None:
        """Give the buffers back to the pool."""
        for buffer in hidden.tensors.values():
            self._pool.give(buffer)

    def _run(self, name: str, inputs: list[_Buffer], outputs: list[_Buffer]) -> None:
        key = (name, tuple(id(buffer) for buffer in (*inputs, *outputs)))
        session = self._backend.session(name)
        known = self._bindings.get(key)
        if known is None:
            graph = self._backend.graph(name)
            binding = session.io_binding()
            for spec, buffer in zip(graph.inputs, inputs, strict=True):
                binding.bind_ortvalue_input(spec.name, buffer.value)
            for spec, buffer in zip(graph.outputs, outputs, strict=True):
                binding.bind_ortvalue_output(spec.name, buffer.value)
            # The buffers are kept with their binding, so that their ids stay theirs.
            known = (binding, [*inputs, *outputs])
            self._bindings[key] = known
            self._binding_bytes += _size(known[1])
            while self._binding_bytes > _BINDING_BYTES and len(self._bindings) > 1:
                _, (_, buffers) = self._bindings.popitem(last=False)
                self._binding_bytes -= _size(buffers)
        else:
            self._bindings.move_to_end(key)
        try:
            session.run_with_iobinding(known[0])
        except ort_errors() as error:
            raise BackendError(
                f"ONNX Runtime failed in {name} at shape {list(inputs[0].array.shape)}: "
                f"{first_line(error)}",
                "check the free memory; if the folder was copied, export again",
            ) from error


def _size(buffers: Sequence[_Buffer]) -> int:
    return sum(buffer.array.nbytes for buffer in buffers)


def _live_tensors(manifest: Manifest) -> list[dict[str, TensorSpec]]:
    """For each segment, and after the last, the tensors that it or a later one reads."""
    live: list[dict[str, TensorSpec]] = [{}]
    for segment in reversed(manifest.segments):
        needed = dict(live[0])
        for name in reversed(segment.calls):
            graph = manifest.graphs[name]
            for spec in graph.outputs:
                needed.pop(spec.name.removeprefix(NEXT), None)
            needed |= {spec.name: spec for spec in graph.inputs}
        live.insert(0, needed)
    return live


def _shape(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    sizes = {"batch": bucket.batch, "sequence": bucket.sequence}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def _crop(spec: TensorSpec, bucket: Bucket) -> tuple[slice, ...]:
    return tuple(
        slice(bucket.sequence) if size == "sequence" else slice(None) for size in spec.shape
    )


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
