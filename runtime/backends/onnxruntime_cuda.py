"""ONNX Runtime's CUDA provider: the graphs as they are, hidden states on the device.

For GPUs that have no plans, and for those that TensorRT for RTX does not know. Buffers and
regrouping are in `device.py`; sessions write where they are told, on one stream for all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.folder import resolve, verified_graph
from ..artifact.manifest import Manifest, Target
from ..encoding import padding_values
from ..errors import ArtifactError, BackendError, first_line
from .base import Bucket, Limits
from .buffers import carried_specs, plan_buffers
from .cuda import cuda
from .device import DeviceExecution, Place
from .onnxruntime_session import (
    check_device,
    is_out_of_memory,
    ort_errors,
    session_options,
)

logger = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"

_GROUP_TOKENS = 4096
_MAX_BATCH = 256
_LENGTH_STEP = 16
# Everything is enqueued: whoever needs a result waits for its event.
_RUN_ENTRY = ("disable_synchronize_execution_providers", "1")
_NO_FALLBACK = ("session.disable_cpu_ep_fallback", "1")


class SessionRunner:
    """A session with everything bound to places on the device."""

    def __init__(self, session: Any, binding: Any, options: Any, graph: str) -> None:
        self._session = session
        self._binding = binding
        self._options = options
        self._graph = graph

    def run(self) -> None:
        """Put the graph into the stream."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except ort_errors() as error:
            raise BackendError(
                f"ONNX Runtime failed in {self._graph} on the GPU: {first_line(error)}",
                "check the free device memory with nvidia-smi"
                if is_out_of_memory(error)
                else "export the model again, or choose another --target",
            ) from error

    def can_capture(self) -> bool:
        """Sessions allocate and synchronise as they like."""
        return False

    def scratch_bytes(self) -> int:
        """Sessions bring their own."""
        return 0

    def use_scratch(self, pointer: int, size: int) -> None:
        """Sessions bring their own."""


class OnnxRuntimeCudaBackend:
    """Segments as sessions of the CUDA provider, loaded when first needed.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        target: the target's record.

    Raises:
        MissingExtraError: `onnxruntime-gpu` or `cuda-bindings` is not installed.
        BackendError: this ONNX Runtime has no CUDA provider, or there is no GPU.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: Target) -> None:
        check_device("cuda")
        self.cuda = cuda()
        self.stages = plan_buffers(manifest)
        self._graphs = manifest.graphs_in(target.precision)
        self.specs = carried_specs(self._graphs)
        self.padding = padding_values(manifest.tokenizer)
        self._folder = folder
        self._shapes = manifest.shapes
        self._stream = self.cuda.stream()
        self._sessions: dict[str, Any] = {}
        self._executions: list[DeviceExecution] = []
        self._lock = threading.Lock()
        self._closed = False
        for graph in self._graphs.values():
            resolve(folder, graph.file)

    def limits(self) -> Limits:
        """Any batch; lengths in steps that suit the GPU's matrix units."""
        longest = self._shapes.sequence.max
        steps = tuple(range(_LENGTH_STEP, longest, _LENGTH_STEP))
        rows = min(_MAX_BATCH, self._shapes.batch.max)
        return Limits(rows, longest, _GROUP_TOKENS, sequence_lengths=(*steps, longest))

    def open(self) -> DeviceExecution:
        """A new execution, for one thread, on the stream that all sessions use."""
        execution = DeviceExecution(self, self._stream)
        with self._lock:
            self._executions.append(execution)
        return execution

    def preload(self) -> None:
        """Load all segments now."""
        for name in self._graphs:
            self._session(name)

    def close(self) -> None:
        """Give all device memory back and drop the sessions."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for execution in self._executions:
                execution.close()
            self._executions.clear()
            self._sessions.clear()
        self.cuda.destroy_stream(self._stream)

    def check_bucket(self, bucket: Bucket) -> None:
        """Every shape runs."""

    def runner(
        self, graph: str, bucket: Bucket, places: Mapping[str, Place], stream: int
    ) -> SessionRunner:
        """A session of a graph, bound to places on the device."""
        session = self._session(graph)
        binding = session.io_binding()
        inputs = {spec.name for spec in self._graphs[graph].inputs}
        for name, place in places.items():
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, "cuda", 0, np.dtype(place.dtype), list(place.shape), place.pointer)
        return SessionRunner(session, binding, run_options(), graph)

    def _session(self, name: str) -> Any:
        session = self._sessions.get(name)
        if session is None:
            with self._lock:
                if self._closed:
                    raise BackendError("this engine is closed", "load it again with Engine.load")
                session = self._sessions.get(name) or self._load(name)
                self._sessions[name] = session
        return session

    def _load(self, name: str) -> Any:
        graph = self._graphs[name]
        path = verified_graph(self._folder, graph.file, graph.sha256)
        try:
            session = create_session(path, self._stream, _NO_FALLBACK)
        except ort_errors() as error:
            logger.warning(
                "%s does not run on the GPU alone (%s): the rest of it runs on the CPU",
                name,
                first_line(error),
            )
            session = self._with_cpu(path)
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(
                f"ONNX Runtime put {name} on {session.get_providers()[0]}, not on the GPU",
                "check the CUDA and cuDNN versions that this onnxruntime-gpu needs",
            )
        return session

    def _with_cpu(self, path: Path) -> Any:
        try:
            return create_session(path, self._stream)
        except ort_errors() as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load {path} on the GPU: {first_line(error)}",
                "update it: pip install -U 'fpabee[gpu]', or choose another --target",
            ) from error


def create_session(path: Path, stream: int, *entries: tuple[str, str]) -> Any:
    """A session on the first GPU that runs in a given stream; it fails where it cannot."""
    import onnxruntime as ort

    # A session with threads of its own is refused once a CPU target has set up the shared pool.
    options = session_options()
    for key, value in entries:
        options.add_session_config_entry(key, value)
    settings = {"device_id": "0", "user_compute_stream": str(stream)}
    # The CPU provider is there anyway; named here, it could not be refused. Nor may the whole
    # session move to it, which ONNX Runtime would do with a note on stdout.
    return ort.InferenceSession(
        str(path), options, providers=[(PROVIDER, settings)], enable_fallback=0
    )


def run_options() -> Any:
    """Options of a run that returns before the device has finished."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry(*_RUN_ENTRY)
    return options
