"""Compare the plans of a target with NVIDIA's own runner, for `scripts/gpu_check`.

Polygraphy runs each plan alone, with memory and streams of its own, and copies everything to the
host in between. It knows nothing of our buffers, contexts, scratch memory and CUDA graphs, so it is
an independent judge of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from gpu_check_measure import Emit, check_target, exact_rows, full_depth
from gpu_check_table import ENGINE, STEPWISE, TOKENS

from fpabee.exporter.targets.options import RTX
from fpabee.runtime import Bucket, Engine
from fpabee.runtime.artifact.manifest import Graph, TensorSpec
from fpabee.runtime.backends.buffers import dtype_of
from fpabee.runtime.backends.stepping import steps
from fpabee.runtime.encoding import Arrays, EncodedRow, padded_inputs, padding_values

JUDGE = "Polygraphy's runner"
RUNS = 3  # warm up, capture, replay
MOST_DIFFERENCE = 0.01
"""Both run the same kernels on the same inputs, so only sums in another order may differ."""


class PlanSession:
    """A plan in Polygraphy's runner, with the methods of a session that `steps` calls.

    Args:
        engine: an engine on the plan's target, which is not used to run it.
        folder: its folder.
        graph: the name of the plan's graph.
        bucket: the shape that it runs.
    """

    def __init__(self, engine: Engine, folder: Path, graph: str, bucket: Bucket) -> None:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        backend: Any = engine.model._backend
        self._graph: Graph = backend.graphs[graph]
        plan = folder / backend.target.files[graph].file
        # Plans of TensorRT for RTX have no scratch memory of their own, so the runner allocates it.
        self._runner = TrtRunner(
            EngineFromBytes(BytesFromPath(str(plan))),
            optimization_profile=backend._profile(bucket),
            allocation_strategy="runtime",
        )

    def get_inputs(self) -> Sequence[TensorSpec]:
        """The inputs of the graph."""
        return self._graph.inputs

    def get_outputs(self) -> Sequence[TensorSpec]:
        """The outputs of the graph."""
        return self._graph.outputs

    def run(self, names: Sequence[str], inputs: Arrays) -> list[Any]:
        """Run the plan once; returns copies of the outputs, in the order of their names."""
        feed = {
            spec.name: np.ascontiguousarray(inputs[spec.name], dtype_of(spec))
            for spec in self._graph.inputs
        }
        with self._runner as runner:
            outputs = runner.infer(feed)
            return [np.array(outputs[name]) for name in names]


def judge(folder: Path, target: str, emit: Emit) -> str:
    """Compare the logits of every exit, of one row at each length and of several rows.

    Args:
        folder: holds the engines folders `one` and `chain`, and `texts.txt`.
        target: the name of a target of plans in both of them.
        emit: is called with each result.

    Returns:
        What differs; empty if nothing does, or if Polygraphy cannot run here.

    Raises:
        Skipped: the target cannot run here.
    """
    check_target(folder, target)
    if util.find_spec("polygraphy") is None:
        emit(what="not measured", variant=JUDGE, reason="polygraphy is not installed")
        return ""
    if target.startswith(RTX):
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # it is read when Polygraphy is imported
    from polygraphy.exception import PolygraphyException

    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    problems = []
    for name, variant in (("one", ENGINE), ("chain", STEPWISE)):
        with Engine.load(folder / name, target) as engine:
            units = {tokens: exact_rows(engine, texts, tokens) for tokens in TOKENS}
            batches = [rows[0] for rows in units.values()]
            batches.append([row for (row,) in units[TOKENS[0]][:8]])
            try:
                found = [_differences(engine, folder / name, rows) for rows in batches]
            except (PolygraphyException, OSError) as error:
                emit(what="not measured", variant=JUDGE, reason=f"{variant}: {error}")
                continue
        exits = np.max(found, axis=0)
        agrees = bool((exits <= MOST_DIFFERENCE).all())
        verdict = "equal" if agrees else "**they differ**"
        emit(what="judge", variant=variant, exits=[float(e) for e in exits], verdict=verdict)
        if not agrees:
            problems.append(f"{variant} differs from {JUDGE} by {exits.max():.2g}")
    return "; ".join(problems)


def _differences(engine: Engine, folder: Path, rows: Sequence[EncodedRow]) -> list[float]:
    """The largest difference of a logit at each exit."""
    bucket = Bucket(len(rows), len(rows[0]))  # a shape that our runtime does not pad
    inputs = padded_inputs(rows, padding_values(engine.manifest.tokenizer))

    def open_session(graph: str) -> PlanSession:
        return PlanSession(engine, folder, graph, bucket)

    judged = [
        step.outputs["logits"]
        for step in steps(engine.manifest, [inputs], open_session)
        if "logits" in step.outputs
    ]
    ours = [full_depth(engine)(rows).logits[-len(judged) :] for _ in range(RUNS)]
    differences = np.abs(np.array(ours, np.float64) - np.array(judged, np.float64))
    return [float(each) for each in np.nan_to_num(differences, nan=np.inf).max(axis=(0, 2, 3))]
