"""ONNX Runtime's CUDA provider: the ONNX graphs as they are, for GPUs that no plans were built for.

Each segment reads arrays of the host and writes arrays of the host, so hidden states are copied to
the GPU and back. Plans of TensorRT keep them there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import weakref
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from ..artifact.folder import EnginesFolder
from ..artifact.manifest import Target, TensorSpec
from ..errors import START_AGAIN, BackendError
from .cuda import FINAL, packages, required_gpu
from .host import HostBackend, Run
from .onnxruntime import check_installed, new_session, ort_errors, session_options

PROVIDER = "CUDAExecutionProvider"

# cuBLAS and cuDNN number errors in their own way, and call all that break the device this.
_FAILURE = re.compile(r"CUDA failure (\d+)|(?:CUBLAS|CUDNN) failure \d+: \w*EXECUTION_FAILED")


class OnnxRuntimeCudaBackend(HostBackend):
    """Graphs as sessions of the CUDA provider; see `Backend`."""

    joins = True
    library = "ONNX Runtime"
    failures = staticmethod(ort_errors)

    def __init__(
        self, engines: EnginesFolder, name: str, threads: int | None = None, device: int = 0
    ) -> None:
        super().__init__(engines, name, threads, device)
        self.update = f"pip install -U {packages('gpu')}"
        self._failed = ""

    @staticmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check that there are a GPU and the CUDA provider; see `Backend.check`."""
        required_gpu(name, device)  # first, because the import takes long
        check_installed()
        import onnxruntime as ort

        if PROVIDER not in ort.get_available_providers():
            raise BackendError(
                f"the installed onnxruntime {ort.__version__} has no CUDA provider",
                f"pip uninstall -y onnxruntime && pip install {packages('gpu')}",
            )

    @property
    def failed(self) -> str:
        """Why the device cannot be used any more; see `Backend.failed`."""
        return self._failed

    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
        """The array."""
        return array

    def bind(self, graph: str, tensors: Mapping[str, NDArray[Any]]) -> Run:
        """A run of a graph, which copies its outputs into their arrays."""
        session = self.graph(graph)
        outputs = [spec.name for spec in self.graphs[graph].outputs]
        inputs = {spec.name: tensors[spec.name] for spec in self.graphs[graph].inputs}
        backend = weakref.proxy(self)  # no cycle, as in `HostExecution`

        def run() -> None:
            try:
                values = session.run(outputs, inputs)
            except ort_errors() as error:
                failure = _FAILURE.search(str(error))
                if failure is None or (failure[1] and int(failure[1]) not in FINAL):
                    raise
                reason = f"GPU {backend.device} has failed: ONNX Runtime reports {failure[0]}"
                backend._failed = reason
                raise BackendError(reason, START_AGAIN) from error
            for name, value in zip(outputs, values, strict=True):
                tensors[name][...] = value

        return run

    def read(self, name: str) -> Any:
        """A session on the GPU."""
        import onnxruntime as ort

        problems = _preload()
        # As in plans, heads in fp32 are not rounded to TF32.
        settings = {"device_id": str(self.device), "use_tf32": "0"}
        session = new_session(
            self._engines.graph(self._file(name)),
            session_options(threads=1),
            providers=[(PROVIDER, settings)],
        )
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(
                f"ONNX Runtime put {name} on {session.get_providers()[0]}, not on the GPU"
                + (f": {problems}" if problems else ""),
                f"onnxruntime-gpu {ort.__version__} needs other CUDA or cuDNN libraries: "
                f"pip install -U {packages('gpu')}",
            )
        return session


@functools.cache
def _preload() -> str:
    """Load the CUDA libraries that pip installed; returns the first problem, or nothing."""
    import onnxruntime as ort

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    return printed.getvalue().partition("\n")[0]
