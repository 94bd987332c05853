"""A double of the CUDA driver and of TensorRT's runtime, at the boundary that fpabee calls.

Device memory is numpy memory behind made-up addresses: every access is checked for bounds
and for memory that was given back. Streams are queues that run only when someone waits, as
late as the driver may: whoever reads pinned memory before its event reads NaN. Engines run
their ONNX graphs at the addresses they were given, and a context refuses what TensorRT
refuses: shapes outside its profile, a capture before a first run, missing scratch memory.
"""

from __future__ import annotations

import enum
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fpabee.runtime.backends import onnxruntime_cuda, tensorrt
from fpabee.runtime.backends.cuda import Cuda, PinnedArray
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.backends.onnxruntime_session import session_options
from fpabee.runtime.errors import BackendError
from fpabee.runtime.manifest import (
    BuiltFile,
    Graph,
    Range,
    Shapes,
    Target,
    TensorSpec,
    read_manifest,
    sha256_of,
    write_manifest,
)

SCRATCH = 4096
_GAP = 1 << 20

Work = Callable[[], None]


@dataclass
class _Stream:
    queue: list[tuple[Work | None, int | None]] = field(default_factory=list)
    capture: list[Work] | None = None


class FakeCuda(Cuda):
    """The calls of `Cuda`, over numpy memory."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.memory_of: dict[int, NDArray[np.uint8]] = {}
        self.pinned_of: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, bool] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self.copied_rows = 0
        self._next = itertools.count(1 << 40, 1 << 30)
        self._handles = itertools.count(1)

    # -- memory

    def malloc(self, size: int) -> int:
        self._refuse_in_capture()
        used = sum(memory.nbytes for memory in self.memory_of.values())
        if used + size > self.room:
            raise BackendError("the GPU has no room", "free some")
        pointer = next(self._next)
        self.memory_of[pointer] = np.full(size, 0xFF, np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        self._refuse_in_capture()
        for stream in self.streams.values():
            assert not stream.queue, "memory is given back while the device may use it"
        del self.memory_of[pointer]

    def memory(self) -> tuple[int, int]:
        used = sum(memory.nbytes for memory in self.memory_of.values())
        return self.room - used, self.room

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PinnedArray:
        pointer = next(self._next)
        count = int(np.prod(shape))
        memory = np.zeros(max(1, count * dtype.itemsize), np.uint8)
        self.pinned_of[pointer] = memory
        array = memory[: count * dtype.itemsize].view(dtype).reshape(shape)
        return PinnedArray(array, pointer)

    def view(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes at an address that is somebody's."""
        for memory_of in (self.memory_of, self.pinned_of):
            for start, memory in memory_of.items():
                if start <= pointer < start + _GAP + memory.nbytes:
                    offset = pointer - start
                    assert offset + size <= memory.nbytes, "beyond the end of an allocation"
                    return memory[offset : offset + size]
        raise AssertionError(f"{pointer:#x} is nobody's memory, or was given back")

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.copy_rows(target, size, source, size, size, 1, stream)
        self.copied_rows -= 1

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        assert width <= min(target_pitch, source_pitch)
        assert rows > 0
        self.copied_rows += 1

        def work() -> None:
            for row in range(rows):
                from_ = self.view(source + row * source_pitch, width)
                self.view(target + row * target_pitch, width)[...] = from_

        self.put(stream, work)
        if target in self.pinned_of and self.streams[stream].capture is None:
            self.view(target, width)[...] = 0xFF  # not there before it was waited for

    def clear(self, pointer: int, size: int, stream: int) -> None:
        self.put(stream, lambda: self.view(pointer, size).fill(0))

    # -- order

    def put(self, stream: int, work: Work) -> None:
        """Queue work, or note it while a graph is captured."""
        state = self.streams[stream]
        if state.capture is not None:
            state.capture.append(work)
        else:
            state.queue.append((work, None))

    def stream(self) -> int:
        handle = next(self._handles)
        self.streams[handle] = _Stream()
        return handle

    def synchronize(self, stream: int) -> None:
        state = self.streams[stream]
        assert state.capture is None, "nobody may wait while a graph is captured"
        while state.queue:
            self._step(state)

    def destroy_stream(self, stream: int) -> None:
        assert not self.streams[stream].queue
        del self.streams[stream]

    def event(self) -> int:
        handle = next(self._handles)
        self.events[handle] = True
        return handle

    def record(self, event: int, stream: int) -> None:
        assert self.streams[stream].capture is None
        self.events[event] = False
        self.streams[stream].queue.append((None, event))

    def wait(self, event: int) -> None:
        assert event in self.events, "the event was given back"
        while not self.events[event]:
            stream = next(s for s in self.streams.values() if (None, event) in s.queue)
            self._step(stream)

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def begin_capture(self, stream: int) -> None:
        self.streams[stream].capture = []

    def end_capture(self, stream: int) -> int:
        work = self.streams[stream].capture
        assert work, "a captured graph is empty"
        self.streams[stream].capture = None
        handle = next(self._handles)
        self.graphs[handle] = work
        return handle

    def launch(self, executable: int, stream: int) -> None:
        self.launches += 1
        for work in self.graphs[executable]:
            self.put(stream, work)

    def destroy_graph(self, executable: int) -> None:
        del self.graphs[executable]

    def _step(self, stream: _Stream) -> None:
        work, event = stream.queue.pop(0)
        if work is not None:
            work()
        if event is not None and (None, event) not in stream.queue:
            self.events[event] = True

    def _refuse_in_capture(self) -> None:
        for stream in self.streams.values():
            assert stream.capture is None, "memory must not change while a graph is captured"


