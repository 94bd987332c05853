"""ONNX Runtime's CUDA provider, over a double of the driver; no session falls back in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fpabee.runtime import ArtifactError, BackendError, Engine, FPabee, read_manifest
from fpabee.runtime.backends import onnxruntime_cuda
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.backends.onnxruntime_cuda import create_session, run_options

from ...doubles.device import Double, install_cuda_provider, set_gpu
from ...doubles.onnxruntime_cuda import FakeCudaSession

TEXTS = ["the film is not good", "rain", "", "turn the lights on and play music", "book a table"]
RULE = FPabee(threshold=0.45)
UNAVAILABLE = "ignore:Specified provider 'CUDAExecutionProvider' is not in available"


def load(double: Double, **settings: Any) -> Engine:
    return Engine.load(double.folder, target=double.target, rule=RULE, **settings)


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_answers_are_those_of_the_cpu(
    family: str, engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy(family)
    made = install_cuda_provider(monkeypatch, folder)
    with load(made, preload=True) as engine, Engine.load(folder) as usual:
        for texts in (TEXTS, TEXTS[:1]):
            found, expected = (each.trace(texts, rule=RULE) for each in (engine, usual))
            np.testing.assert_array_equal(found.exits, expected.exits)
            np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        assert made.cuda.graphs == {}, "sessions are not captured"
    assert made.cuda.memory_of == {}
    assert made.cuda.streams == {}


def test_it_never_falls_back_in_silence(
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = engine_copy()
    made = install_cuda_provider(monkeypatch, folder)
    create = onnxruntime_cuda.create_session

    def refuses_fallback(path: Path, stream: int, *entries: tuple[str, str]) -> Any:
        if entries:
            raise RuntimeError("nodes are assigned to the default CPU EP")
        return create(path, stream)

    monkeypatch.setattr(onnxruntime_cuda, "create_session", refuses_fallback)
    with load(made) as engine:
        engine.predict(["rain"])
    assert "segment_01 cannot run on the GPU alone (nodes are assigned" in caplog.text
    monkeypatch.setattr(FakeCudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with load(made) as engine, pytest.raises(BackendError, match="not on the GPU"):
        engine.predict(["rain"])


def test_it_needs_a_gpu_and_its_package(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = install_cuda_provider(patch, engine_copy())
    set_gpu(monkeypatch, CudaDevice(error="there is no GPU"))
    with pytest.raises(BackendError, match=r"NVIDIA GPU.*there is no GPU -> .*another target"):
        load(made)
    set_gpu(monkeypatch)
    with pytest.raises(BackendError, match=r"has no CUDA provider.*fpabee\[gpu\]"):
        load(made)


def test_nothing_may_fall_back_to_the_cpu(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a node, and not the session; it runs in the stream that it is given."""
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **others: made.append((options, others))
    )
    create_session(engines["bert"] / "x.onnx", 7, onnxruntime_cuda._NO_FALLBACK)
    ((options, others),) = made
    settings = {"device_id": "0", "user_compute_stream": "7"}
    assert others == {"providers": [("CUDAExecutionProvider", settings)], "enable_fallback": 0}
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_run_does_not_wait_for_the_device() -> None:
    entry = "disable_synchronize_execution_providers"
    assert run_options().get_run_config_entry(entry) == "1"


@pytest.mark.skipif(
    onnxruntime_cuda.PROVIDER in ort.get_available_providers(), reason="it has the CUDA provider"
)
@pytest.mark.filterwarnings(UNAVAILABLE)
def test_an_onnxruntime_without_cuda_is_refused(
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ONNX Runtime only warns, and gives a session on the CPU; a CPU target runs beside it."""
    made = install_cuda_provider(monkeypatch, engine_copy())
    monkeypatch.setattr(onnxruntime_cuda, "create_session", create_session)
    with Engine.load(made.folder) as usual:
        assert len(usual.predict(["rain"])) == 1
        with (
            load(made) as engine,
            pytest.raises(BackendError, match=r"put segment_01 on CPUExecutionProvider, not on"),
        ):
            engine.predict(["rain"])
    assert capsys.readouterr().out == ""


def test_a_graph_that_cannot_be_loaded_at_all(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install_cuda_provider(monkeypatch, engine_copy())

    def fails(path: Path, stream: int, *entries: tuple[str, str]) -> Any:
        raise RuntimeError("CUDA failure 100\nat line 7")

    monkeypatch.setattr(onnxruntime_cuda, "create_session", fails)
    message = r"segment_01\.onnx on the GPU: CUDA failure 100 -> .*fpabee\[gpu\]"
    with load(made) as engine, pytest.raises(ArtifactError, match=message):
        engine.predict(["rain"])


@pytest.mark.parametrize("error", [RuntimeError, state.Fail, state.EPFail])
def test_a_run_that_fails_names_its_graph(
    error: type[Exception], engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install_cuda_provider(monkeypatch, engine_copy())
    run = FakeCudaSession.run_with_iobinding

    def fails(session: Any, binding: Any, options: Any) -> None:
        raise error("out of memory")

    with load(made) as engine:
        monkeypatch.setattr(FakeCudaSession, "run_with_iobinding", fails)
        with pytest.raises(BackendError, match=r"segment_01 on the GPU: out of memory.*nvidia-smi"):
            engine.predict(["rain"])
        monkeypatch.setattr(FakeCudaSession, "run_with_iobinding", run)
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"
    assert made.cuda.memory_of == {}


def test_buffers_for_which_there_is_no_room(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install_cuda_provider(monkeypatch, engine_copy())
    with load(made) as engine:
        made.cuda.room = 64
        with pytest.raises(BackendError, match=r"no room for 0\.\d MiB: 0 of 0 MiB are free"):
            engine.predict(["rain"])


def test_lengths_are_padded_in_steps(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install_cuda_provider(monkeypatch, engine_copy())
    longest = read_manifest(made.folder).tokenizer.max_length
    with load(made) as engine:
        assert engine.limits.sequence_lengths == (*range(16, longest, 16), longest)
        assert engine.limits.bucket(3, 17).sequence == 32
