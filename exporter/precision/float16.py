"""Write an engines folder's graphs in half precision, after checking that they survive it.

The check runs the emulation of `precision.emulate` over real texts: what overflows, and
where first, whether labels and exits stay. It needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...runtime.agreement import BARS, Agreement, compare
from ...runtime.artifact.folder import sha256_of, verified_graph
from ...runtime.artifact.manifest import LOGITS, NEXT, Graph, Manifest, TensorSpec
from ...runtime.artifact.reference import read_reference
from ...runtime.encoding import EncodedRow, Text, TextEncoder, padded_batches, padding_values
from ...runtime.errors import VerificationError
from ...runtime.progress import Progress, silent
from ...runtime.rules.rules import ExitRule
from ..staging import replacing
from .formats import Half
from .rounding import ABS_MAX, Lowering, choose_lowering, emulate, largest_weight, lower

AUTO = "auto"

_BATCH = 16


@dataclass(frozen=True)
class PrecisionReport:
    """What half precision does to a model, by emulation.

    Attributes:
        precision: the format.
        rows: texts that were run.
        kept: nodes and tensors kept in fp32 on request, as `GRAPH:NAME`.
        max_abs: for each graph, its node with the largest |x|, and that value.
        overflows: nodes whose values the format cannot hold, in order of execution.
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
        """Whether the model survives the format."""
        return not self.overflows and self.agreement.passed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self) | {"passed": self.passed}
        return content | {"agreement": self.agreement.to_dict()}


def add_half(
    folder: Path,
    manifest: Manifest,
    half: Half,
    rule: ExitRule,
    keep: Sequence[str] = (),
    texts: Sequence[Text] = (),
    progress: Progress = silent,
    *,
    turing: bool = False,
) -> tuple[Manifest, PrecisionReport]:
    """Check a format and write the graphs in it to `onnx/<format>/`.

    Args:
        folder: the engines folder.
        manifest: its manifest; the one with the new graphs is returned, not written.
        half: the format.
        rule: whose exits must stay.
        keep: what stays in fp32: `auto`, or node names, as `GRAPH:NODE` or alone for every
            graph that has them.
        texts: more texts to check with than those of `reference.npz`.
        progress: called with (what, done, total).
        turing: check it as plans for compute capability 7.5 compute it, with the heads'
            matrix products in the format too; the graphs are the same.

    Raises:
        VerificationError: the model does not survive the format.
        ModelError: a weight does not fit it.
    """
    import onnx

    protos = {
        name: onnx.load(verified_graph(folder, graph.file, graph.sha256))
        for name, graph in manifest.graphs.items()
    }
    known, logits = read_reference(folder, manifest)
    # An export has verified, and kept, the same texts.
    more = [text for text in dict.fromkeys(texts) if text not in known]
    chain = Emulation(folder, manifest, protos, half, progress)
    rows = TextEncoder(folder, manifest.tokenizer).encode([*known, *more])
    kept = _resolve(keep, protos)
    expected = logits
    if more or AUTO in keep:
        fp32 = chain.run(rows, chain.exact)
        expected = np.concatenate([logits, fp32.logits[:, len(known) :]], axis=1)
        if AUTO in keep:
            for name, names in _too_large(protos, fp32.abs_max, half).items():
                kept[name] |= names
    plans = {name: choose_lowering(proto, kept[name]) for name, proto in protos.items()}
    checked = {name: choose_lowering(proto, kept[name], turing) for name, proto in protos.items()}
    found = chain.run(rows, checked)
    report = report_of(manifest, half.value, rule, found, expected, checked, half)
    listed = tuple(f"{name}:{node}" for name, nodes in kept.items() for node in sorted(nodes))
    report = replace(report, kept=listed)
    if not report.passed:
        raise VerificationError(_what_failed(report), _how_to_mend(report, half, keep))
    place = folder / "onnx" / half.value
    with replacing(place) as temporary:
        for number, (name, proto) in enumerate(protos.items()):
            progress(f"{half.value} {name}", number, len(protos))
            lowered = lower(proto, half, plans[name]).SerializeToString(deterministic=True)
            (temporary / f"{name}.onnx").write_bytes(lowered)
    graphs = {
        name: record_of(folder, place / f"{name}.onnx", manifest.graphs[name], half, plans[name])
        for name in protos
    }
    precisions = {**manifest.precisions, half.value: graphs}
    return msgspec.structs.replace(manifest, precisions=precisions), report


@dataclass(frozen=True)
class Run:
    """Logits `[exits, rows, labels]`, and by graph and node the largest |x| before rounding."""

    logits: NDArray[np.float32]
    abs_max: dict[str, dict[str, float]]


