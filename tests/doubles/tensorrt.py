"""A double of TensorRT's runtime, over the double of the driver.

It works on the device whose context is current in the thread, as CUDA's runtime library does.
Contexts run ONNX graphs with ONNX Runtime at the given addresses. They refuse what TensorRT
refuses: shapes outside the profile, too little scratch memory, and the default stream.
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpabee.exporter.targets.plans import profile_of
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Graph, Manifest, Shapes

from .cuda import OnDevice, current
from .onnxruntime_cuda import shared_session

SCRATCH = 4096


@dataclass
class Plan:
    """The content of a plan."""

    onnx: Path
    graph: Graph
    profiles: tuple[Shapes, ...]


def plans_of(folder: Path, unwritten: Sequence[Manifest] = ()) -> Callable[[bytes], Plan | None]:
    """A function that finds a plan of a folder by its bytes.

    Args:
        folder: the folder.
        unwritten: manifests with targets that are checked before the folder names them.
    """

    def find(content: bytes) -> Plan | None:
        for manifest in (read_manifest(folder), *unwritten):
            for target in manifest.targets.values():
                for name, file in target.files.items():
                    path = folder / file.file
                    if path.is_file() and path.read_bytes() == content:
                        graph = manifest.graphs_in(target.precision)[name]
                        return Plan(folder / graph.file, graph, target.profiles)
        return None

    return find


class FakeContext(OnDevice):
    """An execution context that runs its graph with ONNX Runtime."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.session = shared_session(plan.onnx.read_bytes())
        self.profile: Shapes | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        # What is known of it also after it is freed.
        self.record = types.SimpleNamespace(shapes=self.shapes, profile=None)
        self.record.context = weakref.ref(self)
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.config: Callable[[], Any] = lambda: "TensorRT has none"
        self.is_eager = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.record.profile = self.plan.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        spec = next(spec for spec in self.plan.graph.inputs if spec.name == name)
        assert self.profile is not None
        self.shapes[name] = tuple(shape)
        low, _, high = profile_of(spec, self.profile)
        inside = (a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        return all(inside)

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.plan.graph.inputs if spec.name not in self.shapes]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH * max(shape[0] for shape in self.shapes.values() if shape)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self.update_device_memory_size_for_shapes()
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.cuda
        cuda.must_be_current()
        assert stream != 0, "the default stream"
        assert self.config() is not None, "the configuration was freed"
        assert self.is_eager, "slow kernels would run until better ones are compiled"
        if cuda.fails("run") or cuda.dead:
            return False
        need = self.update_device_memory_size_for_shapes()
        address, size = self.scratch
        assert size >= need, "too little scratch memory"
        shapes = dict(self.shapes)
        addresses = dict(self.addresses)
        cuda.put(stream, lambda: self._run(shapes, addresses, address, need))
        return True

    def _run(
        self, shapes: dict[str, Any], addresses: dict[str, int], scratch: int, need: int
    ) -> None:
        if need:
            self.cuda.view(scratch, need).fill(0xA5)
        inputs = {
            spec.name: self._array(addresses[spec.name], spec.dtype, shapes[spec.name])
            for spec in self.plan.graph.inputs
        }
        outputs = self.plan.graph.outputs
        values = self.session.run([spec.name for spec in outputs], inputs)
        for spec, value in zip(outputs, values, strict=True):
            self._array(addresses[spec.name], spec.dtype, value.shape)[...] = value

    def _array(self, pointer: int, dtype: Any, shape: Any) -> NDArray[Any]:
        memory = self.cuda.view(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.asarray(memory.view(dtype).reshape(shape))


class FakeTensorRt(types.ModuleType):
    """The module `tensorrt` or `tensorrt_rtx`, with the names that the runtime uses.

    Args:
        plans: finds a plan by its bytes; None: it cannot be loaded.
        name: the module's name.
    """

    __version__ = "10.99"

    class ILogger:
        """Base of loggers."""

        class Severity(enum.Enum):
            """As in TensorRT."""

            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3

        def log(self, severity: Any, message: str) -> None:
            """Overridden by loggers."""

    class ExecutionContextAllocationStrategy(enum.Enum):
        """As in TensorRT."""

        STATIC = 0
        USER_MANAGED = 2

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        """As in TensorRT for RTX."""

        LAZY = 0
        EAGER = 1

    def __init__(
        self,
        plans: Callable[[bytes], Plan | None],
        name: str = "tensorrt",
    ) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.plans = plans
        self.logger: Any = None
        self.contexts: list[types.SimpleNamespace] = []  # their records
        self.contexts_left = sys.maxsize

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        """A runtime that reports to a logger."""
        self.logger = logger
        return FakeRuntime(self)

    def report(self, *messages: str, severity: str = "ERROR") -> None:
        """Report errors, or something else."""
        for message in messages:
            self.logger.log(self.ILogger.Severity[severity], message)


class FakeRuntime(OnDevice):
    """Loads plans."""

    def __init__(self, trt: FakeTensorRt) -> None:
        super().__init__()
        self._trt = trt

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
        current()
        plan = self._trt.plans(content)
        if plan is None:
            self._trt.report("Version tag does not match")
            return None
        return FakeEngine(self._trt, plan)


class FakeRuntimeCache(OnDevice):
    """What was compiled, represented by the number of contexts made with it."""

    content = 0

    def serialize(self) -> bytes:
        self.cuda.must_be_current()
        return b"compiled %d" % self.content

    def deserialize(self, content: bytes) -> bool:
        self.cuda.must_be_current()
        if not content.startswith(b"compiled "):
            return False
        self.content = int(content.split()[1])
        return True


class FakeRuntimeConfig(OnDevice):
    """The configuration of contexts."""

    strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = (
        FakeTensorRt.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine(OnDevice):
    """Makes contexts."""

    def __init__(self, trt: FakeTensorRt, plan: Plan) -> None:
        super().__init__()
        self._trt = trt
        self._plan = plan

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH * max(profile.batch.max for profile in self._plan.profiles)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        assert self._trt.__name__ == "tensorrt_rtx", "TensorRT 10.3 has none"
        return FakeRuntimeConfig()

    def create_execution_context(self, how: Any) -> FakeContext | None:
        config = how if isinstance(how, FakeRuntimeConfig) else None
        strategy = how if config is None else config.strategy
        assert strategy is self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if len(self._trt.contexts) >= self._trt.contexts_left:
            return None
        context = FakeContext(self._plan)
        if config is not None:
            assert config.cache is not None
            config.cache.content += 1
            context.config = weakref.ref(config)
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            eager = config.dynamic_shapes_kernel_specialization_strategy is strategies.EAGER
            context.is_eager = eager
        self._trt.contexts.append(context.record)
        return context
