"""Run a chain graph by graph with ONNX Runtime, to see every tensor between graphs.

This serves checks and measurements of an export; the engine runs segments through `Execution`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...runtime.artifact.manifest import NEXT, Manifest
from ...runtime.encoding import Arrays


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One graph, run on one batch.

    Attributes:
        call: number of the call in the chain, from 0; a shared graph is called several times.
        graph: name of the graph.
        batch: number of the batch, from 0.
        inputs: what the graph read, by input name.
        outputs: what it gave, by output name. Later graphs read these values. A caller may
            replace them before it asks for the next run.
    """

    call: int
    graph: str
    batch: int
    inputs: Arrays
    outputs: Arrays


def graph_runs(
    manifest: Manifest, batches: Iterable[Arrays], open_session: Callable[[str], Any]
) -> Iterator[GraphRun]:
    """Run the calls of the chain one after another, each on all batches.

    Only one graph is in memory at a time, together with the tensors of all batches.

    Args:
        manifest: says which segment calls which graphs.
        batches: the model inputs of each batch, see `padded_batches`.
        open_session: gives the session of a graph by the graph's name.

    Yields:
        One run for each call and batch, in this order.
    """
    states = [dict(batch) for batch in batches]
    calls = [name for segment in manifest.segments for name in segment.calls]
    session: Any = None
    loaded = ""
    for call, name in enumerate(calls):
        if name != loaded:
            session = None  # so that two graphs are never in memory together
            session, loaded = open_session(name), name
        input_names = [value.name for value in session.get_inputs()]
        output_names = [value.name for value in session.get_outputs()]
        for batch, state in enumerate(states):
            inputs = {key: state[key] for key in input_names}
            values = session.run(output_names, inputs)
            run = GraphRun(call, name, batch, inputs, dict(zip(output_names, values, strict=True)))
            yield run
            state |= {key.removeprefix(NEXT): value for key, value in run.outputs.items()}
