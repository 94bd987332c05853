"""A plan that is silently in fp32 fails, by its ends, its size, or the types of its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fpabee.exporter.formats import Half
from fpabee.exporter.half import add_half
from fpabee.exporter.targets.options import RTX, PlanOptions
from fpabee.exporter.targets.plan_check import check_precision
from fpabee.exporter.targets.plan_worker import PlanResult
from fpabee.exporter.targets.tensorrt import build_target
from fpabee.runtime import FPabee, VerificationError, read_manifest
from fpabee.runtime.manifest import Graph, TensorSpec

MIB = 2**20
ENDS = {"x": "float16", "logits": "float32"}
GRAPH = Graph(
    file="a.onnx",
    sha256="0" * 64,
    inputs=(TensorSpec(name="x", dtype="float16", shape=("batch", 8)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
)


def check(
    tmp_path: Path, precision: str = "fp16", source: float = 4, fp32: float = 8, **result: object
) -> Path:
    """Check a made-up plan of a graph of 4 MiB in `precision`, 8 MiB in fp32."""
    sizes = {"source.onnx": source, "fp32.onnx": fp32}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(int(size * MIB))
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"plan")
    found = msgspec.convert({"dtypes": ENDS, "size": 4 * MIB} | result, PlanResult)
    source_file, fp32_file = (tmp_path / name for name in sizes)
    check_precision(plan, GRAPH, found, precision, source_file, fp32_file)
    return plan


def layers(*types: str) -> str:
    """What an engine inspector says, as far as it matters."""
    return msgspec.json.encode({"Layers": [{"Format/Datatype": kind} for kind in types]}).decode()


@pytest.mark.parametrize(
    ("precision", "result"),
    [
        ("fp16", {"size": int(5.9 * MIB)}),
        ("fp16", {"size": 7 * MIB, "source": 6.5}),  # nodes are kept in fp32
        ("fp16", {"size": 3 * MIB, "source": 1, "fp32": 2}),  # mostly not weights
        ("fp32", {"size": 9 * MIB}),
        ("fp16", {"layers": layers("Half", "Float")}),
        ("fp16", {"layers": layers("Row major linear FP16 format")}),
        ("bf16", {"layers": layers("BFloat16")}),
        ("int8", {"layers": layers("Int8", "Half")}),
        ("fp16", {"layers": '{"Layers": ["only names"]}'}),
    ],
)
def test_plans_in_their_precision_pass(
    precision: str, result: dict[str, object], tmp_path: Path
) -> None:
    assert check(tmp_path, precision, **result).exists()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "result", "message"),
    [
        ("fp16", {"size": int(6.1 * MIB)}, r"6\.1 MiB, like weights in fp32 \(8\.0 MiB\)"),
        ("int8", {"size": 6 * MIB, "source": 2}, r"not like its graph \(2\.0 MiB\)"),
        ("fp16", {"dtypes": ENDS | {"x": "float32"}}, "its x is float32, not float16"),
        ("fp16", {"dtypes": {"x": "float16"}}, "its logits is None, not float32"),
        ("fp16", {"layers": layers("Float", "Int64")}, "its layers are Float, Int64"),
        ("bf16", {"layers": layers("Half")}, "its layers are Half"),
    ],
)
def test_plans_in_another_precision_fail(
    precision: str, result: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=rf"a\.plan is not in {precision}: .*{message}"):
        check(tmp_path, precision, **result)  # type: ignore[arg-type]
    assert not (tmp_path / "a.plan").exists()


def test_a_real_plan_of_fp32_graphs_is_no_fp16_plan(engine_copy: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = engine_copy()
    manifest, _ = add_half(folder, read_manifest(folder), Half.FP16, FPabee(threshold=0.5))
    files = {
        name: msgspec.structs.replace(
            graph, file=manifest.graphs[name].file, sha256=manifest.graphs[name].sha256
        )
        for name, graph in manifest.precisions["fp16"].items()
    }
    silent = msgspec.structs.replace(manifest, precisions={"fp16": files})
    options = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
    with pytest.raises(VerificationError, match=r"segment_01\.plan is not in fp16: its .* float32"):
        build_target(folder, silent, RTX, "fp16", options)
    assert not list((folder / "targets").rglob("*.plan"))
