"""TensorRT and TensorRT for RTX: whether plans can run on this machine, and how they run.

Buffers and regrouping are in `device.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
import shlex
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata, util
from typing import Any

from ..artifact.folder import EnginesFolder
from ..artifact.manifest import Shapes, Target
from ..errors import ArtifactError, BackendError, MissingExtraError, warn_once
from ..machine import cuda_device
from . import compiled_cache
from .base import Backend, is_out_of_memory
from .buffers import Bucket, Limits, shape_of
from .cuda import Cuda, cuda, packages, required_gpu
from .device import DeviceExecution, Runner, on_device

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_SECOND_LOGGER = "differs from one already registered"  # what a process with two engines is told
_MOST_ERRORS = 1000  # that are kept; an operation reports far fewer
_LESS_MEMORY = "close other programs that use the GPU, or build the target for smaller shapes"


class ErrorLog:
    """The errors that TensorRT reports, which is the only place where it says why something failed.

    The first error of an operation is the cause; those after it name what failed because of it.

    Attributes:
        count: how many errors were reported until now; an operation notes it when it begins.
    """

    def __init__(self) -> None:
        self.count = 0
        self._latest = deque[str](maxlen=_MOST_ERRORS)

    def add(self, message: str) -> None:
        """Keep an error."""
        self._latest.append(message.strip())
        self.count += 1

    def since(self, begun: int) -> str:
        """The errors of an operation, the first one first.

        Args:
            begun: `count` when it began.
        """
        first = max(0, len(self._latest) - (self.count - begun))
        return "; ".join([*self._latest][first:]) or "TensorRT gives no reason"

    def must(self, done: bool, what: str, begun: int) -> None:
        """Raise an error, with its reasons, unless an operation is done.

        Args:
            done: whether it is.
            what: what failed otherwise.
            begun: `count` when it began.

        Raises:
            BackendError: it is not.
        """
        if done:
            return
        error = BackendError(f"{what}: {self.since(begun)}", "build the target again")
        if is_out_of_memory(error):
            error.hint = _LESS_MEMORY
        try:
            raise error
        finally:
            del error  # its traceback holds this variable, and what is to be freed


def succeeds(call: Callable[..., bool], *arguments: object) -> bool:
    """Whether a call of TensorRT succeeds.

    If they fail, some return false, and others raise an error that gives no reason.

    Args:
        call: returns whether it is done.
        arguments: its arguments.
    """
    try:
        return call(*arguments)
    except RuntimeError:
        return False


class PlanContext:
    """An execution context, which is freed on its device, wherever the last reference to it goes.

    That may be the traceback of an error.

    Args:
        library: the object of the library.
        cuda: the driver on the device.
    """

    def __init__(self, library: Any, cuda: Cuda) -> None:
        self.library = library
        self.addresses: Mapping[str, int] | None = None  # those that are set
        self._cuda = cuda

    def __del__(self) -> None:
        """Free it. When the process ends, the driver does."""
        if not sys.is_finalizing():
            with suppress(BackendError), self._cuda:
                self.library = None


def _run(context: PlanContext, addresses: Mapping[str, int], stream: int, errors: ErrorLog) -> None:
    """Enqueue a plan at the addresses of its inputs and outputs; groups share its context."""
    begun = errors.count
    if context.addresses is not addresses:
        context.addresses = None  # until all are set, they are a mixture
        for name, address in addresses.items():
            done = context.library.set_tensor_address(name, address)
            errors.must(done, f"TensorRT does not accept the address of {name}", begun)
        context.addresses = addresses
    started = context.library.execute_async_v3(stream)
    errors.must(started, "TensorRT could not start a segment", begun)


class RuntimeCache:
    """The code that TensorRT for RTX compiled for this GPU, in the user's cache directory.

    It is code, so it is never read from an engines folder. It is written after a warm-up, after the
    check of a first load, and when the engine is closed. A process that ends without any of these
    compiles again next time.

    Args:
        key: its name in the cache.
        errors: what the library reports.
    """

    def __init__(self, key: str, errors: ErrorLog) -> None:
        self._key = key
        self._errors = errors
        self._cache: Any = None
        self._configs: dict[str, Any] = {}  # they must live as long as the contexts made with them

    def config(self, trt: Any, graph: str, engine: Any) -> Any:
        """The configuration of an engine's next context, which uses the cache."""
        if graph in self._configs:
            return self._configs[graph]
        begun = self._errors.count
        refused = "TensorRT for RTX cannot configure an execution context"
        runtime_config = engine.create_runtime_config()
        self._errors.must(runtime_config is not None, refused, begun)
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        runtime_config.set_execution_context_allocation_strategy(strategy)
        # By default, kernels for a shape are compiled in the background while slow ones run.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._cache is None:
            cache = runtime_config.create_runtime_cache()
            self._errors.must(cache is not None, refused, begun)
            self._cache = cache
            content = compiled_cache.read(self._key)
            if content is not None and not self._cache.deserialize(bytes(content)):
                logger.info("what was compiled before is for another driver, so it is replaced")
        self._errors.must(runtime_config.set_runtime_cache(self._cache), refused, begun)
        self._configs[graph] = runtime_config
        return runtime_config

    def save(self) -> None:
        """Write the cache unless the user's cache directory has the same, and if possible.

        The context of the device must be current, because the library asks for its driver.
        """
        if self._cache is None:
            return
        begun = self._errors.count
        content = self._cache.serialize()
        if content is None:
            logger.warning("compiled graphs are not kept: %s", self._errors.since(begun))
        elif compiled_cache.read(self._key) != memoryview(bytes(content)):
            compiled_cache.write(self._key, bytes(content))


