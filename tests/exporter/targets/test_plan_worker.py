"""Plans that Polygraphy really builds, with TensorRT for RTX, and the timings that builds share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from fpabee.exporter.targets.backends import RTX, TENSORRT
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.exporter.targets.plans import PlanOptions
from fpabee.exporter.targets.tensorrt import build_target
from fpabee.exporter.targets.worker import run_worker
from fpabee.runtime import read_manifest
from fpabee.runtime.progress import silent

from ...doubles.device import Double

SMALL = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32), compute_capabilities=("8.6", "12.0"))
AS_RTX = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
SEGMENTS = ["segment_01", "segment_02", "segment_03"]


def graph(path: Path, operator: str) -> str:
    x, y = (helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy")
    made = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), path)
    return str(path)


def request(folder: Path, onnx: str, options: PlanOptions = SMALL) -> PlanRequest:
    return PlanRequest(
        onnx=onnx,
        plan=str(folder / "x.plan"),
        timing_cache=str(folder / "timing.cache"),
        profiles=[{"x": [(1, 4), (2, 4), (4, 4)]}, {"x": [(5, 4), (6, 4), (7, 4)]}],
        options=options,
    )


def needs_rtx() -> None:
    for package in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_a_plan_is_built_in_another_process(tmp_path: Path) -> None:
    needs_rtx()
    wanted = request(tmp_path, graph(tmp_path / "x.onnx", "Relu"))
    assert run_worker("plan_worker", wanted, **AS_RTX) == ""
    assert Path(wanted.plan).stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir() if path.name != "x.onnx"] == ["x.plan"]


def test_the_library_says_why_a_graph_cannot_be_built(tmp_path: Path) -> None:
    needs_rtx()
    wanted = request(tmp_path, graph(tmp_path / "x.onnx", "NoSuchOperator"))
    assert "operator: NoSuchOperator" in run_worker("plan_worker", wanted, **AS_RTX)
    assert not Path(wanted.plan).exists()


def test_a_worker_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, run = request(tmp_path, "x"), subprocess.run
    for code, says in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "when memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "ended with code -15"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ):
        command = [sys.executable, "-c", code]
        with monkeypatch.context() as patch:
            patch.setattr(
                subprocess, "run", lambda _, command=command, **others: run(command, **others)
            )
            assert says in run_worker("plan_worker", wanted)


# TensorRT has no build for machines without a GPU, so the other library stands for it.
_PROGRAM = """
import os, sys
from pathlib import Path
import tensorrt_rtx as trt
rtx = os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
if not rtx:
    trt.__version__, sys.modules["tensorrt"] = "10.3.0", trt
from fpabee.exporter.targets import plan_worker
from tests.exporter.targets.test_plan_worker import SMALL, PlanOptions, request
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


@pytest.mark.parametrize(
    ("backend", "found"), [(RTX, "2 False True 0 NONE 2"), (TENSORRT, "2 False False 0 NONE")]
)
def test_the_settings_reach_the_builder(backend: str, found: str, tmp_path: Path) -> None:
    """Among them: plans of RTX can be captured, fp32 is fp32, and other timings are replaced."""
    needs_rtx()
    onnx = graph(tmp_path / "x.onnx", "Relu")
    mine, cache, plan = (tmp_path / name for name in ("mine", "timing.cache", "x.plan"))
    mine.write_bytes(b"timings of another version")
    for link in (cache, plan):
        link.symlink_to(mine)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, onnx, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == RTX))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert line.removeprefix("FOUND ").startswith(found)
    assert plan.stat().st_size > 1000
    assert not plan.is_symlink()
    assert cache.is_symlink() == (backend == RTX)
    assert mine.read_bytes() == b"timings of another version", "links are not followed"


def test_segments_share_what_was_timed(double: Double) -> None:
    options = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32))
    target = build_target(
        double.folder, read_manifest(double.folder), TENSORRT, "fp32", options, silent
    )
    assert [timed for _, timed in double.builds] == [[], SEGMENTS[:1], SEGMENTS[:2]]
    for wanted, _ in double.builds:
        assert wanted.options.compute_capabilities == ()
        assert len(wanted.profiles) == len(target.profiles) == 2 + 3
    assert target.compute_capabilities == ("8.6",)
