"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the GPU that
will run the plans.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import msgspec

from ...runtime.artifact.folder import sha256_of, verified_graph
from ...runtime.artifact.manifest import BuiltFile, Manifest, Target, with_target
from ...runtime.backends.cuda_probe import cuda_device, extra
from ...runtime.backends.tensorrt import MODULES, library_version
from ...runtime.errors import BackendError, Call, MissingExtraError, Remedy
from ...runtime.progress import Progress, silent
from .options import BUILD_ON_DEVICE, RTX, TENSORRT, PlanOptions, profile_of
from .plan_worker import PlanRequest

TIMING_CACHE = "timing.cache"
"""Timings of kernels, in the folder of a target; those with the same layers can begin with them."""
_SIGKILL = 9  # on Windows, the module `signal` does not have it
_ERROR = "[E] "
_LACKS_MEMORY = re.compile("memory|bad_alloc", re.IGNORECASE)


def unavailable_reason(backend: str) -> MissingExtraError | BackendError | None:
    """Why a backend cannot build on this machine; None: it can."""
    if util.find_spec(MODULES[backend]) is None:
        return MissingExtraError(
            f"{MODULES[backend]} is not installed", f"pip install 'fpabee[{extra(backend)}]'"
        )
    if util.find_spec("polygraphy") is None:  # on a Jetson, TensorRT comes without the extra
        return MissingExtraError("polygraphy is not installed", "pip install polygraphy")
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

    def build(graph_name: str) -> float:
        started = time.perf_counter()
        graph = graphs[graph_name]
        onnx = verified_graph(folder, graph.file, graph.sha256)
        error = _run_worker(
            backend,
            PlanRequest(
                onnx=str(onnx),
                plan=str(home / f"{graph_name}.plan"),
                timing_cache=str(home / TIMING_CACHE),
                profiles=[
                    {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
                    for shapes in options.profiles()
                ],
                options=options,
            ),
        )
        if error:
            raise BackendError(f"{name}: {graph_name}: {error}", _remedy(error))
        return time.perf_counter() - started

    with ThreadPoolExecutor(1 if backend == TENSORRT else jobs) as pool:
        for graph, seconds in zip(graphs, pool.map(build, graphs), strict=True):
            file = f"targets/{name}/{graph}.plan"
            files[graph] = BuiltFile(
                file=file, sha256=sha256_of(folder / file), onnx_sha256=graphs[graph].sha256
            )
            progress(f"{name} {graph} ({seconds:.1f} s)", len(files), len(graphs))
    target = Target(
        backend=backend,
        precision=precision,
        device=device,
        versions={MODULES[backend]: library_version(MODULES[backend])},
        files=files,
        tolerance=None,
        compute_capabilities=options.compute_capabilities or (cuda_device().compute_capability,),
        profiles=options.profiles(),
        batch_sizes=options.batch_sizes,
        sequence_lengths=options.sequence_lengths,
    )
    return with_target(manifest, name, target), name


def _remedy(error: str) -> Remedy:
    if _LACKS_MEMORY.search(error):
        return Remedy("free some memory, and build with fewer {jobs} or smaller shapes")
    return Remedy(
        "run the graphs without plans, on onnxruntime-fp32; please report this with the output of "
        "{call}",
        call=Call("inspect", env=True),
    )


def _run_worker(backend: str, request: PlanRequest) -> str:
    """Build a plan in another process; returns why there is no plan, or nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "fpabee.exporter.targets.plan_worker"],
        input=msgspec.json.encode(request),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == RTX))},
        check=False,
    )
    if done.returncode == 0:
        return ""
    if done.returncode == -_SIGKILL:
        return "the builder was killed, as happens when memory runs out"
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    # What the library says itself; the exception says little.
    errors = [line[len(_ERROR) :] for line in lines if line.startswith(_ERROR)]
    return (errors or lines or [f"the builder ended with code {done.returncode}"])[-1]