class TensorRtBackend(Backend):
    """Plans of TensorRT or of TensorRT for RTX; see `Backend`.

    There is one execution, because each has contexts and buffers of its own for every shape.

    Attributes:
        cuda: the driver on the device.
        errors: what the library reports.

    Raises:
        ArtifactError: a plan was built from another graph than the one in the folder.
    """

    most_executions = 1
    in_flight = 2
    joins = True
    prepares_shapes = True

    def __init__(
        self, engines: EnginesFolder, name: str, threads: int | None = None, device: int = 0
    ) -> None:
        super().__init__(engines, name, threads, device)
        self._compiled: RuntimeCache | None = None  # what is freed also if nothing else is made
        self.cuda = cuda(device)
        self.errors = ErrorLog()
        gpu = cuda_device(device)
        self._trt: Any = importlib.import_module(MODULES[self.target.backend])
        self._logger = error_logger(self._trt, self.errors)  # must live as long as the runtime
        with self.cuda:
            self._runtime = self._trt.Runtime(self._logger)
        if self.target.backend == "tensorrt-rtx":
            plans = sorted(file.sha256 for file in self.target.files.values())
            # What decides how it compiles.
            parts = [plans, self._trt.__version__, gpu.name, gpu.compute_capability]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            self._compiled = RuntimeCache(key, self.errors)
        if self.target.built_on and self.target.built_on != gpu.model:
            warn_once(
                logger,
                f"target {name} was built on {self.target.built_on}, and runs on {gpu.model}: its "
                f"plans may be slow or fail there, so {rebuild(self.target)}",
                engines.path,
            )
        for graph, file in self.target.files.items():
            if file.onnx_sha256 != self.graphs[graph].sha256:
                raise ArtifactError(
                    f"{engines.path / file.file} was built from another graph than the one in the "
                    "folder",
                    rebuild(self.target),
                )

    @staticmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check the library, its version and the GPU; see `Backend.check`."""
        module = MODULES[target.backend]
        if util.find_spec(module) is None:
            raise MissingExtraError(
                f"target {name} needs {module}, which is not installed",
                f"pip install {packages(target.backend)}, or choose another `target`",
            )
        gpu = required_gpu(name, device)
        if gpu.compute_capability not in target.compute_capabilities:
            raise BackendError(
                f"target {name} is for compute capability "
                f"{', '.join(target.compute_capabilities)}; this {gpu.name} has "
                f"{gpu.compute_capability}",
                rebuild(target),
            )
        if target.built_on and mig_slice(target.built_on) != mig_slice(gpu.model):
            raise BackendError(
                f"target {name} was built on {target.built_on}, but this is {gpu.model}: plans fit "
                "only slices (MIG) of one size, or only whole GPUs",
                rebuild(target),
            )
        built = target.versions.get(module, "unknown")
        here = library_version(module)
        if built != here:
            raise BackendError(
                f"target {name} was built by {module} {built}, but {module} {here} is installed, "
                "which cannot load it",
                f"{rebuild(target)}; or pip install {shlex.quote(f'{module}=={built}')}",
            )

    def limits(self) -> Limits:
        """The shapes of the target's profiles."""
        profiles = self.target.profiles
        typical = profiles[0]
        longest = max(shapes.sequence.max for shapes in profiles)
        return Limits(
            max_batch=max(shapes.batch.max for shapes in profiles),
            max_sequence=longest,
            # A group is padded to the smallest batch, so it may as well be full.
            group_tokens=max(typical.batch.max * typical.sequence.opt, typical.batch.min * longest),
            batch_sizes=self.target.batch_sizes,
            sequence_lengths=self.target.sequence_lengths,
        )

    @on_device
    def keep_compiled(self) -> None:
        """Keep what TensorRT for RTX compiled, see `RuntimeCache`."""
        if self._compiled is not None:
            execution = self.check_out()  # so that nothing is compiled meanwhile
            try:
                self._compiled.save()
            finally:
                self.give_back(execution)

    @property
    def failed(self) -> str:
        """Why the device cannot be used any more; see `Backend.failed`."""
        return self.cuda.failed

    @on_device
    def open(self) -> TensorRtExecution:
        """A new execution."""
        return TensorRtExecution(self)

    def new_context(self, graph: str) -> PlanContext | None:
        """An execution context of a graph; None: memory is lacking."""
        engine = self.graph(graph)
        how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._compiled is not None:
            how = self._compiled.config(self._trt, graph, engine)
        context = engine.create_execution_context(how)
        return None if context is None else PlanContext(context, self.cuda)

    @on_device
    def _load(self, name: str) -> Any:
        file = self._file(name)
        path = self._engines.file(file.file, file.sha256)
        plan = path.read_bytes()
        begun = self.errors.count
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            if self.cuda.memory()[0] < len(plan):
                raise self.cuda.no_room(len(plan))
            reasons = self.errors.since(begun)
            raise ArtifactError(f"{path} cannot be loaded: {reasons}", rebuild(self.target))
        return engine

    def __del__(self) -> None:
        """Free what is on the device, which is known by its address only, if nobody has closed it.

        When the process ends, the driver frees it.
        """
        if hasattr(self, "cuda") and not sys.is_finalizing():  # otherwise it was never made
            self.close()

    def _free(self) -> None:
        with suppress(BackendError), self.cuda:  # one that has failed can neither save nor free
            try:
                if self._compiled is not None:
                    self._compiled.save()
            finally:
                self._compiled = None  # of the engines, so it goes before them
                super()._free()
                self._runtime = None


