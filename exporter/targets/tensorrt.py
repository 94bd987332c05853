"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the GPU that
will run the plans.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import msgspec

from ...runtime.artifact.folder import sha256_of, verified_graph
from ...runtime.artifact.manifest import BuiltFile, Manifest, Target, with_target
from ...runtime.backends.cuda_probe import cuda_device, extra
from ...runtime.backends.tensorrt import MODULES, library_version
from ...runtime.errors import (
    BackendError,
    Call,
    MissingExtraError,
    Remedy,
)
from ...runtime.progress import Progress, silent
from .options import BUILD_ON_DEVICE, RTX, TENSORRT, PlanOptions, profile_of
from .plan_worker import PlanRequest, PlanResult

TIMING_CACHE = "timing.cache"
"""Timings of kernels, in the folder of a target; those with the same layers can begin with them."""
_SIGKILL = 9  # on Windows, the module `signal` does not have it
_LACKS_MEMORY = re.compile("memory|bad_alloc", re.IGNORECASE)


def unavailable_reason(backend: str) -> MissingExtraError | BackendError | None:
    """Why a backend cannot build on this machine; None: it can."""
    if util.find_spec(MODULES[backend]) is None:
        return MissingExtraError(
            f"{MODULES[backend]} is not installed", f"pip install 'fpabee[{extra(backend)}]'"
        )
    if backend == TENSORRT:
        device = cuda_device()
        if device.error:
            return BackendError(
                f"TensorRT builds on the GPU that runs the plans, and here {device.error}",
                Remedy("run this on the device: {call}", call=BUILD_ON_DEVICE),
            )
    return None


def can_run(target: Target) -> bool:
    """Whether a built target can run on this machine."""
    device = cuda_device()
    return not device.error and device.compute_capability in target.compute_capabilities


def build_target(
    folder: Path,
    manifest: Manifest,
    backend: str,
    precision: str,
    options: PlanOptions,
    jobs: int = 1,
    progress: Progress = silent,
) -> tuple[Manifest, str]:
    """Build the plans of a target into `targets/<name>/`.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the target is returned, not written.
        backend: `tensorrt-rtx` or `tensorrt`.
        precision: of the graphs to build.
        options: shapes, GPUs and limits.
        jobs: the number of builds at a time. It is 1 with `tensorrt`, which times kernels on the
            GPU while it builds.
        progress: called with (what, done, total).

    Returns:
        The manifest with the target, and the target's name.

    Raises:
        BackendError: the backend cannot build this here, or a build failed.
    """
    error = unavailable_reason(backend)
    if error:
        raise error
    options = options.fitted(manifest, backend)
    graphs = manifest.graphs_in(precision)
    device = "" if backend == RTX else "sm" + cuda_device().compute_capability.replace(".", "")
    name = f"{backend}-{precision}" + (f"-{device}" if device else "")
    home = folder / "targets" / name
    home.mkdir(parents=True, exist_ok=True)
    files: dict[str, BuiltFile] = {}
    progress(name, 0, len(graphs))

    def build(graph_name: str) -> PlanResult:
        graph = graphs[graph_name]
        onnx = verified_graph(folder, graph.file, graph.sha256)
        result = _run_worker(
            PlanRequest(
                module=MODULES[backend],
                onnx=str(onnx),
                plan=str(home / f"{graph_name}.plan"),
                timing_cache=str(home / TIMING_CACHE),
                profiles=[
                    {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
                    for shapes in options.profiles()
                ],
                options=options,
            )
        )
        if result.error:
            raise BackendError(f"{name}: {graph_name}: {result.error}", _remedy(result))
        return result

    with ThreadPoolExecutor(1 if backend == TENSORRT else jobs) as pool:
        for graph, result in zip(graphs, pool.map(build, graphs), strict=True):
            file = f"targets/{name}/{graph}.plan"
            files[graph] = BuiltFile(
                file=file, sha256=sha256_of(folder / file), onnx_sha256=graphs[graph].sha256
            )
            progress(f"{name} {graph} ({result.seconds:.1f} s)", len(files), len(graphs))
    target = Target(
        backend=backend,
        precision=precision,
        device=device,
        versions={MODULES[backend]: library_version(MODULES[backend])},
        files=files,
        tolerance=None,
        compute_capabilities=options.compute_capabilities or (cuda_device().compute_capability,),
        hardware_compatible=options.hardware_compatible,
        profiles=options.profiles(),
        batch_sizes=options.batch_sizes,
        sequence_lengths=options.sequence_lengths,
    )
    return with_target(manifest, name, target), name


def _remedy(failed: PlanResult) -> Remedy:
    if _LACKS_MEMORY.search(failed.error):
        return Remedy("free some memory, and build with fewer {jobs} or smaller shapes")
    return Remedy(
        "run the graphs without plans, on onnxruntime-fp32; please report this with the output of "
        "{call}",
        call=Call("inspect", env=True),
    )


def _run_worker(request: PlanRequest) -> PlanResult:
    done = subprocess.run(
        [sys.executable, "-m", "fpabee.exporter.targets.plan_worker"],
        input=msgspec.json.encode(request),
        capture_output=True,
        check=False,
    )
    try:
        return msgspec.json.decode(done.stdout, type=PlanResult)
    except msgspec.DecodeError:
        if done.returncode == -_SIGKILL:
            return PlanResult(error="the builder was killed, as happens when memory runs out")
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return PlanResult(
            error=f"the builder ended with code {done.returncode}"
            + (f": {lines[-1]}" if lines else "")
        )