@dataclass
class Plan:
    """What a plan of the double is made of."""

    onnx: Path
    graph: Graph
    profiles: tuple[Shapes, ...]


class FakeContext:
    """An execution context that runs its graph with ONNX Runtime."""

    def __init__(self, trt: FakeTensorRt, plan: Plan) -> None:
        self.trt = trt
        self.plan = plan
        self.session = ort.InferenceSession(
            str(plan.onnx), session_options(), providers=["CPUExecutionProvider"]
        )
        self.profile: Shapes | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.is_warm = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.plan.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        spec = next(spec for spec in self.plan.graph.inputs if spec.name == name)
        assert self.profile is not None
        self.shapes[name] = tuple(shape)
        self.is_warm = False
        for size, symbol in zip(shape, spec.shape, strict=True):
            if isinstance(symbol, int) and size != symbol:
                return False
            if isinstance(symbol, str):
                known = getattr(self.profile, symbol)
                if not known.min <= size <= known.max:
                    return False
        return True

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.plan.graph.inputs if spec.name not in self.shapes]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH * max(shape[0] for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)
        self.is_warm = False

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.trt.cuda
        assert stream != 0, "the default stream"
        if cuda.streams[stream].capture is not None:
            assert self.is_warm, "a first run was captured"
        self.is_warm = True
        need = self.update_device_memory_size_for_shapes()
        address, size = self.scratch
        assert size >= need, "too little scratch memory"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        cuda.put(stream, lambda: self._run(shapes, addresses, address, need))
        return True

    def _run(
        self, shapes: dict[str, Any], addresses: dict[str, int], scratch: int, need: int
    ) -> None:
        cuda = self.trt.cuda
        cuda.view(scratch, need).fill(0xA5)
        feed = {
            spec.name: self._array(spec, addresses[spec.name], shapes[spec.name])
            for spec in self.plan.graph.inputs
        }
        names = [spec.name for spec in self.plan.graph.outputs]
        for spec, value in zip(self.plan.graph.outputs, self.session.run(names, feed), strict=True):
            self._array(spec, addresses[spec.name], value.shape)[...] = value

    def _array(self, spec: TensorSpec, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(spec.dtype)
        memory = self.trt.cuda.view(address, int(np.prod(shape)) * dtype.itemsize)
        return memory.view(dtype).reshape(shape)


class FakeTensorRt(types.ModuleType):
    """The module `tensorrt`, as far as the runtime uses it.

    Args:
        cuda: the driver.
        plans: what the bytes of each plan stand for.
    """

    __version__ = "10.99"

    class ILogger:
        """Base of loggers."""

        class Severity(enum.Enum):
            """As in TensorRT."""

            INTERNAL_ERROR = 0
            ERROR = 1

        def log(self, severity: Any, message: str) -> None:
            """Overridden by loggers."""

    class ExecutionContextAllocationStrategy(enum.Enum):
        """As in TensorRT."""

        STATIC = 0
        USER_MANAGED = 2

    class EngineValidity(enum.Enum):
        """As in TensorRT for RTX."""

        VALID = 0
        INVALID = 2

    def __init__(self, cuda: FakeCuda, plans: Mapping[bytes, Plan], name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.cuda = cuda
        self.plans = plans
        self.contexts: list[FakeContext] = []

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        """A runtime that reports to a logger."""
        return FakeRuntime(self, logger)


class FakeRuntime:
    """Loads plans."""

    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        if plan not in self._trt.plans:
            severity = self._trt.ILogger.Severity.ERROR
            self._logger.log(severity, "Version tag does not match")
            return None
        return FakeEngine(self._trt, self._trt.plans[plan])

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        known = any(plan[:64] == header for plan in self._trt.plans)
        return (
            self._trt.EngineValidity.VALID if known else self._trt.EngineValidity.INVALID,
            0,
        )


class FakeRuntimeCache:
    """What was compiled: the number of contexts that were ever made with it."""

    def __init__(self) -> None:
        self.content = 0

    def serialize(self) -> bytes:
        return b"compiled %d" % self.content

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"compiled "):
            return False
        self.content = int(content.split()[1])
        return True


class FakeRuntimeConfig:
    """How contexts are made."""

    def __init__(self, trt: FakeTensorRt) -> None:
        self._trt = trt
        self.strategy: Any = None
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        cache.content += 1
        return True


class FakeEngine:
    """Makes contexts."""

    def __init__(self, trt: FakeTensorRt, plan: Plan) -> None:
        self._trt = trt
        self._plan = plan

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self._trt)

    def create_execution_context(self, how: Any) -> FakeContext:
        if isinstance(how, FakeRuntimeConfig):
            assert how.cache is not None
            how = how.strategy
        assert how is self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self._trt, self._plan)
        self._trt.contexts.append(context)
        return context