class Emulation:
    """Runs the chain through ONNX Runtime with every rounding in place."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        protos: dict[str, Any],
        half: Half,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._protos = protos
        self._half = half
        self._progress = progress

    @property
    def exact(self) -> dict[str, Lowering]:
        """Plans that lower nothing."""
        return {name: Lowering(frozenset(), frozenset()) for name in self._protos}

    def run(self, rows: Sequence[EncodedRow], plans: dict[str, Lowering]) -> Run:
        """Logits of every exit, and the largest |x| of every node before rounding."""
        from ...runtime.backends.stepping import steps

        calls = sum(len(segment.calls) for segment in self._manifest.segments)
        batches = padded_batches(rows, padding_values(self._manifest.tokenizer), _BATCH)
        worst: dict[str, dict[str, float]] = {}
        logits: dict[int, list[NDArray[np.float32]]] = {}
        for step in steps(self._manifest, batches, lambda name: self._session(name, plans[name])):
            if step.batch == 0:
                self._progress(f"check {self._half.value}", step.call, calls)
            graph_worst = worst.setdefault(step.graph, {})
            for output, value in step.outputs.items():
                if output.startswith(ABS_MAX):
                    node = output.removeprefix(ABS_MAX)
                    # Unlike max(), keeps NaN.
                    graph_worst[node] = float(np.maximum(graph_worst.get(node, 0.0), value))
            if LOGITS in step.outputs:
                logits.setdefault(step.call, []).append(step.outputs[LOGITS])
        return Run(np.stack([np.concatenate(part) for part in logits.values()]), worst)

    def _session(self, name: str, chosen: Lowering) -> Any:
        import onnxruntime as ort

        from ...runtime.backends.onnxruntime_session import cpu_session, session_options

        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = emulate(self._protos[name], self._half, chosen)
        return cpu_session(proto.SerializeToString(), options)


def _resolve(keep: Sequence[str], protos: dict[str, Any]) -> dict[str, set[str]]:
    kept: dict[str, set[str]] = {name: set() for name in protos}
    for goal in keep:
        if goal == AUTO:
            continue
        graph, _, node = goal.rpartition(":")
        names = {
            name
            for name, proto in protos.items()
            if graph in ("", name) and node in _names_of(proto)
        }
        if not names:
            example = next(iter(protos.values())).graph.node[-1].name
            raise VerificationError(
                f"--keep-fp32 {goal}: no graph has such a node or tensor",
                f"names look like segment_01:{example}; or give auto",
            )
        for name in names:
            kept[name].add(node)
    return kept


def _names_of(proto: Any) -> set[str]:
    ends = (*proto.graph.input, *proto.graph.output)
    return {node.name for node in proto.graph.node} | {v.name.removeprefix(NEXT) for v in ends}


def _too_large(
    protos: dict[str, Any], abs_max: dict[str, dict[str, float]], half: Half
) -> dict[str, set[str]]:
    """Nodes that make or read values beyond half the format's range, and such tensors."""
    limit = half.largest / 2
    large: dict[str, set[str]] = {}
    carried: set[str] = set()
    for name, proto in protos.items():
        values = {
            output
            for node in proto.graph.node
            if abs_max[name].get(node.name, 0.0) > limit
            for output in node.output
        } | {tensor.name for tensor in proto.graph.initializer if largest_weight(tensor) > limit}
        carried |= {v.name.removeprefix(NEXT) for v in proto.graph.output if v.name in values}
        large[name] = {
            node.name
            for node in proto.graph.node
            if values.intersection((*node.input, *node.output))
        }
    # A tensor between two graphs has one type, and what reads it must be able to hold it.
    for name, proto in protos.items():
        large[name] |= carried
        large[name] |= {n.name for n in proto.graph.node if carried.intersection(n.input)}
    return large


def report_of(
    manifest: Manifest,
    precision: str,
    rule: ExitRule,
    found: Run,
    expected: NDArray[np.float32],
    plans: dict[str, Lowering],
    half: Half,
) -> PrecisionReport:
    """What an emulation says of a precision, whose floats are in `half`."""
    overflows = tuple(
        f"{name}:{node}"
        for name, nodes in found.abs_max.items()
        for node, value in nodes.items()
        if node in plans[name].nodes and not value <= half.largest
    )
    worst = {name: max(nodes.items(), key=_size) for name, nodes in found.abs_max.items()}
    return PrecisionReport(
        precision=precision,
        rows=expected.shape[1],
        kept=(),
        max_abs=worst,
        overflows=overflows,
        agreement=compare(found.logits, expected, rule, manifest.task, BARS[precision]),
    )


def _size(item: tuple[str, float]) -> float:
    return np.inf if np.isnan(item[1]) else item[1]


def _what_failed(report: PrecisionReport) -> str:
    if report.overflows:
        first = report.overflows[0]
        graph, node = first.split(":", 1)
        more = len(report.overflows) - 1
        return (
            f"{report.precision} overflows first in {graph} at {node}"
            + (f" and then at {more} more nodes" if more else "")
            + f" (largest value seen: {report.max_abs[graph][1]:.3g})"
        )
    return (
        f"{report.precision} changes answers from segment {report.agreement.first_bad_exit} on: "
        f"{report.agreement} of {report.rows} texts"
    )


def _how_to_mend(report: PrecisionReport, half: Half, keep: Collection[str]) -> str:
    if report.overflows and AUTO not in keep:
        return f"keep what overflows in fp32: --keep-fp32 {AUTO}"
    if half is Half.FP16:
        return "try --bf16, or name nodes to keep with --keep-fp32"
    return "stay with fp32, or name nodes to keep with --keep-fp32"


def record_of(folder: Path, path: Path, graph: Graph, half: Half, chosen: Lowering) -> Graph:
    """The record of a lowered graph.

    Args:
        folder: the engines folder.
        path: the file that was written.
        graph: the record in fp32.
        half: the format.
        chosen: what was lowered.
    """

    def specs(old: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        dtype = "float16" if half is Half.FP16 else "bfloat16"
        return tuple(
            msgspec.structs.replace(spec, dtype=dtype) if spec.name in chosen.tensors else spec
            for spec in old
        )

    return Graph(
        file=path.relative_to(folder).as_posix(),
        sha256=sha256_of(path),
        inputs=specs(graph.inputs),
        outputs=specs(graph.outputs),
    )
