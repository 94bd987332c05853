"""A plan must be in the precision that it was built for: a silently fp32 one must not pass."""

from __future__ import annotations

import re
from pathlib import Path

from ...runtime.errors import VerificationError
from ...runtime.manifest import Graph
from .plan_worker import PlanResult

# Below this a plan is mostly not weights, and its size says nothing of their precision.
_TELLING_BYTES = 4 * 2**20
_LAYER_TYPE = re.compile(r'"Format/Datatype":\s*"([^"]*)"')
# How engine inspectors write a precision: by type, or by memory format.
_WRITTEN = {"fp16": ("Half", "FP16"), "bf16": ("BFloat16", "BF16"), "int8": ("Int8", "INT8")}


def check_precision(
    plan: Path, graph: Graph, result: PlanResult, precision: str, source: Path, fp32: Path
) -> None:
    """Check a plan's inputs and outputs, its size, and where told the types of its layers.

    Args:
        plan: the file; it is deleted if it fails.
        graph: the record of the graph it was built from.
        result: what the builder said.
        precision: what the plan should be in.
        source: the ONNX file it was built from.
        fp32: the same graph in fp32.

    Raises:
        VerificationError: it is not in the precision.
    """
    problem = (
        _wrong_ends(graph, result)
        or _too_large(result.size, precision, source, fp32)
        or _wrong_layers(result.layers, precision)
    )
    if problem:
        plan.unlink()
        raise VerificationError(
            f"{plan.name} is not in {precision}: {problem}",
            "please report this with the versions that fpabee-inspect --env prints",
        )


def _wrong_ends(graph: Graph, result: PlanResult) -> str:
    for spec in (*graph.inputs, *graph.outputs):
        found = result.dtypes.get(spec.name)
        if found != spec.dtype:
            return f"its {spec.name} is {found}, not {spec.dtype}"
    return ""


def _too_large(size: int, precision: str, source: Path, fp32: Path) -> str:
    full, low = fp32.stat().st_size, source.stat().st_size
    # Nearer to the fp32 graph than to its own, of which nodes may be kept in fp32.
    if precision == "fp32" or full < _TELLING_BYTES or size <= (full + low) / 2:
        return ""
    return (
        f"it has {size / 2**20:.1f} MiB, like weights in fp32 ({full / 2**20:.1f} MiB), "
        f"not like its graph ({low / 2**20:.1f} MiB)"
    )


def _wrong_layers(layers: str, precision: str) -> str:
    types = set(_LAYER_TYPE.findall(layers))
    names = _WRITTEN.get(precision, ())
    if not types or not names or any(name in kind for name in names for kind in types):
        return ""
    return f"its layers are {', '.join(sorted(types))}"
