"""Every name of CUDA and TensorRT that is used exists in all supported versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter.targets import plan_worker
from fpabee.runtime.backends import cuda, tensorrt

SOURCE = "".join(Path(str(m.__file__)).read_text("utf-8") for m in (tensorrt, plan_worker))
KINDS = {
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "_runtime": "Runtime",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
}
"""The TensorRT class of each variable."""

IN_BOTH = """
    AMPERE_PLUS Builder BuilderFlag ERROR ExecutionContextAllocationStrategy
    HardwareCompatibilityLevel ILogger INTERNAL_ERROR NONE NetworkDefinitionCreationFlag OnnxParser
    ProfilingVerbosity Runtime Severity TF32 USER_MANAGED add_optimization_profile
    build_serialized_network clear_flag create_builder_config create_execution_context
    create_network create_optimization_profile create_timing_cache deserialize
    deserialize_cuda_engine device_memory_size_v2 execute_async_v3 get_error
    hardware_compatibility_level infer_shapes max_aux_streams num_errors nvtx_verbosity
    parse_from_file serialize set_device_memory set_flag set_input_shape
    set_optimization_profile_async set_shape set_tensor_address set_timing_cache
    update_device_memory_size_for_shapes
"""
"""These exist in the bindings of TensorRT 10.3.0 and 11.4.0 (tensorrt-cu12-bindings and
tensorrt-cu13-bindings). Look other names up there before you use and add them."""
ONLY_WITH_RTX = """
    ComputeCapability DynamicShapesKernelSpecializationStrategy EAGER EngineValidity INVALID
    REQUIRE_USER_ALLOCATION create_runtime_cache create_runtime_config
    dynamic_shapes_kernel_specialization_strategy get_engine_validity num_compute_capabilities
    set_compute_capability set_execution_context_allocation_strategy set_runtime_cache
"""
"""Used only with TensorRT for RTX, because not all versions of TensorRT have them."""


def names_of(variable: str) -> set[str]:
    """The attributes of a variable that the source uses."""
    found = re.findall(rf"(?<![\w.]){variable}\.(\w+)|self\.{variable}\.(\w+)", SOURCE)
    return {first or second for first, second in found}


def names_of_module() -> set[str]:
    """The dotted names of the module that the source uses."""
    return set(re.findall(r"trt\.((?:\w+\.)*\w+)", SOURCE)) - {"__version__", "__name__"}


def resolve(value: Any, dotted: str) -> None:
    for part in dotted.split("."):
        assert hasattr(value, part), dotted
        value = getattr(value, part)


def test_every_cuda_name_exists() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    source = Path(cuda.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"\b_?runtime\.(cuda(?:\w+\.)*\w+)", source))
    assert len(names) > 30
    for name in names:
        resolve(runtime, name)
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for name in re.findall(r"_driver\.(cu\w+)", source):
        resolve(driver, name)


@pytest.mark.parametrize("variable", KINDS)
def test_every_name_exists_in_tensorrt_for_rtx(variable: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    found = names_of(variable)
    assert found, "nothing of this kind is used"
    kind = getattr(trt, KINDS[variable])
    assert [name for name in found if not hasattr(kind, name)] == []
    for name in names_of_module():
        resolve(trt, name)


def test_every_name_exists_in_the_oldest_and_newest_tensorrt() -> None:
    used = set().union(*map(names_of, KINDS))
    used |= {part for name in names_of_module() for part in name.split(".")} - {"__init__"}
    assert used == {*IN_BOTH.split(), *ONLY_WITH_RTX.split()}
