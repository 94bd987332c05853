"""Which shapes a backend runs, which buffers its segments read and write, and their sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..artifact.manifest import LOGITS, NEXT, Graph, Manifest, TensorSpec

BufferName = tuple[str, int]

_TOKEN_BYTES = 16  # of an `EncodedRow`
# NumPy lacks these types, so their bits are handled as integers.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


@dataclass(frozen=True)
class Bucket:
    """Padded shape of a group.

    Attributes:
        batch: rows, rows of padding included.
        sequence: tokens in a row, padding included.
    """

    batch: int
    sequence: int


@dataclass(frozen=True)
class Limits:
    """Shapes that a backend runs.

    Attributes:
        max_batch: most rows in a group.
        max_sequence: longest row, in tokens.
        group_tokens: padded tokens of a group that runs efficiently; more rows are split.
        batch_sizes: the batch sizes to pad to, ascending; empty: any size is possible.
        sequence_lengths: the lengths to pad to, ascending; empty: any length is possible.
        lengths_alone: the lengths to pad to if a group starts with a single row, ascending; empty:
            `sequence_lengths`.
    """

    max_batch: int
    max_sequence: int
    group_tokens: int
    batch_sizes: tuple[int, ...] = ()
    sequence_lengths: tuple[int, ...] = ()
    lengths_alone: tuple[int, ...] = ()

    def bucket(self, rows: int, longest: int, alone: bool = False) -> Bucket:
        """The smallest shape that holds `rows` rows of at most `longest` tokens.

        Args:
            rows: the number of rows.
            longest: the number of tokens of the longest row.
            alone: whether the group starts with a single row.
        """
        lengths = (alone and self.lengths_alone) or self.sequence_lengths
        return Bucket(_at_least(rows, self.batch_sizes), _at_least(max(1, longest), lengths))


def _at_least(value: int, sizes: tuple[int, ...]) -> int:
    position = bisect_left(sizes, value)
    return sizes[position] if position < len(sizes) else value


class GraphCall(NamedTuple):
    """A graph's run within a segment, and the buffer of each input and output.

    A tensor that several segments write (`next_X` replaces `X`) alternates between two buffers,
    `(X, 0)` and `(X, 1)`. The plan is made before anything runs.
    """

    graph: str
    buffers: dict[str, BufferName]


class Stage(NamedTuple):
    """A segment.

    Attributes:
        live: the buffers of all tensors that it or a later segment reads, by tensor.
        calls: its graphs, in order.
        logits: the buffer of the logits at the exit at its end.
    """

    live: dict[str, BufferName]
    calls: list[GraphCall]
    logits: BufferName


def plan_buffers(manifest: Manifest) -> list[Stage]:
    """For every segment, the buffer of each tensor of each call."""
    turn: dict[str, int] = {}
    planned = []
    for segment, live in zip(manifest.segments, _live_tensors(manifest), strict=True):
        before = {name: (name, turn.setdefault(name, 0)) for name in sorted(live)}
        calls = []
        for name in segment.calls:
            graph = manifest.graphs[name]
            buffers = {spec.name: (spec.name, turn[spec.name]) for spec in graph.inputs}
            for spec in graph.outputs:
                tensor = spec.name.removeprefix(NEXT)
                turn[tensor] = 1 - turn.get(tensor, 1)
                buffers[spec.name] = tensor, turn[tensor]
            calls.append(GraphCall(name, buffers))
        planned.append(Stage(before, calls, (LOGITS, turn[LOGITS])))
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


def row_bytes(manifest: Manifest, limits: Limits, tokens: int) -> int:
    """Memory of a row: hidden states, as an input and an output of a segment, and its tokens.

    Args:
        manifest: the manifest.
        limits: the shapes that the backend runs.
        tokens: the length of the row. A tensor that all rows of a group share, such as a position
            bias, is divided among the rows of a full group.
    """
    bucket = Bucket(max(1, limits.group_tokens // tokens), tokens)
    outputs = [
        spec for name in manifest.segments[0].calls for spec in manifest.graphs[name].outputs
    ]
    size = sum(nbytes_of(spec, bucket) for spec in outputs if spec.name.startswith(NEXT))
    return 2 * size // bucket.batch + _TOKEN_BYTES * tokens