class FakeBinding:
    """An IO binding: what is where."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[int, Any, list[int]]] = {}
        self.outputs: dict[str, tuple[int, Any, list[int]]] = {}

    def bind_input(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.inputs[name] = (pointer, dtype, shape)

    def bind_output(
        self, name: str, device: str, number: int, dtype: Any, shape: list[int], pointer: int
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.outputs[name] = (pointer, dtype, shape)


class FakeCudaSession:
    """A session of ONNX Runtime's CUDA provider, which runs in a stream of the double."""

    def __init__(self, cuda: FakeCuda, path: Path, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._session = ort.InferenceSession(
            str(path), session_options(), providers=["CPUExecutionProvider"]
        )

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.put(self._stream, lambda: self._run(binding))

    def _run(self, binding: FakeBinding) -> None:
        feed = {name: self._array(*place) for name, place in binding.inputs.items()}
        names = list(binding.outputs)
        for name, value in zip(names, self._session.run(names, feed), strict=True):
            self._array(*binding.outputs[name])[...] = value

    def _array(self, pointer: int, dtype: Any, shape: list[int]) -> NDArray[Any]:
        memory = self._cuda.view(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.asarray(memory.view(dtype).reshape(shape))


def install_cuda_provider(
    patch: pytest.MonkeyPatch, folder: Path, precision: str = "fp32"
) -> Double:
    """Add a target of ONNX Runtime's CUDA provider, and let the double run it."""
    manifest = read_manifest(folder)
    name = f"onnxruntime-{precision}-cuda"
    target = Target(backend="onnxruntime", precision=precision, device="cuda", tolerance=None)
    write_manifest(
        folder, msgspec.structs.replace(manifest, targets={**manifest.targets, name: target})
    )
    cuda = FakeCuda()
    patch.setattr(onnxruntime_cuda, "cuda", lambda: cuda)
    patch.setattr(onnxruntime_cuda, "check_device", lambda device: None)
    patch.setattr(
        onnxruntime_cuda,
        "create_session",
        lambda path, stream, *entries: FakeCudaSession(cuda, path, stream),
    )
    return Double(folder, name, cuda, FakeTensorRt(cuda, {}))


@dataclass
class Double:
    """A double in place of the driver and of TensorRT, and the folder it serves."""

    folder: Path
    target: str
    cuda: FakeCuda
    trt: FakeTensorRt


def install(
    patch: pytest.MonkeyPatch,
    folder: Path,
    precision: str = "fp32",
    batch: tuple[int, ...] = (1, 8, 64),
    sequence: tuple[int, ...] = (1, 32, 64),
    **changes: Any,
) -> Double:
    """Add a target of made-up plans to an engines folder, and let the double run it.

    Args:
        patch: undoes it.
        folder: the folder; its manifest is changed.
        precision: of the graphs behind the plans.
        batch: smallest, typical and largest number of rows.
        sequence: the same in tokens.
        changes: of the target's record.
    """
    manifest = read_manifest(folder)
    name = f"tensorrt-{precision}-sm86"
    profile = Shapes(
        batch=Range(min=batch[0], opt=batch[1], max=batch[-1]),
        sequence=Range(min=sequence[0], opt=sequence[1], max=sequence[-1]),
    )
    plans, files = {}, {}
    for graph_name, graph in manifest.graphs_in(precision).items():
        path = folder / "targets" / name / f"{graph_name}.plan"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"plan of {graph_name}".encode().ljust(96, b"."))
        plans[path.read_bytes()] = Plan(folder / graph.file, graph, (profile,))
        files[graph_name] = BuiltFile(
            file=path.relative_to(folder).as_posix(),
            sha256=sha256_of(path),
            onnx_sha256=graph.sha256,
        )
    settings: dict[str, Any] = {
        "backend": "tensorrt",
        "precision": precision,
        "device": "sm86",
        "versions": {"tensorrt": FakeTensorRt.__version__},
        "files": files,
        "tolerance": None,
        "compute_capabilities": ("8.6",),
        "profiles": (profile,),
    }
    target = Target(**(settings | changes))
    write_manifest(
        folder, msgspec.structs.replace(manifest, targets={**manifest.targets, name: target})
    )
    cuda = FakeCuda()
    trt = FakeTensorRt(cuda, plans, target.backend.replace("-", "_"))
    patch.setitem(sys.modules, trt.__name__, trt)
    patch.setattr(tensorrt, "cuda", lambda: cuda)
    patch.setattr(tensorrt, "cuda_device", lambda: CudaDevice("a double", "8.6"))
    return Double(folder, name, cuda, trt)
