"""ONNX Runtime on the CPU.

Three things make a chain of sessions as fast as one graph:

- one process-wide thread pool, because the idle threads of several pools spin against each other
  (measured: up to 18 times slower)
- one shared arena, so that segments reuse the same warm memory (1.2 times)
- prepared IO bindings over pooled buffers
"""

from __future__ import annotations

import gc
import logging
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..artifact.manifest import BuiltFile, Graph, Target, TensorSpec
from ..errors import MissingExtraError, first_line
from ..machine import usable_cores
from .base import GraphCall
from .host import HostBackend, HostBuffers, Run

logger = logging.getLogger(__name__)

# The fused kernel takes twice the time of its parts (measured).
_DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]

_REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'fpabee[cpu]'"

_lock = threading.Lock()
_threads: int | None = None  # of the process-wide pool; None before the first session
_shared = True  # whether sessions use that pool
_refused: set[int] = set()


def ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises; its own have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (value for value in vars(state).values() if isinstance(value, type))
    own = (value for value in found if issubclass(value, Exception))
    return (*own, RuntimeError, MemoryError)


class OnnxRuntimeBackend(HostBackend):
    """Graphs as ONNX Runtime sessions; see `Backend`."""

    library = "ONNX Runtime"
    update = "pip install -U 'fpabee[cpu]'"
    failures = staticmethod(ort_errors)

    @staticmethod
    def check(target: Target, name: str) -> None:
        """Check that exactly one ONNX Runtime is installed; see `HostBackend.check`."""
        check_installed()
        HostBackend.check(target, name)

    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> Any:
        """An `OrtValue` over an array's memory."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array)

    def bind(self, call: GraphCall, buffers: HostBuffers) -> Run:
        """Bind a session to buffers."""
        session = self.graph(call.graph)
        binding = session.io_binding()
        for name, buffer in call.inputs:
            binding.bind_ortvalue_input(name, buffers.buffer(buffer)[1])
        for name, buffer in call.outputs:
            binding.bind_ortvalue_output(name, buffers.buffer(buffer)[1])
        return partial(session.run_with_iobinding, binding)

    def read(self, file: BuiltFile | Graph) -> Any:
        """A session."""
        return cpu_session(self.verified(file), session_options(self._threads))


def _uses_shared_pool(threads: int | None) -> bool:
    """Whether sessions use the process-wide pool and arena, which the first call sets up."""
    global _threads, _shared
    import onnxruntime as ort

    with _lock:
        if _threads is None:
            _threads = threads or usable_cores()
            _shared = _set_up_pool(_threads)
            info = ort.OrtMemoryInfo(
                "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
            )
            try:
                ort.create_and_register_allocator(info, None)
            except ort_errors() as error:
                logger.warning("sessions do not share an arena: %s", first_line(error))
        elif _shared and threads is not None and threads not in {_threads, *_refused}:
            _refused.add(threads)
            logger.warning(
                "threads=%s has no effect: this process already runs ONNX Runtime with threads=%s",
                threads,
                _threads,
            )
        return _shared


def _set_up_pool(threads: int) -> bool:
    """Set up the process-wide pool, and return whether sessions can use it."""
    import onnxruntime as ort

    # Once a process-wide pool exists, ONNX Runtime refuses sessions with their own pool. An
    # application that has made sessions may make more of them, so then no pool is set up.
    reason = "the application made ONNX Runtime sessions"
    if not _sessions_alive(ort.InferenceSession):
        try:
            ort.set_global_thread_pool_sizes(threads, 1)
            return True
        except ort_errors() as error:
            if "already been created" in str(error):
                logger.warning(
                    "the application set up ONNX Runtime's process-wide thread pool before "
                    "fpabee, so it is used, and threads=%s has no effect",
                    threads,
                )
                return True
            reason = f"ONNX Runtime refuses a process-wide pool ({first_line(error)})"
    logger.warning(
        "%s before fpabee, so every segment gets its own thread pool, without spinning", reason
    )
    return False


def _sessions_alive(kind: type) -> bool:
    """Whether this process holds sessions; ONNX Runtime itself has no function for this."""
    return any(issubclass(type(item), kind) for item in gc.get_objects())


def session_options(threads: int | None = None) -> Any:
    """Session options for the process-wide pool and arena, which the first call sets up.

    Args:
        threads: CPU threads; default: the usable cores. Only the first call sets the size of the
            process-wide pool.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or installed twice.
    """
    check_installed()
    import onnxruntime as ort

    shared = _uses_shared_pool(threads)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors also arrive as exceptions
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Shapes vary from group to group, so memory patterns of earlier shapes are of no use.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    if shared:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or usable_cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def cpu_session(model: Path | bytes, options: Any = None) -> Any:
    """A session on the CPU, with the same optimizations for targets, checks and baselines.

    Args:
        model: an ONNX file, or its content.
        options: the session's options; default: `session_options()`.
    """
    import onnxruntime as ort

    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options or session_options(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=_DISABLED_OPTIMIZERS,
    )


def check_installed() -> None:
    """Check that exactly one ONNX Runtime package is installed, and that it is complete.

    Raises:
        MissingExtraError: no package, a damaged one, or two that overwrite each other.
    """
    from importlib import metadata

    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found.append(metadata.distribution(name))
    if not found:
        raise MissingExtraError("ONNX Runtime is not installed", "pip install 'fpabee[cpu]'")
    if len(found) > 1:
        raise MissingExtraError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            f"keep one: {_REINSTALL}",
        )
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX Runtime cannot be loaded: {first_line(error)}", f"reinstall it: {_REINSTALL}"
        ) from error
    if not hasattr(ort, "InferenceSession"):
        raise MissingExtraError(
            "ONNX Runtime is damaged: its module is empty, which happens when one of its two "
            "packages is removed",
            f"reinstall it: {_REINSTALL}",
        )
