"""ONNX Runtime's CUDA provider over a double of the driver: no fallback to the CPU is silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fpabee.runtime import ArtifactError, BackendError
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.backends import onnxruntime_cuda
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.backends.onnxruntime_cuda import (
    OnnxRuntimeCudaBackend,
    create_session,
    run_options,
)

from ...doubles.device import Double, set_gpu
from ...doubles.onnxruntime_cuda import FakeCudaSession


def test_a_fallback_is_never_silent(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = double(backend="onnxruntime")
    create = onnxruntime_cuda.create_session

    def refuses_fallback(path: Path, stream: int, *entries: tuple[str, str]) -> Any:
        if entries:
            raise RuntimeError("nodes are assigned to the default CPU EP")
        return create(path, stream)

    monkeypatch.setattr(onnxruntime_cuda, "create_session", refuses_fallback)
    with made.load() as engine:
        engine.predict(["rain"])
    assert "segment_01 cannot run on the GPU alone (nodes are assigned" in caplog.text
    monkeypatch.setattr(FakeCudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with made.load() as engine, pytest.raises(BackendError, match="not on the GPU"):
        engine.predict(["rain"])


def test_it_needs_a_gpu_and_the_cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(backend="onnxruntime", precision="fp32", device="cuda", tolerance=None)
    set_gpu(monkeypatch, CudaDevice(error="there is no GPU"))
    with pytest.raises(BackendError, match=r"target x .*there is no GPU -> .*another target"):
        OnnxRuntimeCudaBackend.check(target, "x")
    set_gpu(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"has no CUDA provider.*fpabee\[gpu\]"):
        OnnxRuntimeCudaBackend.check(target, "x")


def test_nothing_may_fall_back_to_the_cpu(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a node nor the whole session; and it runs in the given stream."""
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **others: made.append((options, others))
    )
    create_session(engines["bert"] / "x.onnx", 7, onnxruntime_cuda._NO_FALLBACK)
    ((options, others),) = made
    settings = {"device_id": "0", "user_compute_stream": "7"}
    assert others == {"providers": [("CUDAExecutionProvider", settings)], "enable_fallback": 0}
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    entry = "disable_synchronize_execution_providers"
    assert run_options().get_run_config_entry(entry) == "1", "a run does not wait for the device"


def test_a_graph_that_cannot_be_loaded_at_all(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double(backend="onnxruntime")

    def fails(path: Path, stream: int, *entries: tuple[str, str]) -> Any:
        raise RuntimeError("CUDA failure 100\nat line 7")

    monkeypatch.setattr(onnxruntime_cuda, "create_session", fails)
    message = r"segment_01\.onnx on the GPU: CUDA failure 100 -> .*fpabee\[gpu\]"
    with made.load() as engine, pytest.raises(ArtifactError, match=message):
        engine.predict(["rain"])


@pytest.mark.parametrize("error", [RuntimeError, state.Fail, state.EPFail])
def test_a_run_that_fails_names_its_graph(
    error: type[Exception], double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double(backend="onnxruntime")
    run = FakeCudaSession.run_with_iobinding

    def fails(session: Any, binding: Any, options: Any) -> None:
        raise error("out of memory")

    with made.load() as engine:
        monkeypatch.setattr(FakeCudaSession, "run_with_iobinding", fails)
        with pytest.raises(BackendError, match=r"segment_01 on the GPU: out of memory.*nvidia-smi"):
            engine.predict(["rain"])
        monkeypatch.setattr(FakeCudaSession, "run_with_iobinding", run)
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"
    assert made.cuda.memory_of == {}
