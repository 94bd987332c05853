"""Targets of engines folders that run on doubles of a GPU and its libraries."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fpabee.exporter.targets import builders, check
from fpabee.exporter.targets import tensorrt as targets
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.runtime import Engine, Entropy, machine
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import BuiltFile, Manifest, Range, Shapes, Target
from fpabee.runtime.backends import cuda, onnxruntime_cuda, tensorrt
from fpabee.runtime.chain.chain import Chain
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.encoding import Text
from fpabee.runtime.machine import CudaDevice

from .cuda import FakeCuda
from .onnxruntime_cuda import FakeCudaSession
from .tensorrt import FakeTensorRt, plans_of

TEXTS = ["the film is not good", "rain", "", "turn the lights on and play music", "book a table"]
SOME_STOP_FIRST = Entropy(threshold=0.3)
"""Some of the texts, but not all, stop at exit 1 of BERT."""
GPU = CudaDevice("a double", "8.6", (13, 0))
# Looking through all installed packages takes longer than a test.
_packages = functools.cache(metadata.packages_distributions)


@dataclass
class Double:
    """Doubles of the driver and of TensorRT, and the folder whose target they run.

    Attributes:
        cuda: the first device.
        second: another one.
        builds: what was built, each with the names of the graphs that were timed before.
        unwritten: see `plans_of`.
    """

    folder: Path
    target: str
    cuda: FakeCuda
    trt: FakeTensorRt
    second: FakeCuda = field(default_factory=lambda: FakeCuda(number=1))
    builds: list[tuple[PlanRequest, list[str]]] = field(default_factory=list)
    unwritten: list[Manifest] = field(default_factory=list)

    def build(self, module: str, request: PlanRequest, **environment: str) -> str:
        """Write a plan that the double can run, as the worker of `build_plans` does."""
        name = Path(request.plan).name
        cache = Path(request.timing_cache)
        timed = json.loads(cache.read_text("utf-8")) if cache.is_file() else []
        self.builds.append((request, timed))
        cache.write_text(json.dumps([*timed, name]), "utf-8")
        plan = f"{sha256_of(Path(request.onnx))}, built as {name}".encode().ljust(96, b".")
        Path(request.plan).write_bytes(plan)
        return ""

    def load(self, **settings: Any) -> Engine:
        """The engine on the double, whose plans were never checked anywhere."""
        return Engine.load(self.folder, target=self.target, **{"check": False, **settings})

    def used(self) -> int:
        """Device memory that is allocated, in bytes."""
        return sum(memory.nbytes for memory in self.cuda.memory_of.values())

    def nothing_is_left(self) -> bool:
        """Whether everything on the device was given back, in the context of the device."""
        cuda = self.cuda
        return not any((cuda.memory_of, cuda.streams, cuda.events, cuda.freed_elsewhere))

    def change_plan(self, graph: str, **changes: Any) -> None:
        """Change the record of a plan in the manifest."""
        manifest = read_manifest(self.folder)
        target = manifest.targets[self.target]
        files = {**target.files, graph: msgspec.structs.replace(target.files[graph], **changes)}
        _add_target(self.folder, self.target, msgspec.structs.replace(target, files=files))


def offer_fp32_plans(patch: pytest.MonkeyPatch) -> None:
    """Let plans be built in fp32, too: their answers are close to those of the CPU."""
    for library in tensorrt.MODULES:
        builder = builders.Plans(library, "fp32", "a test")
        patch.setitem(builders.BUILDERS, builder.name, builder)


def set_gpu(patch: pytest.MonkeyPatch, gpu: CudaDevice = GPU) -> None:
    """Let the code find this GPU."""
    for module in (machine, cuda, tensorrt, targets, builders):
        patch.setattr(module, "cuda_device", lambda number=0: gpu)


def serve(patch: pytest.MonkeyPatch, folder: Path, backend: str = "tensorrt") -> Double:
    """Let doubles run the plans of an engines folder, and build those of TensorRT."""
    name = tensorrt.MODULES[backend]
    unwritten = list[Manifest]()
    trt = FakeTensorRt(plans_of(folder, unwritten), name)
    patch.setitem(sys.modules, name, trt)
    double = Double(folder, "", FakeCuda(), trt, unwritten=unwritten)
    patch.setattr(tensorrt, "cuda", lambda number: (double.cuda, double.second)[number])
    patch.setattr(metadata, "packages_distributions", _packages)
    set_gpu(patch)
    engine_of = check.engine_of

    def noted(engines: EnginesFolder, *others: Any) -> Engine:
        unwritten[:] = [engines.manifest]
        return engine_of(engines, *others)

    patch.setattr(check, "engine_of", noted)
    if backend == "tensorrt":
        patch.setattr(targets, "run_worker", double.build)
    offer_fp32_plans(patch)
    return double


def install(
    patch: pytest.MonkeyPatch,
    folder: Path,
    precision: str = "fp32",
    batch: tuple[int, ...] = (1, 8, 64),
    sequence: tuple[int, ...] = (1, 32, 64),
    **changes: Any,
) -> Double:
    """Add a target of made-up plans to an engines folder, and let doubles run it.

    Args:
        patch: undoes it.
        folder: the folder; its manifest is changed.
        precision: of the graphs behind the plans.
        batch: smallest, typical and largest number of rows.
        sequence: the same in tokens.
        changes: of the target's record.
    """
    manifest = read_manifest(folder)
    backend = changes.get("backend", "tensorrt")
    name = f"{backend}-{precision}-sm86"
    profile = Shapes(
        batch=Range(min=batch[0], opt=batch[1], max=batch[-1]),
        sequence=Range(min=sequence[0], opt=sequence[1], max=sequence[-1]),
    )
    files = {}
    for graph_name, graph in manifest.graphs_in(precision).items():
        path = folder / "targets" / name / f"{graph_name}.plan"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"plan of {graph_name}".encode().ljust(96, b"."))
        files[graph_name] = BuiltFile(
            file=path.relative_to(folder).as_posix(),
            sha256=sha256_of(path),
            onnx_sha256=graph.sha256,
        )
    double = serve(patch, folder, backend)
    double.target = name
    module = tensorrt.MODULES[backend]
    settings: dict[str, Any] = {
        "backend": backend,
        "precision": precision,
        "device": "sm86",
        "versions": {module: tensorrt.library_version(module)},
        "files": files,
        "tolerance": None,
        "compute_capabilities": (GPU.compute_capability,),
        "profiles": (profile,),
    }
    _add_target(folder, name, Target(**(settings | changes)))
    return double


def install_cuda_provider(
    patch: pytest.MonkeyPatch, folder: Path, precision: str = "fp32"
) -> Double:
    """Add a target of ONNX Runtime's CUDA provider, and let doubles run it."""
    name = f"onnxruntime-{precision}-cuda"
    target = Target(backend="onnxruntime", precision=precision, device="cuda", tolerance=None)
    _add_target(folder, name, target)
    serve_cuda_provider(patch)
    return Double(folder, name, FakeCuda(), FakeTensorRt(lambda content: None))


def serve_cuda_provider(patch: pytest.MonkeyPatch) -> None:
    """Let doubles run the graphs of all folders as ONNX Runtime's CUDA provider."""
    check = staticmethod(lambda target, name, device=0: None)
    patch.setattr(onnxruntime_cuda.OnnxRuntimeCudaBackend, "check", check)
    patch.setattr(onnxruntime_cuda, "new_session", FakeCudaSession)


def _add_target(folder: Path, name: str, target: Target) -> None:
    manifest = read_manifest(folder)
    targets = {**manifest.targets, name: target}
    EnginesFolder(folder, manifest).with_manifest(targets=targets).write()


def run_through(engine: Engine, chain: Chain, texts: Sequence[Text]) -> None:
    """Run texts to full depth as one window, on the execution of a chain."""
    rows = engine.core.encode(texts)
    group = Group.of(np.arange(len(texts)), rows, engine.core.full_depth, math.inf)
    assert {decision.exit for decision in chain.run(group)} == {*engine.manifest.exits}
