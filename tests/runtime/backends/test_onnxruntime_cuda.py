"""ONNX Runtime's CUDA provider, with sessions on the CPU: no fallback to the CPU is silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import Mock

import onnx
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fpabee.runtime import ArtifactError, BackendError
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.backends import onnxruntime_cuda
from fpabee.runtime.backends.onnxruntime import new_session
from fpabee.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from fpabee.runtime.machine import CudaDevice

from ...doubles.device import Double, set_gpu
from ...doubles.onnxruntime_cuda import FakeCudaSession


def test_a_fallback_is_never_silent(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each graph is loaded once, on the chosen GPU."""
    made = double(backend="onnxruntime")
    create = Mock(wraps=FakeCudaSession)
    monkeypatch.setattr(onnxruntime_cuda, "new_session", create)
    with made.load(device=1) as engine:
        engine.predict(["rain"] * 2)
    loaded = [call.args[0].name for call in create.call_args_list]
    assert len(loaded) == len(set(loaded)) > 1
    settings = {"device_id": "1", "use_tf32": "0"}
    assert create.call_args.kwargs == {"providers": [("CUDAExecutionProvider", settings)]}
    monkeypatch.setattr(FakeCudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    message = r"not on the GPU.* -> onnxruntime-gpu .*\[gpu-cu13\]"
    with made.load() as engine, pytest.raises(BackendError, match=message):
        engine.predict(["rain"])


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "modernbert"])
def test_graphs_compute_no_shapes_on_the_host(family: str, engines: Mapping[str, Path]) -> None:
    """Reshape keeps axes by number. The first segment and a window of attention count positions."""
    for path in sorted((engines[family] / "onnx/fp32").glob("*.onnx")):
        graph = onnx.load(path).graph
        constants = {tensor.name for tensor in graph.initializer}
        reshapes = [each for each in graph.node if each.op_type == "Reshape"]
        assert all(each.input[1] in constants for each in reshapes)
        kinds = {each.op_type for each in graph.node}
        if "Range" not in kinds and "Slice" not in kinds:
            assert "Shape" not in kinds


def test_it_needs_a_gpu_and_the_cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(backend="onnxruntime", precision="fp32", device="cuda", tolerance=None)
    set_gpu(monkeypatch, CudaDevice(error="there is no GPU"))
    with pytest.raises(BackendError, match=r"target x .*there is no GPU -> .*another `target`"):
        OnnxRuntimeCudaBackend.check(target, "x")
    set_gpu(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"has no CUDA provider.*\[gpu-cu13\]"):
        OnnxRuntimeCudaBackend.check(target, "x")


def test_no_session_moves_to_the_cpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock()
    monkeypatch.setattr(ort, "InferenceSession", made)
    new_session(b"", None)
    assert made.call_args.kwargs == {"enable_fallback": 0}


def test_cuda_libraries_are_loaded_and_standard_output_stays_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudnn.so\nand more"))
    onnxruntime_cuda._preload.cache_clear()
    assert onnxruntime_cuda._preload() == "Failed to load libcudnn.so"
    onnxruntime_cuda._preload.cache_clear()
    assert capsys.readouterr().out == ""


def test_a_graph_that_cannot_be_loaded_at_all(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double(backend="onnxruntime")
    fails = Mock(side_effect=RuntimeError("CUDA failure 100\nat line 7"))
    monkeypatch.setattr(onnxruntime_cuda, "new_session", fails)
    message = rf"load {made.target} of .*: CUDA failure 100 -> .*\[gpu-cu13\]"
    with made.load() as engine, pytest.raises(ArtifactError, match=message):
        engine.predict(["rain"])


@pytest.mark.parametrize("error", [RuntimeError, state.Fail, state.EPFail])
def test_a_run_that_fails_names_its_graph(
    error: type[Exception], double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double(backend="onnxruntime")
    message = r"segment_01 on 1 rows .*: out of memory.* not enough free memory"
    with made.load() as engine:
        with monkeypatch.context() as patch:
            fails = Mock(side_effect=error("out of memory"))
            patch.setattr(FakeCudaSession, "run", fails)
            with pytest.raises(BackendError, match=message):
                engine.predict(["rain"])
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"


@pytest.mark.parametrize(
    ("reason", "calls"),
    [
        ("CUDA failure 700: an illegal memory access", 1),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED", 1),
        ("CUDNN failure 5003: CUDNN_STATUS_EXECUTION_FAILED_CUDART", 1),
        ("CUDA failure 2: out of memory", 2),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", 2),
    ],
)
def test_a_gpu_is_called_again_unless_it_has_failed(
    reason: str, calls: int, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries number their errors differently; lack of memory ends one call only."""
    fails = Mock(side_effect=RuntimeError(f"{reason} ; GPU=0"))
    said = r"GPU 0 has failed: .* failure .* -> start this" if calls == 1 else reason
    with double(backend="onnxruntime").load() as engine:
        monkeypatch.setattr(FakeCudaSession, "run", fails)
        for _ in range(2):
            with pytest.raises(BackendError, match=said):
                engine.predict(["rain"])
        assert fails.call_count == calls
        assert bool(engine.core.backend.failed) == (calls == 1)
