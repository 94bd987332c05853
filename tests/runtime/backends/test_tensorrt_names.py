"""Every name of TensorRT that is used exists in all supported versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime.backends import tensorrt

SOURCE = Path(tensorrt.__file__).read_text("utf-8")
KINDS = {
    "context.library": "IExecutionContext",
    "engine": "ICudaEngine",
    "_runtime": "Runtime",
    "_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
}
"""The TensorRT class of each variable."""

IN_BOTH = """
    ERROR ExecutionContextAllocationStrategy ILogger INTERNAL_ERROR Runtime Severity USER_MANAGED
    create_execution_context deserialize deserialize_cuda_engine device_memory_size_v2
    execute_async_v3 infer_shapes serialize set_device_memory set_input_shape
    set_optimization_profile_async set_tensor_address update_device_memory_size_for_shapes WARNING
"""
"""These exist in the bindings of TensorRT 10.3.0 and 11.4.0 (tensorrt-cu12-bindings and
tensorrt-cu13-bindings). Look other names up there before you use and add them."""
ONLY_WITH_RTX = """
    DynamicShapesKernelSpecializationStrategy EAGER create_runtime_cache create_runtime_config
    dynamic_shapes_kernel_specialization_strategy set_execution_context_allocation_strategy
    set_runtime_cache
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
