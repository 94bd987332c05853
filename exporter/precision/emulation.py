"""Check on real texts that a model still gives the same labels and exits in a precision.

This happens before the graphs are written. The chain runs with every rounding in place, see
`lowering.emulate`. The report says which nodes overflow, in order of execution, and how many labels
and exits change. This needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.agreement import REQUIREMENTS, Agreement, compare, must_pass
from ...runtime.artifact.manifest import LOGITS, Manifest
from ...runtime.encoding import EncodedRow, padded_batches, padding_values
from ...runtime.errors import Remedy, VerificationError
from ...runtime.exit_0 import ExitZero
from ...runtime.progress import Progress
from ...runtime.rules.base import ExitRule
from .lowering import ABS_MAX, LoweredGraphs, emulate

_BATCH = 16


@dataclass(frozen=True)
class PrecisionReport:
    """What a precision does to a model, by emulation.

    Attributes:
        precision: `fp16`, `bf16` or `int8`.
        rows: texts that were run.
        kept: nodes and tensors kept in fp32 on request, as `GRAPH:NAME`.
        max_abs: for each graph, the node with the largest |x|, and that value.
        overflows: nodes whose values the format cannot represent, in order of execution.
        agreement: with the fp32 model.
    """

    precision: str
    rows: int
    kept: tuple[str, ...]
    max_abs: dict[str, tuple[str, float]]
    overflows: tuple[str, ...]
    agreement: Agreement

    @property
    def passed(self) -> bool:
        """Whether nothing overflows, and labels and exits agree."""
        return not self.overflows and self.agreement.passed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        agreement = self.agreement.to_dict()
        return asdict(self) | {"passed": self.passed, "agreement": agreement}

    def check(self, remedy: Remedy) -> None:
        """Refuse a precision that overflows, or that changes too many labels or exits.

        Args:
            remedy: what to change.

        Raises:
            VerificationError: it does. The message names the first node that overflows, or else
                the first exit whose answers change.
        """
        if self.overflows:
            graph, node = self.overflows[0].split(":", 1)
            more = len(self.overflows) - 1
            raise VerificationError(
                f"{self.precision} overflows first in {graph} at {node}"
                + (f" and then at {more} more nodes" if more else "")
                + f" (largest value in this graph: {self.max_abs[graph][1]:.3g})",
                remedy,
            )
        must_pass(self.agreement, f"{self.precision} changes answers", remedy)


@dataclass(frozen=True)
class Emulated:
    """A run of the whole chain with rounding.

    Attributes:
        logits: `[exits, rows, labels]` float32, those of exit 0 included.
        abs_max: by graph and node, the largest |x| before rounding.
    """

    logits: NDArray[np.float32]
    abs_max: dict[str, dict[str, float]]


def run_emulated(
    folder: Path,
    manifest: Manifest,
    graphs: LoweredGraphs,
    rows: Sequence[EncodedRow],
    progress: Progress,
) -> Emulated:
    """Run rows through ONNX Runtime with every rounding in place.

    Exit 0 runs as always, because no precision changes it.

    Args:
        folder: the engines folder.
        manifest: says which segment calls which graphs.
        graphs: the graphs, and what is lowered in them.
        rows: tokenized rows.
        progress: called with (what, done, total).
    """
    import onnxruntime as ort

    from ...runtime.backends.onnxruntime_session import cpu_session, session_options
    from ...runtime.backends.stepping import steps

    def open_session(name: str) -> Any:
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = emulate(graphs.protos[name], graphs.half, graphs.lowering(name))
        return cpu_session(proto.SerializeToString(), options)

    calls = sum(len(segment.calls) for segment in manifest.segments)
    batches = padded_batches(rows, padding_values(manifest.tokenizer), _BATCH)
    abs_max: dict[str, dict[str, float]] = {}
    logits: dict[int, list[NDArray[np.float32]]] = {}
    for step in steps(manifest, batches, open_session):
        if step.batch == 0:
            progress("emulate the chain", step.call, calls)
        largest = abs_max.setdefault(step.graph, {})
        for output, value in step.outputs.items():
            if output.startswith(ABS_MAX):
                node = output.removeprefix(ABS_MAX)
                # Unlike max(), keeps NaN.
                largest[node] = float(np.maximum(largest.get(node, 0.0), value))
        if LOGITS in step.outputs:
            logits.setdefault(step.call, []).append(step.outputs[LOGITS])
    exits = [np.concatenate(part) for part in logits.values()]
    exit_0 = ExitZero.load(folder, manifest)
    if exit_0 is not None:
        exits.insert(0, exit_0(rows))
    return Emulated(np.stack(exits), abs_max)


def report_on(
    found: Emulated,
    expected: NDArray[np.float32],
    manifest: Manifest,
    precision: str,
    graphs: LoweredGraphs,
    kept: tuple[str, ...] = (),
) -> PrecisionReport:
    """Compare an emulated run with the fp32 model; exits are those of the default rule.

    Args:
        found: the run.
        expected: logits `[exits, rows, labels]` of the fp32 model.
        manifest: says what the labels are.
        precision: the precision that is judged.
        graphs: the graphs that ran.
        kept: nodes and tensors kept in fp32 on request, as `GRAPH:NAME`.
    """
    overflows = tuple(
        f"{name}:{node}"
        for name, nodes in found.abs_max.items()
        for node, value in nodes.items()
        if node in graphs.lowering(name).nodes and not value <= graphs.half.largest
    )
    required, first = REQUIREMENTS[precision], manifest.exits[0]
    rule = ExitRule.from_dict(manifest.default_rule)
    return PrecisionReport(
        precision=precision,
        rows=expected.shape[1],
        kept=kept,
        max_abs={name: max(nodes.items(), key=_size) for name, nodes in found.abs_max.items()},
        overflows=overflows,
        agreement=compare(found.logits, expected, rule, manifest.task, required, first),
    )


def _size(item: tuple[str, float]) -> float:
    return np.inf if np.isnan(item[1]) else item[1]
