"""Check that a plan is in its precision: a plan that is silently in fp32 must not pass.

The check looks for the weights that differ between this graph and the fp32 graph. TensorRT for RTX
compiles on the device, and until then the plan holds every weight as the graph has it, row by row.
This was found at widths of 128, 384 and 768, in fp16, bf16, int8 and fp32. A plan that does not
contain the bytes of these weights is therefore in another precision. TensorRT may reorder the
weights, because it chooses its kernels when it builds. But it builds on a GPU that can load the
plan, so its engine inspector can name the types of the layers.

The size of a plan shows nothing: besides the weights it holds 1 to 3 MiB, as much as a layer of
width 384 saves in fp16. This module does not use onnx, which devices do not have.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from ...runtime.artifact.graph_content import GRAPH, MODEL
from ...runtime.artifact.manifest import Graph
from ...runtime.artifact.protobuf import values_at
from ...runtime.errors import VerificationError
from .plan_worker import PlanResult

_LAYER_TYPE = re.compile(r'"Format/Datatype":\s*"([^"]*)"')
# How engine inspectors name a precision: by type, or by memory format.
_WRITTEN = {"fp16": ("Half", "FP16"), "bf16": ("BFloat16", "BF16"), "int8": ("Int8", "INT8")}

# Builders may fold smaller weights into other ones.
_LARGE_BYTES = 16 * 2**10
_SAMPLES = 4
# Two weights do not share this many bytes by chance, unless they repeat a few values.
_SAMPLE_BYTES = 32
_LEAST_DISTINCT = 8

_RAW_DATA = 9
_WEIGHTS = (MODEL["graph"], GRAPH["initializer"], _RAW_DATA)


def check_precision(
    plan: Path, graph: Graph, result: PlanResult, precision: str, source: Path, fp32: Path
) -> None:
    """Check the types of a plan's inputs, outputs and layers, or its weights if it shows no layers.

    Args:
        plan: the file.
        graph: the record of the graph that it was built from.
        result: what the builder reported.
        precision: the precision that the plan should be in.
        source: the ONNX file that it was built from.
        fp32: the same graph in fp32.

    Raises:
        VerificationError: the plan is in another precision.
    """
    problem = _wrong_ends(graph, result) or _wrong_weights(plan, result, precision, source, fp32)
    if problem:
        raise VerificationError(f"{plan.name} is not in {precision}: {problem}")


def _wrong_ends(graph: Graph, result: PlanResult) -> str:
    for spec in (*graph.inputs, *graph.outputs):
        found = result.dtypes.get(spec.name)
        if found != spec.dtype:
            return f"its {spec.name} is {found}, not {spec.dtype}"
    return ""


def _wrong_weights(plan: Path, result: PlanResult, precision: str, source: Path, fp32: Path) -> str:
    in_source, in_fp32 = _large_weights(source), _large_weights(fp32)
    # Weights that the graph keeps in fp32 are in both.
    low, full = in_source - in_fp32, in_fp32 - in_source
    if not low:
        return ""
    types = set(_LAYER_TYPE.findall(result.layers))
    if types:
        is_right = any(name in kind for name in _WRITTEN[precision] for kind in types)
        return "" if is_right else f"its layers are {', '.join(sorted(types))}"
    content = plan.read_bytes()
    low_found, full_found = (
        sum(any(sample in content for sample in samples) for samples in weights)
        for weights in (low, full)
    )
    # Half of them suffice: in DeBERTa, builders multiply two matrices of each layer by the scale of
    # the attention.
    if low_found >= len(low) / 2 and not full_found:
        return ""
    return (
        f"of {len(low)} large weights, the plan holds {low_found} as the graph has them and "
        f"{full_found} in fp32"
    )


def _large_weights(file: Path) -> set[tuple[bytes, ...]]:
    """Samples of each large weight of an ONNX file, unless it repeats a few values."""
    with file.open("rb") as opened:
        onnx = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    weights = (weight for weight in values_at(onnx, _WEIGHTS) if len(weight) >= _LARGE_BYTES)
    return {samples for samples in map(_samples, weights) if samples}


def _samples(weight: memoryview) -> tuple[bytes, ...]:
    places = (len(weight) * number // _SAMPLES for number in range(_SAMPLES))
    samples = (bytes(weight[place : place + _SAMPLE_BYTES]) for place in places)
    return tuple(sample for sample in samples if len(set(sample)) >= _LEAST_DISTINCT)
