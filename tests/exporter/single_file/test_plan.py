"""A packed graph as a plan: really built by TensorRT for RTX; its graph runs on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from fpabee.commands import pack as pack_command
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.single_file import pack, packing
from fpabee.exporter.targets import fp16
from fpabee.exporter.targets.plans import PlanOptions
from fpabee.runtime import (
    Budget,
    Confidence,
    Energy,
    Engine,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    ModelError,
    Pabee,
    Pcee,
)
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.backends.onnxruntime import session_options

from ...doubles.device import GPU, offer_fp32_plans, serve
from ...programs import program, python
from .conftest import FP32, PAIRS, SINGLE
from .consumer import Consumer
from .test_packing import assert_equal

ROOT = Path(__file__).parents[3]
RTX = "tensorrt-rtx-fp32"
RTX_FP16 = "tensorrt-rtx-fp16"
SMALL = PlanOptions(batch=(1, 2, 64), sequence=(8, 16, 32), compute_capabilities=("8.6", "12.0"))
F_PABEE: list[ExitRule] = [
    FPabee(threshold=0.9, exit_0_threshold=0.9),
    FPabee(threshold=0.7, patience=2),
]
# Two operating points of each rule; those of one plan differ in their settings only.
RULES: dict[str, list[ExitRule]] = {
    "fpabee": F_PABEE,
    "pabee": [Pabee(patience=1, exit_0_threshold=0.8), Pabee(patience=2, min_exit=1)],
    "entropy": [Entropy(threshold=0.3), Entropy(threshold=0.6, max_exit=2)],
    "confidence": [
        Confidence(threshold=(0.7, 0.6, 0.5), exit_0_threshold=0.9),
        Confidence(threshold=0.4),
    ],
    "energy": [Energy(threshold=0.1, exit_0_threshold=0.5), Energy(threshold=0.05)],
    "pcee": [Pcee(threshold=0.6, patience=2), Pcee(threshold=0.5)],
    "epee": [Epee(threshold=0.5, patience=1), Epee(threshold=0.3, patience=2)],
    "budget": [Budget(exit=1), Budget(exit=3)],
    "decisions": [
        Confidence(threshold=0.9, label_thresholds=(0.4, 1), exit_0_threshold=0.9),
        Confidence(threshold=0.6, label_thresholds=(0.7, 1)),
    ],
}


PackedPlan = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def packed_plan(
    rtx: None,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> PackedPlan:
    """Builds a plan for a copy of the engines folder of a family, with operating points."""
    offer_fp32_plans(monkeypatch)
    monkeypatch.setattr(packing, "_PLANS", [RTX, RTX_FP16])

    def make(
        family: str, rules: list[ExitRule], target: str = RTX, exit_0: bool = True
    ) -> tuple[Path, dict[str, Any]]:
        folder = engine_copy(family, exit_0=exit_0)
        if not exit_0:
            rules = [msgspec.structs.replace(rule, exit_0_threshold=None) for rule in rules]
        points = {f"point-{number}": rule for number, rule in enumerate(rules)}
        set_points(folder, FP32, "point-0", other=Entropy(threshold=0.123), **points)
        made = pack(folder, tmp_path / "plan", target, "point-0", plans=SMALL)
        assert made.file == tmp_path / "plan" / "model.plan"
        return folder, json.loads((tmp_path / "plan" / "fpabee.json").read_text())

    return make


def settings_of(description: dict[str, Any], point: str) -> dict[str, Any]:
    """What an application gives to the plan for an operating point."""
    settings = description["operating_points"][point]["settings"]
    return {
        each["name"]: np.array(settings[each["name"]], each["dtype"])
        for each in description["plan"]["inputs"]
        if each["name"].startswith("fpabee.")
    }


@pytest.mark.parametrize(("name", "exit_0"), [*((name, True) for name in RULES), ("fpabee", False)])
def test_a_plan_serves_every_operating_point_of_its_rule(
    name: str, exit_0: bool, packed_plan: PackedPlan, tmp_path: Path
) -> None:
    family = "distilbert" if name == "decisions" else "bert"
    folder, description = packed_plan(family, RULES[name], exit_0=exit_0)
    same = {"point-0", "point-1"} | ({"other"} if name == "entropy" else set())
    assert description["operating_points"].keys() == same
    assert description["measured_on"] == FP32
    # Without exit 0, a patience of two needs all three exits.
    least_exits = 2 if exit_0 and name != "budget" else 1
    for point in ("point-0", "point-1"):
        consumer = Consumer(tmp_path / "plan", settings_of(description, point))
        with Engine.load(folder, FP32, point) as engine:
            for texts in (SINGLE, PAIRS):
                answers = consumer.in_batches(consumer.onnxruntime, texts, 32, padding=2)
                assert_equal(engine, texts, answers, least_exits)


def test_a_plan_of_tensorrt_names_the_gpu_that_built_it(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_PLANS", ["tensorrt-fp32"])
    folder = serve(monkeypatch, engine_copy()).folder
    pack(folder, tmp_path / "plan", "tensorrt-fp32", plans=SMALL)
    plan = json.loads((tmp_path / "plan" / "fpabee.json").read_text())["plan"]
    assert (plan["compute_capabilities"], plan["built_on"]) == ([GPU.compute_capability], GPU.name)


@pytest.mark.parametrize(
    "family",
    [
        family if family == "mpnet" else pytest.param(family, marks=pytest.mark.slow)
        for family in _FAMILIES
    ],
)
def test_fp16_plans_of_every_family(family: str, packed_plan: PackedPlan, tmp_path: Path) -> None:
    """Their graphs are checked against the segments as they are packed."""
    _, description = packed_plan(family, F_PABEE, RTX_FP16)
    folder = tmp_path / "plan"
    plan = description["plan"]
    assert plan["sha256"] == sha256_of(folder / plan["file"])
    assert plan["onnx_sha256"] == sha256_of(folder / plan["onnx"])
    assert plan["versions"].keys() == {"tensorrt_rtx"}
    assert plan["compute_capabilities"] == ["8.6", "12.0"]
    assert "built_on" not in plan
    assert plan["shapes"]["sequence"] == {"min": 8, "opt": 16, "max": 32}
    outputs = {each["name"]: (each["dtype"], each["shape"][0]) for each in plan["outputs"]}
    assert outputs == {"logits": ("float32", "batch"), "exit": ("int64", "batch")}
    card = (folder / "README.md").read_text()
    assert "Nothing is promised on a GPU" in card
    (again,) = re.findall("^fpabee-pack (.*)$", card, re.M)
    options = pack_command.main.make_context("fpabee-pack", shlex.split(again)).params
    assert options["target"] == RTX_FP16
    assert (options["batch"], options["sequence"]) == (SMALL.batch, SMALL.sequence)
    weights = {each.data_type for each in onnx.load(folder / plan["onnx"]).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in weights


@pytest.mark.parametrize("target", [FP32, RTX_FP16])
def test_packing_needs_only_the_extra_for_graphs(
    target: str, engine_copy: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A Jetson packs a plan without PyTorch."""
    if target == RTX_FP16:
        request.getfixturevalue("rtx")
    lacking = ("torch", "transformers", "safetensors", "nncf", "openvino", "jinja2", "sklearn")
    command = (
        "import sys\n"
        f"for name in {lacking}: sys.modules[name] = None\n"
        "from fpabee.commands.pack import main\n"
        "main()"
    )
    arguments = [engine_copy(exit_0=True), "-o", tmp_path / "packed", "--target", target]
    assert f"MiB of {target}\n" in python(command, *arguments).stdout


