"""Plans of TensorRT for RTX are really built here; what surrounds a build runs over a double."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
from msgspec import UNSET
from onnx import helper

from fpabee.calibration.progress import Progress, silent
from fpabee.exporter.targets import build_targets, builders, tensorrt
from fpabee.exporter.targets.backends import RTX, TENSORRT
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.exporter.targets.plans import (
    RTX_CAPABILITIES,
    PlanOptions,
    batch_sizes_of,
    fitted,
    profiles_of,
    sequence_lengths_of,
)
from fpabee.exporter.targets.worker import run_worker
from fpabee.runtime import ArtifactError, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.machine import CudaDevice

from ...bad_input.cases import corrected, with_loop
from ...doubles.device import GPU, Double, offer_fp32_plans
from ...programs import python, spy

SMALL = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32), compute_capabilities=("8.6", "12.0"))
SEGMENTS = ["segment_01", "segment_02", "segment_03"]


def build(
    folder: Path,
    name: str = "tensorrt-fp32",
    plans: PlanOptions = SMALL,
    progress: Progress = silent,
) -> Target:
    """Build a target, which must succeed."""
    result = build_targets(folder, [name], plans=plans, progress=progress)
    assert result.refused == {}
    (added,) = result.added
    return result.manifest.targets[added]


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_fp32_plans(monkeypatch)


SLOW = [
    *((family, "fp16", RTX_CAPABILITIES) for family in ("bert", "albert", "mpnet", "deberta-v2")),
    ("bert", "fp32", ("8.6",)),
]


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("family", "precision", "capabilities"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_every_graph_becomes_one_rtx_plan(
    family: str, precision: str, capabilities: tuple[str, ...], engine_copy: Callable[..., Path]
) -> None:
    folder = engine_copy(family)
    seen: list[tuple[int, int]] = []

    def note(what: str, *state: int) -> None:
        if what.startswith(RTX):
            seen.append((state[0], state[1]))

    options = dataclasses.replace(SMALL, compute_capabilities=capabilities)
    target = build(folder, f"{RTX}-{precision}", options, note)
    graphs = read_manifest(folder).graphs_in(precision)
    assert target.files.keys() == graphs.keys()
    for graph, file in target.files.items():
        assert (folder / file.file).stat().st_size > 1000
        assert sha256_of(folder / file.file) == file.sha256
        assert file.onnx_sha256 == graphs[graph].sha256
    assert seen == [(number, len(graphs)) for number in range(len(graphs) + 1)]
    assert (target.compute_capabilities, target.tolerance) == (capabilities, None)
    assert target.built_on is UNSET, "it was built for more GPUs"
    assert [(p.sequence.min, p.sequence.max) for p in target.profiles] == [(8, 16), (17, 32)]
    assert target.batch_sizes == (1, 4)
    assert target.sequence_lengths == (8, 16, 32)
    assert next(iter(target.files.values())).file.startswith(f"targets/tensorrt-rtx-{precision}/")


def test_a_graph_with_control_flow_reaches_no_builder(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrected("onnx/fp32/segment_01.onnx", with_loop)(double.folder)
    build_plan = spy(monkeypatch, tensorrt, "run_worker")
    result = build_targets(double.folder, ["tensorrt-fp32"], plans=SMALL)
    refused = result.refused["tensorrt-fp32"]
    assert isinstance(refused, ArtifactError)
    assert re.search(r"segment_01\.onnx uses op_type 'Loop'", str(refused))
    build_plan.assert_not_called()


def test_shapes_end_where_the_model_ends(engines: Mapping[str, Path]) -> None:
    manifest = read_manifest(engines["bert"])
    options = fitted(dataclasses.replace(SMALL, sequence=(16, 128, 512)), manifest, RTX)
    assert sequence_lengths_of(options)[-1] == manifest.tokenizer.max_length == 64
    assert [p.sequence.max for p in profiles_of(options)] == [64]
    ranges = [p.sequence for p in profiles_of(SMALL)]
    assert [(each.min, each.max) for each in ranges] == [(8, 16), (17, 32)]


@pytest.mark.parametrize(
    ("batch", "sequence", "batches", "lengths"),
    [
        ((1, 8, 32), (16, 64, 128), (1, 4, 16, 32), (16, 32, 64, 128)),
        ((1, 1, 1), (64, 64, 64), (1,), (64,)),
        ((2, 4, 8), (1, 48, 100), (2, 8), (8, 16, 32, 48, 64, 100)),
        ((1, 4, 8), (1, 4, 20), (1, 4, 8), (4, 8, 16, 20)),
    ],
)
def test_there_are_few_shapes_to_prepare(
    batch: tuple[int, int, int],
    sequence: tuple[int, int, int],
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
) -> None:
    options = PlanOptions(batch, sequence)
    assert batch_sizes_of(options) == batches
    assert sequence_lengths_of(options) == lengths


def test_tensorrt_needs_packages_and_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, object] = {}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    monkeypatch.setattr(builders, "cuda_device", lambda: CudaDevice(error="there is no GPU"))
    for module, says in (
        ("tensorrt", r"pip install .*\[tensorrt-cu13\]'"),
        ("polygraphy", "pip install polygraphy"),
        ("", r"builds on the GPU.*there is no GPU.*on the device"),
    ):
        assert re.search(says, str(builders.BUILDERS["tensorrt-fp16"].why_not()))
        found[module] = object()


def request(folder: Path, onnx: str, options: PlanOptions = SMALL) -> PlanRequest:
    return PlanRequest(
        onnx=onnx,
        plan=str(folder / "new" / "x.plan"),
        timing_cache=str(folder / "timing.cache"),
        profiles=[{"x": [(1, 4), (2, 4), (4, 4)]}, {"x": [(5, 4), (6, 4), (7, 4)]}],
        compute_capabilities=options.compute_capabilities,
    )


def test_a_worker_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(tmp_path, "x")
    run = subprocess.run
    for code, says in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "when memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "ended with code -15"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("print('[E] no importer\\nand more'); exit(1)", "no importer"),
        ("print('[E] no memory\\n[V] ...\\n[E] no plan'); exit(1)", "no memory; no plan"),
    ):
        command = [sys.executable, "-c", code]
        with monkeypatch.context() as patch:
            patch.setattr(
                subprocess, "run", lambda _, command=command, **others: run(command, **others)
            )
            assert run_worker("plan_worker", wanted).endswith(says)


# TensorRT has no build for machines without a GPU, so the other library stands for it.
_PROGRAM = """
import os, sys
from pathlib import Path
import tensorrt_rtx as trt
rtx = os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
if not rtx:
    trt.__version__, sys.modules["tensorrt"] = "10.3.0", trt
