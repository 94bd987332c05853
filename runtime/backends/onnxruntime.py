"""ONNX Runtime on the CPU.

Three things make the chain as fast as one graph of the whole model:

- one pool of threads for all segments, because the idle threads of several pools spin against each
  other (measured: up to 18 times slower)
- one arena, so that segments use the same warm memory again (1.2 times)
- prepared IO bindings over pooled buffers

So one session holds all segments. The pool and the arena are its own, and nothing of the process
changes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Target, TensorSpec
from ..errors import EXPORT_AGAIN, ArtifactError, MissingExtraError, first_line
from ..machine import package, usable_cores
from .buffers import Bucket, dtype_of, shape_of
from .host import HostBackend, Run
from .one_graph import one_graph

logger = logging.getLogger(__name__)

# The fused kernel is slower than its parts.
_DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
# How long idle threads keep a core busy: until the next segment, but hardly after the last one.
# Releases before 1.26 may not know the setting; theirs do so for about 30 milliseconds.
_SPIN_MICROSECONDS = 200
_REINSTALL = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {package('cpu')}"


def ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises; its own have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = (value for value in vars(state).values() if isinstance(value, type))
    own = (each for each in classes if issubclass(each, Exception))
    return (*own, RuntimeError, MemoryError)


class OnnxRuntimeBackend(HostBackend):
    """One session of ONNX Runtime that holds all graphs; see `Backend`."""

    library = "ONNX Runtime"
    update = f"pip install -U {package('cpu')}"
    failures = staticmethod(ort_errors)

    @staticmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check that exactly one ONNX Runtime is installed; see `HostBackend.check`."""
        check_installed()
        HostBackend.check(target, name, device)

    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> Any:
        """An `OrtValue` over an array's memory."""
        return _value(array)

    def bind(self, graph: str, tensors: Mapping[str, Any]) -> Run:
        """Bind the session to tensors, and to the choice of a graph."""
        session = self.graph(graph)
        binding = session.io_binding()
        outputs = tensors.keys() & self._outputs.keys()
        for name in outputs:
            binding.bind_ortvalue_output(self._outputs[name], tensors[name])
        inputs = {name: tensors[name] for name in tensors.keys() - outputs}
        for name, value in (self._unread | self._choices[graph] | inputs).items():
            binding.bind_ortvalue_input(name, value)
        return partial(session.run_with_iobinding, binding)

    def read(self, name: str) -> Any:
        """The session, which also serves all other graphs."""
        files = {graph: self._file(graph) for graph in self.graphs}
        paths = {graph: self._engines.graph(file) for graph, file in files.items()}
        try:
            joined = one_graph(paths)
        except ValueError as error:
            raise ArtifactError(
                f"the ONNX graphs in {self._engines.path} cannot run together: {error}",
                EXPORT_AGAIN,
            ) from error
        options = session_options(self.threads)
        where = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(where, str(joined.folder))
        session = cpu_session(joined.model, options)
        self._outputs = joined.outputs
        self._choices = {
            graph: {name: _value(np.array(value)) for name, value in choice.items()}
            for graph, choice in joined.choices.items()
        }
        # A run needs all inputs, also those that the chosen graph does not read.
        self._unread = {
            spec.name: _value(np.zeros(shape_of(spec, Bucket(1, 1)), dtype_of(spec)))
            for graph in self.graphs.values()
            for spec in graph.inputs
        }
        self._loaded = dict.fromkeys(self.graphs, session)
        return session


def session_options(threads: int | None = None) -> Any:
    """Options of a session with a pool of its own.

    Args:
        threads: CPU threads; default: the usable cores.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or installed twice.
    """
    check_installed()
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors also arrive as exceptions
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Shapes vary from group to group, so memory patterns of earlier shapes are of no use.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    spin = "session.intra_op.spin_duration_us"
    options.add_session_config_entry(spin, str(_SPIN_MICROSECONDS))
    return options


def cpu_session(model: Path | bytes, options: Any = None) -> Any:
    """A session on the CPU, with the same optimizations for targets, checks and baselines.

    Args:
        model: an ONNX file, or its content.
        options: the session's options; default: `session_options()`.
    """
    return new_session(
        model,
        options or session_options(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=_DISABLED_OPTIMIZERS,
    )


def new_session(model: Path | bytes, options: Any, **settings: Any) -> Any:
    """A session, which uses the pool of the process if the application has set up one.

    Args:
        model: an ONNX file, or its content.
        options: the session's options.
        settings: other arguments of `InferenceSession`.
    """
    import onnxruntime as ort

    content = model if isinstance(model, bytes) else str(model)
    # Otherwise, ONNX Runtime prints that it moves the session to the CPU, and does so.
    make = partial(ort.InferenceSession, content, options, enable_fallback=0, **settings)
    try:
        return make()
    except ort_errors() as error:
        if "use_per_session_threads" not in str(error):
            raise
    logger.warning("the application has set up a pool for ONNX Runtime, so `threads` has no effect")
    options.use_per_session_threads = False
    return make()


def check_installed() -> None:
    """Check that exactly one ONNX Runtime package is installed, and that it is complete.

    Raises:
        MissingExtraError: no package, a damaged one, or two that overwrite each other.
    """
    from importlib import metadata

    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            installed.append(metadata.distribution(name))
    if not installed:
        raise MissingExtraError("ONNX Runtime is not installed", f"pip install {package('cpu')}")
    if len(installed) > 1:
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


def _value(array: NDArray[Any]) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)
