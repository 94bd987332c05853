"""A plan that is silently in another precision fails: by its types, its layers, or its weights."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fpabee.exporter import export
from fpabee.exporter.precision.float16 import add_fp16
from fpabee.exporter.precision.int8 import add_int8
from fpabee.exporter.targets.options import RTX, PlanOptions
from fpabee.exporter.targets.plan_check import check_precision
from fpabee.exporter.targets.plan_worker import PlanResult
from fpabee.exporter.targets.tensorrt import build_target
from fpabee.runtime import VerificationError, read_manifest
from fpabee.runtime.artifact.manifest import Graph, TensorSpec

from ...conftest import WORDS, make_model

ENDS = {"x": "float16", "logits": "float32"}
GRAPH = Graph(
    file="a.onnx",
    sha256="0" * 64,
    inputs=(TensorSpec(name="x", dtype="float16", shape=("batch", 8)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
)
SMALL = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
FULL = [np.random.default_rng(n).normal(size=(128, 96)).astype(np.float32) for n in range(4)]
LOW = [weight.astype(np.float16) for weight in FULL]


def write_graph(path: Path, weights: list[NDArray[np.generic]]) -> Path:
    """An ONNX file with nothing but these weights."""
    tensors = [numpy_helper.from_array(weight, f"w{n}") for n, weight in enumerate(weights)]
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], tensors)), path)
    return path


def check(
    folder: Path,
    stored: list[NDArray[np.generic]],
    source: list[NDArray[np.generic]],
    precision: str = "fp16",
    **result: object,
) -> Path:
    """Check a made-up plan with some weights against a graph with others."""
    plan = folder / "a.plan"
    plan.write_bytes(b"code" + b"".join(weight.tobytes() for weight in stored) + bytes(3 * 2**20))
    found = msgspec.convert({"dtypes": ENDS} | result, PlanResult)
    graphs = [write_graph(folder / "low.onnx", source), write_graph(folder / "full.onnx", [*FULL])]
    check_precision(plan, GRAPH, found, precision, *graphs)
    return plan


def layers(*types: str) -> str:
    """The relevant part of what an engine inspector says."""
    return msgspec.json.encode({"Layers": [{"Format/Datatype": kind} for kind in types]}).decode()


@pytest.mark.parametrize(
    ("stored", "source"),
    [
        (LOW, LOW),
        ([np.concatenate(LOW, axis=1)], LOW),  # merged, as queries, keys and values are
        (LOW[:2], LOW),  # others are folded
        ([*LOW[:1], *FULL[1:]], [*LOW[:1], *FULL[1:]]),  # some are kept in fp32
        (FULL, FULL),
        ([], [np.zeros((128, 96), np.float16), *(weight[:60] for weight in LOW)]),
    ],
)
def test_plans_with_the_weights_of_their_graph_pass(
    stored: list[NDArray[np.generic]], source: list[NDArray[np.generic]], tmp_path: Path
) -> None:
    assert check(tmp_path, stored, source).exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (FULL, "of 4 large weights, the plan holds 0 as the graph has them and 4 in fp32"),
        ([*LOW[:3], FULL[3]], "holds 3 as the graph has them and 1 in fp32"),
        ([weight.astype(np.float32) for weight in LOW], "holds 0 as the graph has them and 0 in"),
        (LOW[:1], "holds 1 as the graph has them and 0 in fp32"),
    ],
)
def test_plans_with_other_weights_fail(
    stored: list[NDArray[np.generic]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=rf"a\.plan is not in fp16: .*{message}"):
        check(tmp_path, stored, [*LOW])


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [
        ("fp16", ("Row major linear FP16 format",)),
        ("int8", ("Int8", "Half")),
    ],
)
def test_the_inspector_decides_if_it_says_anything(
    precision: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    assert check(tmp_path, [], [*LOW], precision, layers=layers(*kinds)).exists()


@pytest.mark.parametrize(
    ("precision", "result", "message"),
    [
        ("fp16", {"dtypes": ENDS | {"x": "float32"}}, "its x is float32, not float16"),
        ("fp16", {"dtypes": {"x": "float16"}}, "its logits is None, not float32"),
        ("fp16", {"layers": layers("Float", "Int64")}, "its layers are Float, Int64"),
    ],
)
def test_types_and_layers_of_another_precision_fail(
    precision: str, result: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=rf"a\.plan is not in {precision}: {message}"):
        check(tmp_path, [*LOW], [*LOW], precision, **result)


def test_a_graph_without_lowered_weights_may_have_fp32_layers(tmp_path: Path) -> None:
    """For example the heads of ALBERT, which are separate graphs."""
    assert check(tmp_path, [], [*FULL], "int8", layers=layers("Float")).exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 384, 768])
def test_real_plans_are_in_their_own_precision_and_in_no_other(width: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = make_model("bert", tmp_path / "model", width, layers=2, intermediate_size=4 * width)
    folder = export(model, tmp_path / "engines").folder
    manifest = read_manifest(folder)
    manifest, _ = add_fp16(folder, manifest)
    texts = [f"{first} {second}" for first in WORDS[:8] for second in WORDS[-8:]]
    manifest, _ = add_int8(folder, manifest, texts)
    plans = {}
    for precision in ("fp32", "fp16", "int8"):
        manifest, target = build_target(folder, manifest, RTX, precision, SMALL)
        plans[precision] = folder / "targets" / target / "segment_02.plan"
    presented = tmp_path / "segment_02.plan"
    for precision, graphs in manifest.precisions.items():
        graph = graphs["segment_02"]
        ends = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
        onnx_files = folder / graph.file, folder / manifest.graphs["segment_02"].file
        for built_in, plan in plans.items():
            if built_in == precision:
                continue
            presented.write_bytes(plan.read_bytes())
            count = 6 if built_in == "fp32" else 0
            message = f"is not in {precision}: .* holds 0 as the graph has them and {count} in fp32"
            with pytest.raises(VerificationError, match=message):
                check_precision(presented, graph, PlanResult(dtypes=ends), precision, *onnx_files)
