"""Build one TensorRT plan in a process of its own, so that a crash does not affect other builds.

    python -m fpabee.exporter.targets.plan_worker < request.json > result.json

This serves both `tensorrt` (10.3 to 11) and `tensorrt_rtx` (1.7 and later). Both have every class
used here; attributes that only one of them has are looked up by name. Networks are always strongly
typed, so the graph decides the precision. Imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.backends.tensorrt import error_logger
from .options import PlanOptions


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One plan to build.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        onnx: the file of the graph.
        plan: the file to write.
        timing_cache: a file to read and to add to.
        profiles: for each optimization profile, the smallest, typical and largest shape of each
            input, by its name.
        options: the other settings; with no compute capabilities, for the GPU of this machine.
    """

    module: str
    onnx: str
    plan: str
    timing_cache: str
    profiles: list[dict[str, list[tuple[int, ...]]]]
    options: PlanOptions


class PlanResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the build gave.

    Attributes:
        error: why there is no plan; empty: it was built.
        seconds: time of parsing and building.
    """

    error: str = ""
    seconds: float = 0.0


def build_plan(request: PlanRequest) -> PlanResult:
    """Build a plan and write it. Errors are returned in the result."""
    trt = importlib.import_module(request.module)
    log = error_logger(trt)
    started = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.onnx):
        errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        return PlanResult(error=f"parser: {'; '.join(errors) or log.last}")
    config = builder.create_builder_config()
    problem = _configure(trt, builder, config, request)
    if problem:
        return PlanResult(error=problem)
    timing_cache = Path(request.timing_cache)
    cache = _timing_cache(trt, config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return PlanResult(error=log.last)
    replace_file(Path(request.plan), memoryview(plan))
    if cache is not None:
        replace_file(timing_cache, memoryview(cache.serialize()))
    return PlanResult(seconds=time.perf_counter() - started)


def _creation_flags(trt: Any) -> int:
    # Version 10 needs this flag; in later versions, every network is strongly typed.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, builder: Any, config: Any, request: PlanRequest) -> str:
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, ends in shapes.items():
            profile.set_shape(name, *ends)
        config.add_optimization_profile(profile)
    options = request.options
    # Otherwise products in fp32 would round their inputs to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if trt.__name__ == "tensorrt_rtx":  # without this flag, its runs cannot be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for number, capability in enumerate(options.compute_capabilities):
            name = "SM" + capability.replace(".", "")
            value = getattr(trt.ComputeCapability, name, None)
            if value is None or not config.set_compute_capability(value, number):
                return f"{request.module} {trt.__version__} cannot build for {name}"
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.max_aux_streams = 0  # a chain has nothing to run at the same time, also as one graph
    return ""


def _timing_cache(trt: Any, config: Any, file: Path) -> Any:
    """The shared timing cache; None with TensorRT for RTX, which compiles on the device."""
    if trt.__name__ == "tensorrt_rtx":
        return None
    for content in (file.read_bytes() if file.is_file() else b"", b""):
        cache = config.create_timing_cache(content)
        # Timings of another version or GPU are refused, so the cache starts empty.
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file anew, completely or not at all, even if the process is killed.

    If it is a link, the file behind it must not be overwritten.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


def main() -> None:
    """Read a request from stdin, build, write the result to stdout."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=PlanRequest)
    result = build_plan(request)
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
