"""Write an engines folder's graphs in fp16 or bf16.

Before, it is checked that the model still gives the same labels and exits in this format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...runtime.artifact.manifest import NEXT, Manifest, TensorSpec
from ...runtime.artifact.reference import read_reference
from ...runtime.encoding import Text, TextEncoder
from ...runtime.errors import Remedy, VerificationError
from ...runtime.progress import Progress, silent
from ..onnx_file import load_graphs, write_graph
from ..staging import replacing
from .emulation import PrecisionReport, report_on, run_emulated
from .formats import Half
from .lowering import LoweredGraphs, Lowering, choose_lowering, largest_weight, lower

AUTO = "auto"


def add_half(
    folder: Path,
    manifest: Manifest,
    half: Half,
    keep_fp32: Sequence[str] = (),
    texts: Sequence[Text] = (),
    progress: Progress = silent,
    *,
    turing: bool = False,
) -> tuple[Manifest, PrecisionReport]:
    """Check a format and write the graphs in it to `onnx/<format>/`.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        half: the format.
        keep_fp32: what stays in fp32: `auto` for all nodes that read or write values beyond half
            of the format's range, or node names, as `GRAPH:NODE` or alone for every graph that
            has such a node.
        texts: more texts to check with than those of `reference.npz`.
        progress: called with (what, done, total).
        turing: check it as plans for compute capability 7.5 compute it, with the matrix products
            of the heads in the format too. The written graphs are the same.

    Returns:
        The manifest with the new graphs, and what was found.

    Raises:
        VerificationError: the format overflows or changes too many labels or exits, or a name in
            `keep_fp32` does not exist.
        ModelError: a weight does not fit the format.
    """
    protos = load_graphs(folder, manifest.graphs)
    known, expected = read_reference(folder, manifest)
    # The reference may hold the same texts already, from the export's own verification.
    more = [text for text in dict.fromkeys(texts) if text not in known]
    rows = TextEncoder(folder, manifest.tokenizer).encode([*known, *more])
    kept = _kept_nodes(keep_fp32, protos)
    if more or AUTO in keep_fp32:
        fp32 = run_emulated(folder, manifest, LoweredGraphs(protos, half), rows, progress)
        expected = np.concatenate([expected, fp32.logits[:, len(known) :]], axis=1)
        if AUTO in keep_fp32:
            for name, names in _too_large(protos, fp32.abs_max, half).items():
                kept[name] |= names
    lowerings = {name: choose_lowering(proto, kept[name], turing) for name, proto in protos.items()}
    checked = LoweredGraphs(protos, half, lowerings)
    found = run_emulated(folder, manifest, checked, rows, progress)
    listed = tuple(f"{name}:{node}" for name, nodes in kept.items() for node in sorted(nodes))
    report = report_on(found, expected, manifest, half.value, checked, listed)
    report.check(_remedy(report, half, keep_fp32))
    lowerings = {name: choose_lowering(proto, kept[name]) for name, proto in protos.items()}
    written = LoweredGraphs(protos, half, lowerings)
    place = f"onnx/{half.value}"
    return with_lowered(folder, manifest, half.value, place, written, progress), report


def with_lowered(
    folder: Path,
    manifest: Manifest,
    precision: str,
    place: str,
    lowered: LoweredGraphs,
    progress: Progress = silent,
) -> Manifest:
    """Write lowered graphs. They replace earlier ones only when all of them are written.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        precision: what the manifest calls them.
        place: their folder in the engines folder.
        lowered: the graphs to lower.
        progress: called with (what, done, total).
    """
    dtype = "float16" if lowered.half is Half.FP16 else "bfloat16"

    def typed(specs: Sequence[TensorSpec], lowering: Lowering) -> list[TensorSpec]:
        return [
            msgspec.structs.replace(spec, dtype=dtype) if spec.name in lowering.tensors else spec
            for spec in specs
        ]

    graphs = {}
    with replacing(folder / place) as temporary:
        for number, (name, proto) in enumerate(lowered.protos.items()):
            progress(f"{precision} {name}", number, len(lowered.protos))
            lowering, exact = lowered.lowering(name), manifest.graphs[name]
            graphs[name] = write_graph(
                temporary / f"{name}.onnx",
                f"{place}/{name}.onnx",
                lower(proto, lowered.half, lowering),
                typed(exact.inputs, lowering),
                typed(exact.outputs, lowering),
            )
    return msgspec.structs.replace(manifest, precisions={**manifest.precisions, precision: graphs})


def _kept_nodes(keep_fp32: Sequence[str], protos: Mapping[str, Any]) -> dict[str, set[str]]:
    """By graph, the nodes and tensors that are named."""
    kept: dict[str, set[str]] = {name: set() for name in protos}
    for asked in keep_fp32:
        if asked == AUTO:
            continue
        graph, _, node = asked.rpartition(":")
        found = [
            name
            for name, proto in protos.items()
            if graph in ("", name) and node in _names_of(proto)
        ]
        if not found:
            example = next(iter(protos.values())).graph.node[-1].name
            raise VerificationError(
                f"{asked!r} cannot be kept in fp32: no graph has such a node or tensor",
                Remedy(
                    "give {keep_fp32} names such as segment_01:{example}, or {auto}",
                    example=example,
                    auto=AUTO,
                ),
            )
        for name in found:
            kept[name].add(node)
    return kept


def _names_of(proto: Any) -> set[str]:
    ends = (*proto.graph.input, *proto.graph.output)
    return {node.name for node in proto.graph.node} | {v.name.removeprefix(NEXT) for v in ends}


def _too_large(
    protos: Mapping[str, Any], abs_max: Mapping[str, Mapping[str, float]], half: Half
) -> dict[str, set[str]]:
    """By graph, the nodes that read or write values beyond half of the format's range.

    Tensors between graphs with such values are included, by name.
    """
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
    # A tensor between two graphs has the same type in both, so its readers stay in fp32 as well.
    for name, proto in protos.items():
        large[name] |= carried
        large[name] |= {n.name for n in proto.graph.node if carried.intersection(n.input)}
    return large


def _remedy(report: PrecisionReport, half: Half, keep_fp32: Sequence[str]) -> Remedy:
    if report.overflows and AUTO not in keep_fp32:
        return Remedy("keep what overflows in fp32: {keep_fp32} {auto}", auto=AUTO)
    other = "use bf16" if half is Half.FP16 else "stay with fp32"
    return Remedy("{other}, or name nodes to keep in fp32 as {keep_fp32}", other=other)
