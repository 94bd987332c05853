"""TensorRT and TensorRT for RTX: which plans can run here, and how one is run.

Buffers, regrouping and CUDA graphs are in `device.py`.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ..agreement import BARS
from ..artifact.folder import resolve, verified
from ..artifact.manifest import Manifest, Target
from ..encoding import padding_values
from ..errors import ArtifactError, BackendError, MissingExtraError
from .base import Bucket, Limits
from .buffers import carried_specs, plan_buffers
from .cuda import cuda
from .cuda_probe import cuda_device
from .device import DeviceExecution, Place

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_HEADER_BYTES = 64
_AMPERE = 8


class PlanRunner:
    """An execution context whose shapes and addresses are set."""

    def __init__(self, context: Any, stream: int) -> None:
        self._context = context
        self._stream = stream

    def run(self) -> None:
        """Put the plan into the stream."""
        context = self._context
        _must(context.execute_async_v3(self._stream), "TensorRT could not start a segment")

    def can_capture(self) -> bool:
        """Whether its next run can be captured: TensorRT for RTX may still compile for it."""
        context = self._context
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream))

    def scratch_bytes(self) -> int:
        """What the context needs at its shapes."""
        context = self._context
        return int(context.update_device_memory_size_for_shapes())

    def use_scratch(self, pointer: int, size: int) -> None:
        """Let the context use shared memory."""
        context = self._context
        context.set_device_memory(pointer, size)


class RuntimeCache:
    """What TensorRT for RTX compiled for this GPU, kept beside the plans from run to run.

    Args:
        path: the file; it is not part of the artifact, and its absence only costs time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None

    def config(self, engine: Any, strategy: Any) -> Any:
        """A configuration of an engine's contexts that uses the cache."""
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        if self._cache is None:
            self._cache = runtime_config.create_runtime_cache()
            if self._path.is_file() and not self._cache.deserialize(self._path.read_bytes()):
                logger.warning("%s is of another GPU or release: it is made anew", self._path)
        runtime_config.set_runtime_cache(self._cache)
        return runtime_config

    def save(self) -> None:
        """Write the cache; a folder that cannot be written is said once."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be kept: %s", self._path, error.strerror)


class TensorRtBackend:
    """Plans of one target on the first GPU, loaded when first needed.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        target: the target's record.
        name: the target's name, for messages.

    Raises:
        MissingExtraError: the library or `cuda-bindings` is not installed.
        BackendError: no GPU, or one that the plans are not for, or another library version.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: Target, name: str) -> None:
        check_target(target, name)
        self.cuda = cuda()
        self.trt: Any = importlib.import_module(MODULES[target.backend])
        self.manifest = manifest
        self.stages = plan_buffers(manifest)
        self.specs = carried_specs(manifest.graphs_in(target.precision))
        self._folder = folder
        self._target = target
        self._name = name
        self._log = error_logger(self.trt)
        self._runtime = self.trt.Runtime(self._log)
        # Such a plan brings the library code that runs it.
        self._runtime.engine_host_code_allowed = target.version_compatible
        self._engines: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._executions: list[DeviceExecution] = []
        self._closed = False
        self._compiled = None
        if target.backend == "tensorrt-rtx":
            self._compiled = RuntimeCache(folder / "targets" / name / "runtime.cache")
        graphs = manifest.graphs_in(target.precision)
        for graph_name, file in target.files.items():
            path = resolve(folder, file.file)
            if file.onnx_sha256 != graphs[graph_name].sha256:
                raise ArtifactError(
                    f"{path} was built from another graph than the one in the folder",
                    rebuild(target),
                )
        self.padding = padding_values(manifest.tokenizer)

    def limits(self) -> Limits:
        """The shapes of the target's profiles."""
        last = self._target.profiles[-1]
        typical = self._target.profiles[0]
        return Limits(
            max_batch=last.batch.max,
            max_sequence=last.sequence.max,
            group_tokens=typical.batch.max * typical.sequence.opt,
            batch_sizes=self._target.batch_sizes,
            sequence_lengths=self._target.sequence_lengths,
        )

    def open(self) -> DeviceExecution:
        """A new execution, for one thread."""
        execution = DeviceExecution(self)
        with self._lock:
            self._executions.append(execution)
        return execution

    def preload(self) -> None:
        """Load all plans now."""
        for name in self._target.files:
            self.engine(name)

    def close(self) -> None:
        """Give all device memory back, keep what the device compiled, and drop the plans."""
        with self._lock:
            if self._compiled is not None and not self._closed:
                self._compiled.save()
            self._closed = True
            for execution in self._executions:
                execution.close()
            self._executions.clear()
            self._engines.clear()

    def check_bucket(self, bucket: Bucket) -> None:
        """Refuse a shape that no profile takes."""
        self._profile(bucket)

    def runner(
        self, graph: str, bucket: Bucket, places: Mapping[str, Place], stream: int
    ) -> PlanRunner:
        """A context of a graph with its shapes and addresses set."""
        context = self._context(graph)
        _must(
            context.set_optimization_profile_async(self._profile(bucket), stream),
            f"{graph} does not take its profile",
        )
        inputs = {spec.name for spec in self.manifest.graphs[graph].inputs}
        for name, place in places.items():
            if name in inputs:
                _must(
                    context.set_input_shape(name, place.shape),
                    f"{graph} does not take {name} of shape {list(place.shape)}",
                )
            _must(
                context.set_tensor_address(name, place.pointer),
                f"{graph} does not take the address of {name}",
            )
        missing = context.infer_shapes()
        _must(not missing, f"{graph} misses the shapes of {', '.join(missing)}")
        return PlanRunner(context, stream)

    def _profile(self, bucket: Bucket) -> int:
        """The optimization profile that a shape is in.

        Raises:
            BackendError: none.
        """
        for number, shapes in enumerate(self._target.profiles):
            batch, sequence = shapes.batch, shapes.sequence
            if (
                batch.min <= bucket.batch <= batch.max
                and sequence.min <= bucket.sequence <= sequence.max
            ):
                return number
        ranges = "; ".join(
            f"{p.batch.min} to {p.batch.max} rows of {p.sequence.min} to {p.sequence.max} tokens"
            for p in self._target.profiles
        )
        raise BackendError(
            f"target {self._name} takes {ranges}, not {bucket.batch} rows of {bucket.sequence}",
            "build it for more: fpabee-export --from ENGINES --batch 1,8,64 --sequence 16,64,256",
        )

    def engine(self, name: str) -> Any:
        """The engine of a graph, loaded on first use."""
        engine = self._engines.get(name)
        if engine is None:
            with self._lock:
                if self._closed:
                    raise BackendError("this engine is closed", "load it again with Engine.load")
                engine = self._engines.get(name) or self._load(name)
                self._engines[name] = engine
        return engine

    def _context(self, name: str) -> Any:
        """A context of a graph, whose scratch memory is the execution's."""
        engine = self.engine(name)
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._compiled is None:
            context = engine.create_execution_context(strategy)
        else:
            with self._lock:
                context = engine.create_execution_context(self._compiled.config(engine, strategy))
        if context is None:
            free, total = self.cuda.memory()
            raise BackendError(
                f"{self._name}: no execution context for {name}: {self._log.last}; "
                f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB of device memory are free",
                "use fewer threads, or close what else uses the GPU",
            )
        return context

    def _load(self, name: str) -> Any:
        file = self._target.files[name]
        path = verified(self._folder, file.file, file.sha256)
        plan = path.read_bytes()
        if self._target.backend == "tensorrt-rtx":
            validity, _ = self._runtime.get_engine_validity(plan[:_HEADER_BYTES])
            if validity == self.trt.EngineValidity.INVALID:
                raise ArtifactError(
                    f"{path} is no plan for this GPU and this release: {self._log.last}",
                    rebuild(self._target),
                )
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            if self.cuda.memory()[0] < len(plan):
                raise self.cuda.no_room(len(plan))
            raise ArtifactError(f"{path} cannot be loaded: {self._log.last}", rebuild(self._target))
        return engine


