"""Build one TensorRT plan in a process of its own, so that a crash does not affect other builds.

    python -m fpabee.exporter.targets.plan_worker < request.json

Polygraphy builds, because it knows the differences between TensorRT 10, TensorRT 11 and TensorRT
for RTX, which it takes if `POLYGRAPHY_USE_TENSORRT_RTX` is 1. Networks are always strongly typed,
so the graph decides the precision. Imports neither torch nor onnx.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from ..staging import replacing


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One plan to build.

    Attributes:
        onnx: the file of the graph.
        plan: the file to write.
        timing_cache: a file to read and to add to; unused with TensorRT for RTX.
        profiles: for each optimization profile, the smallest, typical and largest shape of each
            input, by its name.
        compute_capabilities: the GPUs to build for, with TensorRT for RTX; empty: that of this
            machine.
    """

    onnx: str
    plan: str
    timing_cache: str
    profiles: list[dict[str, list[tuple[int, ...]]]]
    compute_capabilities: tuple[str, ...]


def build_plan(request: PlanRequest) -> None:
    """Build a plan and write it.

    Raises:
        PolygraphyException: it could not be built; Polygraphy has printed why.
    """
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath

    network = NetworkFromOnnxPath(request.onnx, strongly_typed=True)
    plan = Path(request.plan)
    cache = Path(request.timing_cache)
    # Files are replaced, completely or not at all. Polygraphy follows links, and writes in place.
    with replacing(plan.parent) as new, tempfile.TemporaryFile() as timings:
        if request.compute_capabilities:
            content = EngineBytesFromNetwork(network, rtx_config(request))()
        else:
            if cache.is_file():
                timings.write(cache.read_bytes())
                timings.seek(0)
            # With Polygraphy, TF32 is off.
            config = CreateConfig(load_timing_cache=timings, **_settings(request))
            content = EngineBytesFromNetwork(network, config, save_timing_cache=timings)()
            # Timings of another version or GPU are refused, and nothing is written: the next build
            # starts without any.
            size = timings.tell()
            timings.seek(0)
            # At once and beside the finished plans, so that the next build of this folder has them.
            with replacing(cache.parent) as beside:
                (beside / cache.name).write_bytes(timings.read(size))
        (new / plan.name).write_bytes(content)


def rtx_config(request: PlanRequest) -> Any:
    """The configuration for TensorRT for RTX, as Polygraphy takes it."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import PostprocessConfig, lazy_import_trt

    flags = lazy_import_trt().BuilderFlag

    def change(builder: Any, network: Any, config: Any) -> None:
        # Otherwise products in fp32 would round their inputs to 10 bits.
        config.clear_flag(flags.TF32)
        # A run allocates nothing by itself: its memory is that of the execution.
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)

    capabilities = [tuple(map(int, each.split("."))) for each in request.compute_capabilities]
    config = CreateConfigRTX(compute_capabilities=capabilities, **_settings(request))
    return PostprocessConfig(config, change)


def _settings(request: PlanRequest) -> dict[str, Any]:
    """The settings that both configurations share."""
    from polygraphy.backend.trt import Profile, lazy_import_trt

    profiles = []
    for shapes in request.profiles:
        profile = Profile()
        for name, ends in shapes.items():
            profile.add(name, *ends)
        profiles.append(profile)
    return {
        "profiles": profiles,
        "profiling_verbosity": lazy_import_trt().ProfilingVerbosity.NONE,
        "max_aux_streams": 0,  # a chain has nothing to run at the same time
    }


if __name__ == "__main__":
    build_plan(msgspec.json.decode(sys.stdin.buffer.read(), type=PlanRequest))