class TensorRtExecution(DeviceExecution):
    """Runs plans; see `Execution`.

    Args:
        backend: the backend.
    """

    def __init__(self, backend: TensorRtBackend) -> None:
        super().__init__(backend, backend.cuda)
        self._backend: TensorRtBackend = weakref.proxy(backend)  # no cycle, as in `HostExecution`

    def runner(self, graph: str, bucket: Bucket, addresses: Mapping[str, int]) -> Runner:
        """A runner on the context of a graph and shape."""
        context = self.shared.get((bucket, graph))
        if context is None:
            context = self.shared[bucket, graph] = self._context(graph, bucket)
        return partial(_run, context, addresses, self.stream, self._backend.errors)

    def _context(self, graph: str, bucket: Bucket) -> PlanContext:
        """A context of a graph with its shapes set, which uses scratch memory of the execution."""
        backend = self._backend
        errors = backend.errors
        begun = errors.count
        engine = backend.graph(graph)
        context = backend.new_context(graph)
        if context is None:
            self.free_unused()
            context = backend.new_context(graph)
        if context is None:
            raise BackendError(
                f"{backend.name}: no execution context for {graph}: {errors.since(begun)}; "
                f"{self.cuda.free_room()}",
                _LESS_MEMORY,
            )
        # If none fits, profile 0 refuses the shape below, and the library says which it takes.
        profile = profile_for(backend.target.profiles, bucket) or 0
        done = succeeds(context.library.set_optimization_profile_async, profile, self.stream)
        errors.must(done, f"{graph} does not accept its profile", begun)
        for spec in backend.graphs[graph].inputs:
            shape = shape_of(spec, bucket)
            done = context.library.set_input_shape(spec.name, shape)
            errors.must(done, f"{graph} does not accept {spec.name} of shape {list(shape)}", begun)
        done = succeeds(lambda: not context.library.infer_shapes())
        errors.must(done, f"{graph} cannot infer its shapes", begun)
        need = int(context.library.update_device_memory_size_for_shapes())
        errors.must(need > 0 or errors.count == begun, f"{graph} cannot tell its memory", begun)
        # Enough for every shape, so that the memory rarely has to grow.
        size = max(need, int(engine.device_memory_size_v2))
        if size:
            context.library.set_device_memory(self.scratch(size), size)
        return context


def profile_for(profiles: Sequence[Shapes], bucket: Bucket) -> int | None:
    """The number of the narrowest optimization profile for a shape; None: there is none."""
    fitting = [
        (shapes.batch.max, shapes.sequence.max - shapes.sequence.min, number)
        for number, shapes in enumerate(profiles)
        if shapes.batch.min <= bucket.batch <= shapes.batch.max
        and shapes.sequence.min <= bucket.sequence <= shapes.sequence.max
    ]
    return min(fitting)[-1] if fitting else None


def mig_slice(gpu: str) -> str:
    """The size of the part of a GPU that a name stands for, such as `1g.10gb`; empty: all of it."""
    part = re.search(r" MIG ([\w.]+)", gpu)
    return part[1] if part else ""


def rebuild(target: Target) -> str:
    """The hint to build a target on this machine."""
    return f"build target {target.backend}-fp16 here"


def library_version(module: str) -> str:
    """The version of `tensorrt` or `tensorrt_rtx`; imports it only if no package metadata exists.

    Args:
        module: name of the module.
    """
    for name in metadata.packages_distributions().get(module, []):
        return metadata.version(name)
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def error_logger(trt: Any, errors: ErrorLog) -> Any:
    """A logger that keeps errors, logs each warning once, and drops everything else.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        errors: where it keeps them.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.add(message)
            elif severity == trt.ILogger.Severity.WARNING and _SECOND_LOGGER not in message:
                warn_once(logger, f"{trt.__name__}: {message.strip()}")

    return Logger()
