"""Fixtures of the commands `fpabee-run` and `fpabee-serve`."""

from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fpabee.commands import run as run_command
from fpabee.commands import serve as serve_command
from fpabee.runtime import Confidence, Engine, ExitRule, TopK
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest, sha256_of
from fpabee.runtime.backends.buffers import Limits
from fpabee.runtime.backends.host import HostBackend

from ..doubles.device import Double, install, install_cuda_provider
from .running import Result, Run, execute
from .watching import EARLY, promising


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `fpabee-run` in this process."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return execute(run_command.main, capfd, arguments)

    return run


@pytest.fixture
def serve(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `fpabee-serve`, which is to end at once, in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: execute(serve_command.main, capfd, arguments)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def short_target(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets take 16 tokens, although the models take more."""
    assert bert.is_dir()  # its export has run longer rows
    limits = HostBackend.limits

    def short(backend: HostBackend) -> Limits:
        return dataclasses.replace(limits(backend), max_sequence=16)

    monkeypatch.setattr(HostBackend, "limits", short)


@pytest.fixture
def bert(engines: Mapping[str, Path]) -> Path:
    return engines["bert"]


@pytest.fixture
def ranker(
    ranking_engines: Mapping[str, Path], set_points: Callable[..., None], tmp_path: Path
) -> Path:
    """An engines folder that ranks, with an operating point for the best three."""
    folder = Path(shutil.copytree(ranking_engines["bert"], tmp_path / "ranker"))
    set_points(
        folder, default="changed-5", **{"changed-5": TopK(top=3, threshold=(-0.3, -0.2, 0.0))}
    )
    return folder


@pytest.fixture
def scored_ranker(
    first_stage_engines: Mapping[str, Path], set_points: Callable[..., None], tmp_path: Path
) -> Path:
    """The same with an exit 0, which predicts from the scores of a search."""
    folder = Path(shutil.copytree(first_stage_engines["bert"], tmp_path / "scored-ranker"))
    rule = TopK(top=3, threshold=(-0.3, -0.2, 0.0), exit_0_threshold=-1.0)
    set_points(folder, default="changed-5", **{"changed-5": rule})
    return folder


@pytest.fixture
def without_special_tokens(engine_copy: Callable[..., Path]) -> Path:
    """An engines folder whose tokenizer gives no token for an empty text."""
    folder = engine_copy()
    manifest = read_manifest(folder)
    path = folder / manifest.tokenizer.file
    content = msgspec.json.decode(path.read_bytes())
    content["post_processor"] = None
    path.write_bytes(msgspec.json.encode(content))
    spec = msgspec.structs.replace(manifest.tokenizer, sha256=sha256_of(path))
    EnginesFolder(folder, manifest).with_manifest(tokenizer=spec).write()
    return folder


@pytest.fixture(
    params=itertools.product((False, True), (False, True)),
    ids=lambda place: f"device {place[0]}, exit 0 {place[1]}",
)
def watching(
    request: pytest.FixtureRequest,
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    """An engine that watches all rows, on the CPU or on a double of a device."""
    on_device, exit_0 = request.param
    folder = engine_copy(exit_0=exit_0)
    rule = Confidence(threshold=0.5, exit_0_threshold=0.6 if exit_0 else None)
    target = install(monkeypatch, folder).target if on_device else ""
    promising(folder, set_points, target=target, early=rule)
    with Engine.load(folder, target or None, watch=100.0) as engine:
        yield engine


@pytest.fixture
def promised(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> Callable[..., Path]:
    """A folder whose points promise at most some changed answers."""

    def make(**settings: Any) -> Path:
        if not any(isinstance(value, ExitRule) for value in settings.values()):
            settings["early"] = EARLY
        return promising(engine_copy(), set_points, **settings)

    return make


@pytest.fixture
def double(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Double]:
    """Makes a folder with a target of TensorRT, or of ONNX Runtime's CUDA provider."""

    def make(family: str = "bert", **settings: Any) -> Double:
        if settings.get("backend") == "onnxruntime":
            return install_cuda_provider(monkeypatch, engine_copy(family))
        return install(monkeypatch, engine_copy(family), **settings)

    return make


@pytest.fixture
def made(double: Callable[..., Double]) -> Double:
    """A folder with a target of TensorRT."""
    return double()


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join groups on the CPU, as devices do."""
    monkeypatch.setattr(HostBackend, "joins", True)


@pytest.fixture(params=[False, True], ids=["", "joins"])
def as_on_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a CPU, and as on a device: groups join, and two are in flight."""
    if request.param:
        monkeypatch.setattr(HostBackend, "joins", True)
        monkeypatch.setattr(HostBackend, "in_flight", 2)
