"""ONNX Runtime's CUDA provider: the ONNX graphs as they are, hidden states on the device.

For GPUs that no plans were built for, and for those that TensorRT for RTX does not support.
Buffers and regrouping are in `device.py`. All sessions run in one stream.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.folder import EnginesFolder
from ..artifact.manifest import Target
from ..errors import ArtifactError, BackendError, first_line
from .base import Bucket, Limits, is_out_of_memory, shape_of
from .cuda import packages, required_gpu
from .device import DeviceBackend, DeviceExecution, Runner
from .onnxruntime import check_installed, new_session, ort_errors, session_options

logger = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"

_GROUP_TOKENS = 4096
_MAX_BATCH = 256
_LENGTH_STEP = 16
# Their inputs are sizes, which the host knows.
_SHAPE_NODES = {"Shape", "Squeeze", "Unsqueeze", "Concat", "Range"}


class OnnxRuntimeCudaBackend(DeviceBackend):
    """Graphs as sessions of the CUDA provider; see `Backend`."""

    def __init__(self, engines: EnginesFolder, name: str, threads: int | None = None) -> None:
        super().__init__(engines, name, threads)
        self.stream: int = self.cuda.stream()

    @staticmethod
    def check(target: Target, name: str) -> None:
        """Check that there are a GPU and the CUDA provider; see `Backend.check`."""
        required_gpu(name)  # first, because the import takes long
        check_installed()
        import onnxruntime as ort

        if PROVIDER not in ort.get_available_providers():
            raise BackendError(
                f"the installed onnxruntime {ort.__version__} has no CUDA provider",
                f"pip uninstall -y onnxruntime && pip install {packages('gpu')}",
            )

    def limits(self) -> Limits:
        """Batches in powers of two, so that few shapes need memory, and few lengths.

        The lengths suit the matrix units of a GPU.
        """
        longest = self._shapes.sequence.max
        rows = min(_MAX_BATCH, self._shapes.batch.max)
        powers_of_two = [2**power for power in range(rows.bit_length()) if 2**power < rows]
        return Limits(
            max_batch=rows,
            max_sequence=longest,
            group_tokens=_GROUP_TOKENS,
            batch_sizes=(*powers_of_two, rows),
            sequence_lengths=(*range(_LENGTH_STEP, longest, _LENGTH_STEP), longest),
        )

    def runner(
        self, graph: str, bucket: Bucket, addresses: Mapping[str, int], execution: DeviceExecution
    ) -> Runner:
        """A session of a graph, bound to addresses on the device."""
        session = self.graph(graph)
        binding = session.io_binding()
        record = self.graphs[graph]
        for specs, bind in (
            (record.inputs, binding.bind_input),
            (record.outputs, binding.bind_output),
        ):
            for spec in specs:
                shape = list(shape_of(spec, bucket))
                bind(spec.name, "cuda", 0, np.dtype(spec.dtype), shape, addresses[spec.name])
        options = run_options()

        def run() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except ort_errors() as error:
                raise BackendError(
                    f"ONNX Runtime failed in {graph} on the GPU: {first_line(error)}",
                    "check the free device memory with nvidia-smi"
                    if is_out_of_memory(error)
                    else "export the model again, or choose another `target`",
                ) from error

        return run

    def _load(self, name: str) -> Any:
        import onnxruntime as ort

        file = self._file(name)
        path = self._engines.graph(file)
        problems = _preload()
        try:
            session = create_session(path, self.stream)
        except ort_errors() as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load {path} on the GPU: {first_line(error)}",
                f"pip install -U {packages('gpu')}, or choose another `target`",
            ) from error
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(
                f"ONNX Runtime put {name} on {session.get_providers()[0]}, not on the GPU"
                + (f": {problems}" if problems else ""),
                f"onnxruntime-gpu {ort.__version__} needs other CUDA or cuDNN libraries: "
                f"pip install -U {packages('gpu')}",
            )
        on_cpu = nodes_on_cpu(session)
        if on_cpu:
            logger.warning(
                "%s: nodes run on the CPU, such as %s (%d in all), so it is slower than it could "
                "be; export the model again",
                name,
                on_cpu[0],
                len(on_cpu),
            )
        return session

    def _free(self) -> None:
        super()._free()  # sessions must be freed before the stream that they use
        self.cuda.destroy_stream(self.stream)


def create_session(path: Path, stream: int) -> Any:
    """A session on the first GPU.

    Args:
        path: the ONNX file.
        stream: the CUDA stream that it runs in.
    """
    options = session_options(threads=1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # As in plans, heads in fp32 are not rounded to TF32.
    settings = {"device_id": "0", "user_compute_stream": str(stream), "use_tf32": "0"}
    return new_session(path, options, providers=[(PROVIDER, settings)])


def nodes_on_cpu(session: Any) -> list[str]:
    """The nodes of a session that run on the CPU, except those that compute shapes.

    Empty before ONNX Runtime 1.24, which does not tell.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", list)
    return [
        node.name
        for part in ask()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type not in _SHAPE_NODES
    ]


@functools.cache
def _preload() -> str:
    """Load the CUDA libraries that pip installed; returns the first problem, or nothing."""
    import onnxruntime as ort

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    return printed.getvalue().partition("\n")[0]


def run_options() -> Any:
    """Options of a run that returns before the device has finished."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
