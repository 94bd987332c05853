"""ONNX Runtime sessions that share one process-wide thread pool and one arena."""

from __future__ import annotations

import gc
import logging
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError, MissingExtraError, first_line
from .cuda_probe import cuda_device

logger = logging.getLogger(__name__)

DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
"""For `InferenceSession`: measured, the fused kernel takes twice the time of its parts."""

_AGAIN = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'fpabee[cpu]'"


class _Environment:
    """The process-wide thread pool and arena, set up before our first session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = False
        self._threads: int | None = None
        self._refused: set[int | None] = set()
        self._shared = True

    def prepare(self, threads: int | None) -> bool:
        """Set up once; returns whether sessions use the process-wide pool."""
        import onnxruntime as ort

        with self._lock:
            if self._ready:
                if self._shared and threads not in (None, self._threads, *self._refused):
                    self._refused.add(threads)
                    logger.warning(
                        "threads=%s has no effect: this process already runs ONNX Runtime "
                        "with threads=%s",
                        threads,
                        self._threads,
                    )
                return self._shared
            self._threads = threads or usable_cores()
            self._shared = self._set_pool(self._threads)
            info = ort.OrtMemoryInfo(
                "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
            )
            self._ready = True
            try:
                ort.create_and_register_allocator(info, None)
            except ort_errors() as error:
                logger.warning("ONNX Runtime keeps its arena as it is: %s", first_line(error))
            return self._shared

    def _set_pool(self, threads: int) -> bool:
        import onnxruntime as ort

        # Once there is a process-wide pool, ONNX Runtime refuses sessions with a pool of
        # their own: an application that makes sessions owns its threads, so leave them be.
        reason = "the application made ONNX Runtime sessions"
        if not _sessions_alive(ort.InferenceSession):
            try:
                ort.set_global_thread_pool_sizes(threads, 1)
            except ort_errors() as error:
                if "already been created" in str(error):
                    logger.warning(
                        "the application set up ONNX Runtime's process-wide thread pool before "
                        "fpabee: it is used, threads=%s has no effect",
                        threads,
                    )
                    return True
                reason = f"ONNX Runtime refuses a process-wide pool ({first_line(error)})"
            else:
                return True
        logger.warning(
            "%s before fpabee: every segment gets a thread pool of its own, without spinning",
            reason,
        )
        return False


def _sessions_alive(kind: type) -> bool:
    """Whether this process holds sessions; ONNX Runtime itself cannot be asked."""
    return any(issubclass(type(item), kind) for item in gc.get_objects())


_environment = _Environment()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def session_options(threads: int | None = None) -> Any:
    """Session options of the process-wide pool and arena, which are set up if need be.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or twice.
    """
    check_installed()
    import onnxruntime as ort

    shared = _environment.prepare(threads)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would print comes as an exception
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Shapes vary from group to group: patterns of earlier shapes only cost memory.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    if shared:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or usable_cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def cpu_session(
    model: Path | bytes, options: Any = None, disabled_optimizers: Sequence[str] = ()
) -> Any:
    """A session on the CPU.

    Args:
        model: an ONNX file, or its content.
        options: the session's options; default: `session_options()`.
        disabled_optimizers: names of ONNX Runtime's graph optimizers that are left out.
    """
    import onnxruntime as ort

    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options or session_options(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled_optimizers),
    )


def check_installed() -> None:
    """Check that exactly one ONNX Runtime package is installed, and whole.

    Raises:
        MissingExtraError: none, two that overwrite each other, or what is left of them.
    """
    from importlib import metadata

    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    if not found:
        raise MissingExtraError("ONNX Runtime is not installed", "pip install 'fpabee[cpu]'")
    if len(found) > 1:
        raise MissingExtraError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            f"keep one: {_AGAIN}",
        )
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX Runtime cannot be loaded: {first_line(error)}", f"install it again: {_AGAIN}"
        ) from error
    if not hasattr(ort, "InferenceSession"):
        raise MissingExtraError(
            "ONNX Runtime is damaged: its module is empty, as when one of its two packages was "
            "removed",
            f"install it again: {_AGAIN}",
        )


def check_device(device: str) -> None:
    """Check that ONNX Runtime can run on a device: none is the CPU, or `cuda`.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or twice.
        BackendError: it has no CUDA provider, or there is no GPU.
    """
    check_installed()
    if device != "cuda":
        return
    import onnxruntime as ort

    found = cuda_device()
    if found.error:
        raise BackendError(
            f"this target needs an NVIDIA GPU, and here {found.error}",
            "choose another target: --target onnxruntime-fp32",
        )
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            f"onnxruntime {ort.__version__} as installed here has no CUDA provider",
            "pip uninstall -y onnxruntime && pip install 'fpabee[gpu]'",
        )


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own exceptions share no base, and some are bare."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "DeviceReset",
        "EngineError",
        "EPFail",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "ModelRequiresCompilation",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    own = tuple(getattr(state, name) for name in names if hasattr(state, name))
    return (*own, RuntimeError, MemoryError)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a run failed for want of memory: ONNX Runtime says it in words only."""
    words = r"failed to allocate|bad.alloc|alloc_failed|out of memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))
