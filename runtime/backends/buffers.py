"""Which buffer holds which tensor: the same for every backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..artifact.manifest import NEXT, Graph, Manifest, TensorSpec
from .shapes import Bucket, Limits

BufferName = tuple[str, int]

# Most memory of a window: the hidden states of all its rows, once as input and once as output.
_WINDOW_BYTES = 256 * 2**20

# NumPy lacks these types, so their bits are handled as integers.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


@dataclass(frozen=True, slots=True)
class GraphCall:
    """A graph's run within a segment, and the buffer of each input and output.

    A tensor that several segments write (`next_X` replaces `X`) alternates between two buffers,
    `(X, 0)` and `(X, 1)`. The plan is made before anything runs.
    """

    graph: str
    inputs: tuple[tuple[str, BufferName], ...]
    outputs: tuple[tuple[str, BufferName], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A segment's calls.

    Attributes:
        live: the buffers of all tensors that it or a later segment reads, by tensor.
        calls: in order.
    """

    live: Mapping[str, BufferName]
    calls: tuple[GraphCall, ...]


def plan_buffers(manifest: Manifest) -> list[Stage]:
    """For every segment, the buffer of each tensor of each call."""
    turn: dict[str, int] = {}
    planned = []
    for segment, live in zip(manifest.segments, _live_tensors(manifest), strict=True):
        before = {name: (name, turn.setdefault(name, 0)) for name in sorted(live)}
        calls = []
        for name in segment.calls:
            graph = manifest.graphs[name]
            inputs = tuple((spec.name, (spec.name, turn[spec.name])) for spec in graph.inputs)
            outputs = []
            for spec in graph.outputs:
                tensor = spec.name.removeprefix(NEXT)
                turn[tensor] = 1 - turn.get(tensor, 1)
                outputs.append((spec.name, (tensor, turn[tensor])))
            calls.append(GraphCall(name, inputs, tuple(outputs)))
        planned.append(Stage(before, tuple(calls)))
    return planned


def _live_tensors(manifest: Manifest) -> list[set[str]]:
    """For each segment, the tensors that exist before it and that it or a later segment reads."""
    live: list[set[str]] = []
    needed: set[str] = set()
    for segment in reversed(manifest.segments):
        for name in reversed(segment.calls):
            graph = manifest.graphs[name]
            needed -= {spec.name.removeprefix(NEXT) for spec in graph.outputs}
            needed |= {spec.name for spec in graph.inputs}
        live.insert(0, set(needed))
    return live


def carried_specs(graphs: Mapping[str, Graph]) -> dict[str, TensorSpec]:
    """Every tensor between and around graphs, by name; `next_X` counts as `X`."""
    return {
        spec.name.removeprefix(NEXT): spec
        for graph in graphs.values()
        for spec in (*graph.inputs, *graph.outputs)
    }


def shape_of(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    """A tensor's shape in a bucket."""
    sizes = {"batch": bucket.batch, "sequence": bucket.sequence}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The NumPy type that holds the bits of a tensor."""
    return _DTYPES.get(spec.dtype) or np.dtype(spec.dtype)


def nbytes_of(spec: TensorSpec, bucket: Bucket) -> int:
    """A tensor's size in bytes at a padded shape."""
    return int(np.prod(shape_of(spec, bucket))) * dtype_of(spec).itemsize


def window_tokens(manifest: Manifest, limits: Limits) -> int:
    """Most tokens of a window of rows whose hidden states are in memory at a time.

    Each tensor that segment 1 passes on counts twice: as an input and as an output of a segment.
    The rows are assumed to be the longest ones, because a position bias takes most memory there.
    """
    sequence = limits.max_sequence
    bucket = Bucket(max(1, limits.group_tokens // sequence), sequence)
    outputs = [
        spec for name in manifest.segments[0].calls for spec in manifest.graphs[name].outputs
    ]
    size = sum(nbytes_of(spec, bucket) for spec in outputs if spec.name.startswith(NEXT))
    per_token = max(1, 2 * size // (bucket.batch * sequence))
    return max(limits.group_tokens, _WINDOW_BYTES // per_token)


V = TypeVar("V")
S = TypeVar("S")


class Buffers(ABC, Generic[V, S]):
    """The memory of one group at one padded shape, and prepared runs of segments over it.

    `V` is how a backend holds one buffer, and `S` is what it prepares to run a segment.

    Attributes:
        bucket: the padded shape.
        nbytes: memory that is held so far, in bytes.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.nbytes = 0
        self._values: dict[BufferName, V] = {}
        self._steps: dict[int, S] = {}

    def buffer(self, name: BufferName) -> V:
        """A buffer, allocated on first use."""
        value = self._values.get(name)
        if value is None:
            value = self._values[name] = self._allocate(name)
        return value

    def step(self, segment: int) -> S:
        """What runs a segment, counted from 0, prepared on first use."""
        step = self._steps.get(segment)
        if step is None:
            step = self._steps[segment] = self._prepare(segment)
        return step

    @abstractmethod
    def _allocate(self, name: BufferName) -> V:
        """Allocate a buffer, and add its size to `nbytes`."""

    @abstractmethod
    def _prepare(self, segment: int) -> S:
        """Prepare to run a segment."""

    def free(self) -> None:
        """Free the memory, unless it is freed together with this object."""


B = TypeVar("B", bound=Buffers[Any, Any])


@dataclass(slots=True, eq=False)
class Hidden(Generic[B]):
    """The hidden states of a group between two segments, and what travels with its rows.

    Attributes:
        rows: real rows; the rest of the bucket is padding.
        buffers: the memory.
        segment: the segment that runs next, from 0.
    """

    rows: int
    buffers: B
    segment: int = 0

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""
        return self.buffers.bucket