def test_a_skipped_branch_gives_the_same_shapes(packed_plan: PackedPlan, tmp_path: Path) -> None:
    _, description = packed_plan("bert", [FPabee(threshold=10.0, exit_0_threshold=0.0)])
    consumer = Consumer(tmp_path / "plan", settings_of(description, "point-0"))
    model = onnx.load(consumer.model)
    names = [f"after_exit_{number:02d}/hidden_states" for number in (1, 2)]
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    inputs = consumer.inputs(SINGLE[:9])
    _, exits, *states = session.run(None, inputs)
    assert not exits.any(), "all rows stop before the first segment"
    assert {each.shape[:2] for each in states} == {inputs["input_ids"].shape}


@pytest.mark.usefixtures("rtx")
def test_fp16_that_overflows_is_not_packed(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp16, "_LARGEST", 1e-3)
    with pytest.raises(ModelError, match="more than fp16 can represent"):
        pack(engine_copy("bert"), tmp_path / "plan", RTX_FP16)
    assert not (tmp_path / "plan").exists()


def test_a_plan_jumps_at_each_exit(packed_plan: PackedPlan, tmp_path: Path) -> None:
    """Its program, which a detailed plan holds as text, has a conditional jump for each `If`."""
    packed_plan("bert", F_PABEE)
    trt: Any = importlib.import_module("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse_from_file(str(tmp_path / "plan" / "model.onnx"))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        each = network.get_input(number)
        if -1 in each.shape:
            profile.set_shape(each.name, (1, 8), (2, 16), (4, 32))
    config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    jumps = re.findall(rb"cjmp=\{[^}]*\{[^}]*\}[^}]*\{[^}]*\}[^}]*node_If_(\d+)\]", plan)
    assert sorted(jumps) == [b"0", b"1", b"2"]


EXAMPLE = ROOT / "docs" / "examples" / "classify_trt.cpp"
needs_headers = pytest.mark.skipif(
    "TENSORRT_INCLUDE" not in os.environ,
    reason="TENSORRT_INCLUDE names no folders with headers of TensorRT, CUDA and nlohmann-json",
)


def compile_example(output: Path, *flags: str) -> None:
    folders = [f"-isystem{each}" for each in os.environ["TENSORRT_INCLUDE"].split(os.pathsep)]
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", *flags)
    subprocess.run(["g++", *flags, *folders, str(EXAMPLE), "-o", str(output)], check=True)


@needs_headers
def test_the_example_in_cpp_compiles(tmp_path: Path) -> None:
    compile_example(tmp_path / "classify_trt.o", "-c")


# Four texts, whose sums and lengths are the answers of the double.
LINES = ["1 2", "2 2 1", " ".join(["1"] * 20), "7"]
ANSWERS = ["0 from exit 4", "2 from exit 5", "2 from exit 22", "1 from exit 3"]


Classify = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def classify(tmp_path: Path) -> Classify:
    """Runs the example with doubles of TensorRT and CUDA, on a plan for two rows of 24 tokens."""
    tokens = [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]}
        for name in ("input_ids", "attention_mask")
    ]
    plan = {
        "file": "model.plan",
        "versions": {"tensorrt": "10.3.0.30"},
        "compute_capabilities": ["8.7"],
        "shapes": {"batch": {"min": 2, "max": 2}, "sequence": {"min": 8, "max": 24}},
        "inputs": [*tokens, {"name": "fpabee.patience", "dtype": "int32", "shape": []}],
    }
    (tmp_path / "model.plan").write_bytes(b"plan")

    def run(
        lines: list[str], *flags: str, size: int = 64, code: int = 0, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        description = {"plan": {**plan, **changes}, "settings": {"fpabee.patience": 2}}
        (tmp_path / "fpabee.json").write_text(json.dumps(description))
        example = tmp_path / "-".join(["classify_trt", *flags])
        if not example.exists():
            compile_example(example, f"-I{ROOT / 'tests' / 'doubles' / 'cpp'}", *flags)
        given = "".join(f"{line}\n" for line in lines)
        environment = {**os.environ, "SIZE": str(size)}
        return program(example, tmp_path, code=code, input=given, env=environment)

    return run


@needs_headers
def test_the_example_in_cpp_runs_any_number_of_lines_in_batches(
    classify: Classify,
) -> None:
    done = classify(LINES * 3 + LINES[:1], built_on="Double, 8 multiprocessors")
    assert done.stdout.splitlines() == ANSWERS * 3 + ANSWERS[:1]
    steps = done.stderr.splitlines()
    # Two inputs, a setting, two outputs and the context; the longer rows need larger inputs.
    assert steps.count("cudaMalloc") == 6 + 2
    assert [each for each in steps if each != "cudaMalloc"] == [
        *["ran 2 x 16", "ran 2 x 24"] * 3,
        "ran 2 x 16",
    ]


@needs_headers
def test_the_example_in_cpp_keeps_what_rtx_compiled(classify: Classify, tmp_path: Path) -> None:
    cache = tmp_path / "model.plan.cache"
    for lines, shapes in ((LINES[:2], "2x16 "), (LINES[2:], "2x16 2x24 ")):
        classify(lines, "-DTRT_MAJOR_RTX=1")
        assert cache.read_text() == shapes
    before = cache.stat().st_mtime_ns
    assert classify(LINES, "-DTRT_MAJOR_RTX=1").stdout.splitlines() == ANSWERS
    assert cache.stat().st_mtime_ns == before, "nothing was compiled"


@needs_headers
def test_the_example_in_cpp_says_what_is_wrong(
    classify: Classify,
) -> None:
    assert classify(LINES[:2], code=1, built_on="NVIDIA H100 MIG 1g.10gb").stdout == ""
    done = classify(LINES[:2], built_on="Orin Nano")
    assert len(done.stdout.splitlines()) == 2
    assert "was built on Orin Nano, not on Double, 8 multiprocessors" in done.stderr
    for line, problem in (
        (" ".join(["1"] * 25), "line 3 holds 25 token ids, and the plan takes at most 24"),
        ("", "line 3 holds no token ids"),
        ("1 x", "line 3 holds something else than token ids: 1 x"),
    ):
        assert problem in classify([*LINES[:2], line], code=1).stderr
    assert "returned 0" in classify(LINES, code=1, size=0).stderr