from fpabee.exporter.targets import plan_worker
from tests.exporter.targets.test_tensorrt import SMALL, PlanOptions, request
onnx, folder = sys.argv[1], Path(sys.argv[2])
options = SMALL if rtx else PlanOptions(compute_capabilities=())
flags = trt.BuilderFlag
builder = trt.Builder.build_serialized_network
def build(self, network, config):
    print("FOUND", config.num_optimization_profiles, config.get_flag(flags.TF32),
          config.get_flag(flags.REQUIRE_USER_ALLOCATION), config.max_aux_streams,
          config.profiling_verbosity.name, config.num_compute_capabilities)
    return builder(self, network, config)
trt.Builder.build_serialized_network = build
plan_worker.build_plan(request(folder, onnx, options))
"""


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("backend", "found"), [(RTX, "2 False True 0 NONE 2"), (TENSORRT, "2 False False 0 NONE")]
)
def test_the_settings_reach_the_builder(backend: str, found: str, tmp_path: Path) -> None:
    """Among them: plans of RTX can be captured, fp32 is fp32, and other timings are replaced."""
    x, y = (helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "x.onnx")
    mine = tmp_path / "mine"
    cache = tmp_path / "timing.cache"
    plan = tmp_path / "new" / "x.plan"
    plan.parent.mkdir()
    mine.write_bytes(b"timings of another version")
    for link in (cache, plan):
        link.symlink_to(mine)
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == RTX))}
    root = Path(__file__).parents[3]
    done = python(_PROGRAM, tmp_path / "x.onnx", tmp_path, cwd=root, env=environment)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert line.removeprefix("FOUND ").startswith(found)
    assert plan.stat().st_size > 1000
    assert not plan.is_symlink()
    assert cache.is_symlink() == (backend == RTX)
    assert mine.read_bytes() == b"timings of another version", "links are not followed"
    assert [path.name for path in plan.parent.iterdir()] == ["x.plan"]


def test_segments_share_what_was_timed(double: Double) -> None:
    options = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32))
    target = build(double.folder, plans=options)
    assert [timed for _, timed in double.builds] == [[], SEGMENTS[:1], SEGMENTS[:2]]
    for wanted, _ in double.builds:
        assert wanted.compute_capabilities == ()
        assert len(wanted.profiles) == len(target.profiles) == 2
    assert target.compute_capabilities == ("8.6",)
    assert target.built_on == GPU.name
