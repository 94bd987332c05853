"""Which buffer holds what: the same plan for every backend that keeps buffers by shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..artifact.manifest import NEXT, Graph, Manifest, TensorSpec
from .base import Bucket

BufferName = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Call:
    """A graph's run within a segment: which buffer each input and output is in.

    A tensor that segments write more than once (`next_X` replaces `X`) has two buffers that
    take turns: `(X, 0)` and `(X, 1)`. Whose turn it is is known before anything runs.
    """

    graph: str
    inputs: tuple[tuple[str, BufferName], ...]
    outputs: tuple[tuple[str, BufferName], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A segment's calls, and where its live inputs are before them."""

    live: Mapping[str, BufferName]
    calls: tuple[Call, ...]


def plan_buffers(manifest: Manifest) -> list[Stage]:
    """For every segment, which buffer each tensor of each call is in."""
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
            calls.append(Call(name, inputs, tuple(outputs)))
        planned.append(Stage(before, tuple(calls)))
    return planned


def _live_tensors(manifest: Manifest) -> list[set[str]]:
    """For each segment, the tensors from before it that it or a later one reads."""
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
    """Every tensor between and around graphs, by the name it is carried under."""
    return {
        spec.name.removeprefix(NEXT): spec
        for graph in graphs.values()
        for spec in (*graph.inputs, *graph.outputs)
    }


def shape_of(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    """A tensor's shape in a bucket."""
    sizes = {"batch": bucket.batch, "sequence": bucket.sequence}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def crop_of(spec: TensorSpec, bucket: Bucket) -> tuple[slice, ...]:
    """The part of a longer tensor that a bucket needs."""
    return tuple(
        slice(bucket.sequence) if size == "sequence" else slice(None) for size in spec.shape
    )


class BufferSet(Protocol):
    """The memory of one group at one padded shape."""

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""

    @property
    def nbytes(self) -> int:
        """Memory it holds so far."""

    def free(self) -> None:
        """Give its memory back."""


B = TypeVar("B", bound=BufferSet)


class Store(Generic[B]):
    """Buffers that no group uses, by shape; the least recently used shapes are dropped.

    Args:
        make: makes the buffers of a shape.
        most_bytes: memory that is kept.
    """

    def __init__(self, make: Callable[[Bucket], B], most_bytes: int) -> None:
        self._make = make
        self._most_bytes = most_bytes
        self._free: OrderedDict[Bucket, list[B]] = OrderedDict()
        self.nbytes = 0

    def take(self, bucket: Bucket) -> B:
        """Buffers of a shape, used before if there are any."""
        free = self._free.get(bucket)
        if not free:
            return self._make(bucket)
        buffers = free.pop()
        self.nbytes -= buffers.nbytes
        return buffers

    def give(self, buffers: B) -> None:
        """Keep buffers for the next group of their shape."""
        self._free.setdefault(buffers.bucket, []).append(buffers)
        self._free.move_to_end(buffers.bucket)
        self.nbytes += buffers.nbytes
        self.shrink(self._most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Drop what was used longest ago until no more memory is held than this."""
        while self.nbytes > most_bytes:
            oldest, free = next(iter(self._free.items()))
            if free:
                dropped = free.pop(0)
                self.nbytes -= dropped.nbytes
                dropped.free()
            else:
                del self._free[oldest]