def check_target(target: Target, name: str) -> None:
    """Whether a target's plans can run here, before any is loaded.

    Raises:
        MissingExtraError: the library is not installed.
        BackendError: no GPU, another GPU, or another version of the library.
    """
    module = MODULES[target.backend]
    if util.find_spec(module) is None:
        raise MissingExtraError(
            f"target {name} needs {module}, which is not installed",
            f"pip install 'fpabee[{target.backend}]', or --target onnxruntime-fp32",
        )
    device = cuda_device()
    if device.error:
        raise BackendError(
            f"target {name} needs an NVIDIA GPU, and here {device.error}",
            "choose another target: --target onnxruntime-fp32",
        )
    if not _is_for(target, device.compute_capability):
        raise BackendError(
            f"target {name} is for compute capability {', '.join(target.compute_capabilities)}; "
            f"this {device.name} has {device.compute_capability}",
            rebuild(target),
        )
    built = target.versions.get(module, "unknown")
    here = library_version(module)
    if built != here and not (target.version_compatible and _is_later(here, built)):
        raise BackendError(
            f"target {name} was built by {module} {built}; here is {here}, which cannot load it",
            f"{rebuild(target)}, or pip install {module}=={built}",
        )


def _is_for(target: Target, compute_capability: str) -> bool:
    if compute_capability in target.compute_capabilities:
        return True
    return target.hardware_compatible and int(compute_capability.split(".")[0]) >= _AMPERE


def _is_later(here: str, built: str) -> bool:
    numbers = [[int(part) for part in re.findall(r"\d+", version)] for version in (here, built)]
    return numbers[0] > numbers[1]


def build_command(backend: str, precision: str) -> str:
    """The command that builds the plans of a precision, with ENGINES for the folder.

    Empty where this fpabee does not know the backend or the precision: a manifest may say
    anything, and a command is there to be run.
    """
    if backend not in MODULES or precision not in BARS:
        return ""
    flag = "" if precision == "fp32" else f" --{precision}"
    return f"fpabee-export --from ENGINES --backend {backend}{flag}"


def rebuild(target: Target) -> str:
    """How to build a target on this machine."""
    command = build_command(target.backend, target.precision)
    return f"build it here: {command}" if command else "pip install -U fpabee"


def library_version(module: str) -> str:
    """The version of `tensorrt` or `tensorrt_rtx`; it is loaded only if no package says it."""
    for name in metadata.packages_distributions().get(module, []):
        return metadata.version(name)
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def error_logger(trt: Any) -> Any:
    """A logger that keeps the last error as `last` instead of printing it.

    It is the only place where TensorRT says why something failed.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message

    return Logger()


def _must(done: bool, what: str) -> None:
    if not done:
        raise BackendError(what, "build the target again with fpabee-export --from ENGINES")
