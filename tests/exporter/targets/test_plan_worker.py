"""The settings of the builder, and the timing cache that builds share, over a double."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter.targets.options import TENSORRT, PlanOptions
from fpabee.exporter.targets.plan_worker import PlanRequest, _configure
from fpabee.exporter.targets.tensorrt import build_target
from fpabee.runtime import BackendError
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Manifest
from fpabee.runtime.backends.tensorrt import error_logger

from ...doubles.device import Double
from ...doubles.tensorrt_builder import FakeBuilder

SMALL = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32))
SEGMENTS = ["segment_01", "segment_02", "segment_03"]


def build(double: Double, options: PlanOptions = SMALL) -> Manifest:
    manifest, double.target = build_target(
        double.folder, read_manifest(double.folder), TENSORRT, "fp32", options
    )
    return manifest


def timing_cache(double: Double) -> Path:
    return double.folder / "targets" / "tensorrt-fp32-sm86" / "timing.cache"


def test_the_settings_reach_the_builder(double: Double) -> None:
    trt = double.trt.__dict__
    options = PlanOptions(
        batch=(1, 2, 4),
        sequence=(8, 16, 32),
        hardware_compatible=True,
    )
    target = build(double, options).targets["tensorrt-fp32-sm86"]
    assert len(double.configs) == 3
    for config in double.configs:
        assert config.hardware_compatibility_level is trt["HardwareCompatibilityLevel"].AMPERE_PLUS
        assert len(config.profiles) == len(target.profiles) == 2 + 3
    assert target.hardware_compatible
    assert target.compute_capabilities == ("8.6",)


def test_settings_are_left_to_the_library_and_segments_share_what_was_timed(double: Double) -> None:
    build(double)
    config = double.configs[0]
    assert (config.flags, config.max_aux_streams) == (set(), 0)
    assert config.hardware_compatibility_level is None
    cache = timing_cache(double)
    assert json.loads(cache.read_bytes()) == ["10.99", SEGMENTS]
    assert [path.name for path in cache.parent.glob("timing*")] == ["timing.cache"]
    seen = [config.cache.timed for config in double.configs if config.cache]
    assert [len(timed) for timed in seen] == [1, 2, 3], "a segment starts from those before it"


@pytest.mark.parametrize("content", [b"no cache at all", b'["10.3.0", ["other"]]'])
def test_an_unusable_cache_is_replaced(content: bytes, double: Double) -> None:
    """It is damaged, or of another version of TensorRT."""
    cache = timing_cache(double)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    build(double)
    assert json.loads(cache.read_bytes()) == ["10.99", SEGMENTS]


def test_a_graph_that_cannot_be_parsed_is_named(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = double.trt.__dict__["OnnxParser"]
    monkeypatch.setattr(parser, "parse_from_file", lambda self, path: False)
    monkeypatch.setattr(parser, "num_errors", 0)
    with pytest.raises(BackendError, match="segment_01: parser"):
        build(double)


def test_links_are_replaced_by_plans_and_not_followed(double: Double) -> None:
    build(double)
    home = timing_cache(double).parent
    mine = double.folder / "mine"
    mine.write_bytes(b"mine")
    for path in [path for path in home.iterdir() if path.name != "timing.cache"]:
        path.unlink()
        path.symlink_to(mine)
    build(double)
    assert mine.read_bytes() == b"mine"
    assert not any(path.is_symlink() for path in home.iterdir())


def test_a_build_that_is_killed_while_it_writes_loses_no_timings(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(double)
    write = Path.write_bytes

    def killed(path: Path, content: Any) -> int:
        if path.name.startswith("timing"):
            write(path, b"half")
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        build(double)
    assert json.loads(timing_cache(double).read_bytes()) == ["10.99", SEGMENTS]


def test_plans_of_rtx_can_be_captured_and_fp32_is_fp32() -> None:
    """With the real library, whose defaults are different."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    builder = trt.Builder(error_logger(trt))
    config = builder.create_builder_config()
    request = PlanRequest(
        module="tensorrt_rtx", onnx="", plan="", timing_cache="", profiles=[], options=SMALL
    )
    assert _configure(trt, builder, config, request) == ""
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.max_aux_streams == 0


def test_tensorrt_builds_one_plan_at_a_time(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It times kernels on the GPU, so builds at the same time would disturb each other."""
    builds, build_network = threading.Lock(), FakeBuilder.build_serialized_network

    def alone(*arguments: Any) -> bytes:
        assert builds.acquire(blocking=False), "two builds at the same time"
        time.sleep(0.05)
        try:
            return build_network(*arguments)
        finally:
            builds.release()

    monkeypatch.setattr(FakeBuilder, "build_serialized_network", alone)
    build_target(double.folder, read_manifest(double.folder), TENSORRT, "fp32", SMALL, jobs=3)
