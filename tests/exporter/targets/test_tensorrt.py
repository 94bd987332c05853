"""Plans of TensorRT for RTX, really built here, and what is refused before or after."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from onnx import helper

from fpabee.exporter.precision.float16 import add_half
from fpabee.exporter.precision.formats import Half
from fpabee.exporter.targets import tensorrt
from fpabee.exporter.targets.options import RTX, TENSORRT, PlanOptions
from fpabee.exporter.targets.plan_worker import PlanRequest, PlanResult
from fpabee.exporter.targets.tensorrt import build_target
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    FPabee,
    MissingExtraError,
    VerificationError,
)
from fpabee.runtime.artifact.folder import read_manifest, sha256_of, write_manifest
from fpabee.runtime.artifact.manifest import Manifest
from fpabee.runtime.backends.cuda_probe import CudaDevice

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

UNMADE = helper.make_node("MatMul", ["no", "where"], ["product"])
SMALL = PlanOptions(batch=(1, 2, 4), sequence=(8, 16, 32), compute_capabilities=("8.6",))


@pytest.fixture
def half(engine_copy: Callable[..., Path]) -> Callable[..., tuple[Path, Manifest]]:
    """Engines folders with fp16 graphs."""

    def make(family: str = "bert") -> tuple[Path, Manifest]:
        folder = engine_copy(family)
        manifest, _ = add_half(folder, read_manifest(folder), Half.FP16, FPabee(threshold=0.5))
        write_manifest(folder, manifest)
        return folder, manifest

    return make


def noted_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the plans that are built from here on."""
    built: list[str] = []
    worker = tensorrt._run_worker

    def noted(request: PlanRequest) -> PlanResult:
        built.append(Path(request.plan).stem)
        return worker(request)

    monkeypatch.setattr(tensorrt, "_run_worker", noted)
    return built


