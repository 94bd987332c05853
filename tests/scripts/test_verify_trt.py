"""Polygraphy builds plans of our graphs without a GPU, and the errors of the script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.exporter.precision.float16 import add_half
from fpabee.exporter.precision.formats import Half
from fpabee.runtime import FPabee, read_manifest

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_trt.py"

BUILD = """
import sys
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import Profile, engine_bytes_from_network, network_from_onnx_path
profile = Profile()
for name, low, high in (
    ("hidden_states", (1, 8, 32), (4, 32, 32)),
    ("attention_bias", (1, 1, 1, 8), (4, 1, 1, 32)),
    ("token_weights", (1, 1, 8), (4, 1, 32)),
):
    profile.add(name, low, low, high)
config = CreateConfigRTX(profiles=[profile], compute_capabilities=[(8, 6)])
plan = engine_bytes_from_network(
    network_from_onnx_path(sys.argv[1], strongly_typed=True), config=config
)
print(len(bytes(plan)))
"""


def test_polygraphy_builds_a_plan_of_a_segment(engine_copy: Callable[..., Path]) -> None:
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = engine_copy()
    manifest, _ = add_half(folder, read_manifest(folder), Half.FP16, FPabee(threshold=0.5))
    graph = folder / manifest.graphs_in("fp16")["segment_02"].file
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(graph)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10_000


def test_a_target_that_has_no_plans_is_a_usage_error(engine_copy: Callable[..., Path]) -> None:
    command = [sys.executable, str(SCRIPT), str(engine_copy()), "--target", "onnxruntime-fp32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "onnxruntime-fp32" in done.stderr
