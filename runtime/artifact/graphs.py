"""Graphs of the artifact: their tensors, and the chain that segments make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from .operating_point import Count, Sha256

# A graph output with this prefix replaces the carried tensor of the rest of its name.
NEXT = "next_"
HIDDEN_STATES = "hidden_states"
ATTENTION_BIAS = "attention_bias"
LOGITS = "logits"

# What the runtime makes of a text; all else a graph must have been given by one before it.
_FIRST_INPUTS = frozenset({"input_ids", "token_type_ids", ATTENTION_BIAS})

# Values of a row and token, beside batch and sequence: the widest models have some thousands.
_MOST_VALUES = 2**20

Size = Literal["batch", "sequence"] | Annotated[int, msgspec.Meta(ge=1, le=_MOST_VALUES)]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output of a graph.

    Attributes:
        name: its name. An output `next_X` replaces the carried tensor `X`.
        dtype: `int64`, `float32`, `float16` or `bfloat16`.
        shape: sizes; `batch` and `sequence` are the dimensions that differ from run to run.
    """

    name: str
    dtype: Annotated[str, msgspec.Meta(pattern="^(int64|float32|float16|bfloat16)$")]
    shape: tuple[Size, ...]


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """One ONNX graph.

    Attributes:
        file: its path in the folder.
        sha256: its SHA-256, in hexadecimal.
        inputs: in their order.
        outputs: in their order.
    """

    file: str
    sha256: Sha256
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """The way from one exit to the next.

    Attributes:
        exit: number of the exit at its end, counted from 1.
        layer: encoder layers that have run when it ends.
        calls: names of the graphs to run in order. One, or with shared layers the block
            once per layer and then the head.
    """

    exit: Count
    layer: Count
    calls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=1024)]


def chain_problem(segments: Sequence[Segment], graphs: Mapping[str, Graph], labels: int) -> str:
    """Why segments cannot be run one after another; empty if they can.

    Args:
        segments: in order; their calls are among the graphs.
        graphs: the graphs by name.
        labels: how many numbers a head gives.
    """
    problem = _unlike(graphs)
    if problem:
        return problem
    there = set(_FIRST_INPUTS)
    for number, segment in enumerate(segments, start=1):
        given: set[str] = set()
        for call in segment.calls:
            graph = graphs[call]
            lacking = {spec.name for spec in graph.inputs} - there
            if lacking:
                return (
                    f"segment {number} needs {sorted(lacking)[0]!r}, which nothing before it gives"
                )
            given |= {spec.name for spec in graph.outputs}
            there |= {spec.name.removeprefix(NEXT) for spec in graph.outputs}
        if LOGITS not in given:
            return f"segment {number} gives no {LOGITS}"
    shape = next(s.shape for g in graphs.values() for s in g.outputs if s.name == LOGITS)
    if shape != ("batch", labels):
        return f"it names {labels} labels, but the heads give {list(shape)}"
    return ""


def _unlike(graphs: Mapping[str, Graph]) -> str:
    """A tensor that two graphs describe otherwise, or that is too large."""
    known: dict[str, TensorSpec] = {}
    for name, graph in graphs.items():
        for spec in (*graph.inputs, *graph.outputs):
            carried = spec.name.removeprefix(NEXT)
            first = known.setdefault(carried, spec)
            if (first.dtype, first.shape) != (spec.dtype, spec.shape):
                return f"graph {name} has another {carried!r} than the graphs before it"
            if _values(spec.shape) > _MOST_VALUES:
                return f"graph {name}: {spec.name!r} is larger than that of any model"
    return ""


def _values(shape: Iterable[Size]) -> int:
    return math.prod(size for size in shape if isinstance(size, int))