def damage(folder: Path, manifest: Manifest, name: str, node: Any = UNMADE) -> Manifest:
    """The manifest with a graph of one node that no parser takes, rightly hashed."""
    graph = manifest.precisions["fp16"][name]
    damaged = helper.make_model(helper.make_graph([node], "damaged", [], []))
    (folder / graph.file).write_bytes(damaged.SerializeToString())
    broken = msgspec.structs.replace(graph, sha256=sha256_of(folder / graph.file))
    graphs = {**manifest.precisions["fp16"], name: broken}
    return msgspec.structs.replace(manifest, precisions={"fp16": graphs})


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "deberta-v2"])
def test_every_graph_becomes_one_plan(
    family: str, half: Callable[..., tuple[Path, Manifest]]
) -> None:
    folder, before = half(family)
    seen: list[tuple[int, int]] = []
    manifest, name = build_target(
        folder,
        before,
        RTX,
        "fp16",
        SMALL,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert name == "tensorrt-rtx-fp16"
    target = manifest.targets[name]
    graphs = manifest.precisions["fp16"]
    assert target.files.keys() == graphs.keys()
    for graph, file in target.files.items():
        assert (folder / file.file).stat().st_size > 1000
        assert sha256_of(folder / file.file) == file.sha256
        assert file.onnx_sha256 == graphs[graph].sha256
    assert seen == [(number, len(graphs)) for number in range(len(graphs) + 1)]
    assert target.compute_capabilities == ("8.6",)
    assert target.tolerance is None
    assert [(p.sequence.min, p.sequence.max) for p in target.profiles] == [(8, 16), (17, 32)]
    assert target.batch_sizes == (1, 2, 4)
    assert target.sequence_lengths == (8, 16, 24, 32)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_resume_builds_only_what_is_missing(
    half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    first, name = build_target(folder, manifest, RTX, "fp16", SMALL, jobs=2)
    (folder / first.targets[name].files["segment_02"].file).unlink()
    built = noted_builds(monkeypatch)
    again, _ = build_target(folder, manifest, RTX, "fp16", SMALL, resume=True)
    assert built == ["segment_02"]
    for graph in ("segment_01", "segment_03"):
        assert again.targets[name].files[graph] == first.targets[name].files[graph]
    other = dataclasses.replace(SMALL, batch=(1, 1, 2))
    build_target(folder, manifest, RTX, "fp16", other, resume=True)
    assert len(built) == 4, "plans of other shapes are not these"


def test_one_failed_segment_leaves_the_others(
    half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    whole = folder / manifest.precisions["fp16"]["segment_02"].file
    content = whole.read_bytes()
    broken = damage(folder, manifest, "segment_02")
    with pytest.raises(BackendError) as caught:
        build_target(folder, broken, RTX, "fp16", SMALL)
    message = str(caught.value)
    assert "1 of 3 plans could not be built, first segment_02: parser" in message
    assert "--resume" not in message, "it would fail again"
    assert "try another precision (--bf16)" in message
    assert f"fpabee-run {folder} --input texts.txt --target onnxruntime-fp32" in message
    assert "fpabee-inspect --env" in message
    plans = folder / "targets" / "tensorrt-rtx-fp16"
    assert sorted(p.name for p in plans.glob("*.plan")) == ["segment_01.plan", "segment_03.plan"]
    whole.write_bytes(content)
    built = noted_builds(monkeypatch)
    mended, name = build_target(folder, manifest, RTX, "fp16", SMALL, resume=True)
    assert built == ["segment_02"]
    assert mended.targets[name].files.keys() == manifest.graphs.keys()


def test_a_graph_with_control_flow_reaches_no_builder(
    half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    body = helper.make_graph([], "body", [], [])
    loop = helper.make_node("Loop", ["", ""], [], body=body)
    built = noted_builds(monkeypatch)
    with pytest.raises(ArtifactError, match=r"segment_01\.onnx has a node .*control flow"):
        build_target(folder, damage(folder, manifest, "segment_01", loop), RTX, "fp16", SMALL)
    assert "segment_01" not in built


@pytest.mark.parametrize("error", ["Out of Memory in segment", "std::bad_alloc"])
def test_a_build_without_memory_may_be_repeated(
    error: str, half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    monkeypatch.setattr(tensorrt, "_run_worker", lambda request: PlanResult(error=error))
    command = rf"fewer jobs: fpabee-export --from {folder} --backend tensorrt-rtx --fp16 --resume$"
    with pytest.raises(BackendError, match=command):
        build_target(folder, manifest, RTX, "fp16", SMALL)


def test_a_plan_that_is_refused_leaves_the_others(
    half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    worker = tensorrt._run_worker

    def silent(request: PlanRequest) -> PlanResult:
        result = worker(request)
        is_wrong = request.plan.endswith("segment_01.plan")
        return msgspec.structs.replace(result, dtypes={}) if is_wrong else result

    monkeypatch.setattr(tensorrt, "_run_worker", silent)
    with pytest.raises(VerificationError) as caught:
        build_target(folder, manifest, RTX, "fp16", SMALL)
    message = str(caught.value)
    assert "1 of 3 plans could not be built, first segment_01.plan is not in fp16: its" in message
    assert "try another precision (--bf16)" in message
    plans = folder / "targets" / "tensorrt-rtx-fp16"
    assert sorted(p.name for p in plans.glob("*.plan")) == ["segment_02.plan", "segment_03.plan"]
    monkeypatch.setattr(tensorrt, "_run_worker", worker)
    built = noted_builds(monkeypatch)
    build_target(folder, manifest, RTX, "fp16", SMALL, resume=True)
    assert built == ["segment_01"]


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        ("fp16", "9.0", r"no support for compute capability 9\.0.*--backend tensorrt"),
        ("fp16", "8.7", r"no support for compute capability 8\.7"),
        ("fp32", "7.5", r"no fp32 matrix products on compute capability 7\.5.*--fp16"),
        ("bf16", "7.5", r"no bf16 matrix products on compute capability 7\.5.*--fp16"),
    ],
)
def test_gpus_that_cannot_be_built_for_are_refused(
    precision: str, capability: str, message: str, half: Callable[..., tuple[Path, Manifest]]
) -> None:
    folder, manifest = half()
    graphs = {**manifest.precisions, "bf16": manifest.precisions["fp16"]}
    manifest = msgspec.structs.replace(manifest, precisions=graphs)
    options = dataclasses.replace(SMALL, compute_capabilities=(capability,))
    with pytest.raises(BackendError, match=message):
        build_target(folder, manifest, RTX, precision, options)


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_fp16_builds_for_every_gpu_that_rtx_knows(
    family: str, half: Callable[..., tuple[Path, Manifest]]
) -> None:
    """Also for Turing, which has no fp32 products: those of the heads are in fp16 there."""
    folder, manifest = half(family)
    every = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    options = dataclasses.replace(SMALL, compute_capabilities=every)
    built, name = build_target(folder, manifest, RTX, "fp16", options)
    assert built.targets[name].compute_capabilities == every


@pytest.mark.parametrize("setting", ["version_compatible", "hardware_compatible"])
def test_rtx_plans_are_for_one_release_and_the_gpus_named(
    setting: str, half: Callable[..., tuple[Path, Manifest]]
) -> None:
    folder, manifest = half()
    chosen: Any = {setting: True}
    options = dataclasses.replace(SMALL, **chosen)
    with pytest.raises(BackendError, match=r"for one release and the GPUs of --sm.*tensorrt$"):
        build_target(folder, manifest, RTX, "fp16", options)


def test_fp32_builds_for_ampere(half: Callable[..., tuple[Path, Manifest]]) -> None:
    folder, manifest = half()
    built, name = build_target(folder, manifest, RTX, "fp32", SMALL)
    assert built.targets[name].precision == "fp32"


def test_shapes_must_ascend(half: Callable[..., tuple[Path, Manifest]]) -> None:
    folder, manifest = half()
    with pytest.raises(BackendError, match="does not ascend"):
        build_target(folder, manifest, RTX, "fp16", dataclasses.replace(SMALL, batch=(4, 2, 8)))


def test_shapes_end_where_the_model_ends(half: Callable[..., tuple[Path, Manifest]]) -> None:
    folder, manifest = half()
    long = dataclasses.replace(SMALL, sequence=(16, 128, 512))
    built, name = build_target(folder, manifest, RTX, "fp16", long)
    assert built.targets[name].sequence_lengths[-1] == manifest.tokenizer.max_length == 64


def test_tensorrt_needs_the_device(
    half: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = half()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fpabee\[tensorrt\]'"):
        build_target(folder, manifest, TENSORRT, "fp16", SMALL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(tensorrt, "cuda_device", lambda: CudaDevice(error="there is no GPU"))
    with pytest.raises(BackendError, match=r"builds on the GPU.*there is no GPU.*on the device"):
        build_target(folder, manifest, TENSORRT, "fp16", SMALL)


def test_a_worker_that_dies_says_how(tmp_path: Path) -> None:
    request = PlanRequest(module="no_such_module", onnx="x", plan="y", profiles=[])
    assert "no_such_module" in tensorrt._run_worker(request).error


def test_a_worker_that_the_system_kills_lacked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    request = PlanRequest(module="x", onnx="x", plan="y", profiles=[])
    dead = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda _, **settings: run([sys.executable, "-c", dead], **settings)
    )
    error = tensorrt._run_worker(request).error
    assert error == "the builder was killed, as happens when memory runs out"
    assert tensorrt._LACKS_MEMORY.search(error)
