"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the GPU that
will run the plans.
"""

from __future__ import annotations

from pathlib import Path

from ...runtime.artifact.folder import sha256_of, verified_graph
from ...runtime.artifact.manifest import BuiltFile, Manifest, Target
from ...runtime.backends.tensorrt import MODULES, library_version
from ...runtime.errors import BackendError
from ...runtime.machine import cuda_device
from ...runtime.progress import Progress, silent
from .backends import RTX
from .plan_worker import PlanRequest
from .plans import PlanOptions, profile_of
from .worker import run_worker

TIMING_CACHE = "timing.cache"
"""Timings of kernels, in the folder of a target; those with the same layers can begin with them."""


def _device(backend: str) -> str:
    """The class of GPUs that plans are bound to, such as `sm86`; empty with `tensorrt-rtx`."""
    return "" if backend == RTX else "sm" + cuda_device().compute_capability.replace(".", "")


def target_name(backend: str, precision: str) -> str:
    """The name of a target that is built on this machine."""
    return "-".join(filter(None, (backend, precision, _device(backend))))


def build_target(
    folder: Path,
    manifest: Manifest,
    backend: str,
    precision: str,
    options: PlanOptions,
    progress: Progress = silent,
) -> Target:
    """Build the plans of a target into `targets/<name>/`.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        backend: `tensorrt-rtx` or `tensorrt`.
        precision: of the graphs to build.
        options: shapes, GPUs and limits.
        progress: called with (what, done, total).

    Returns:
        The record of the target, without what is measured.

    Raises:
        BackendError: a build failed.
    """
    options = options.fitted(manifest, backend)
    graphs = manifest.graphs_in(precision)
    name = target_name(backend, precision)
    home = folder / "targets" / name
    home.mkdir(parents=True, exist_ok=True)
    files: dict[str, BuiltFile] = {}
    progress(name, 0, len(graphs))

    for graph_name, graph in graphs.items():
        onnx = verified_graph(folder, graph.file, graph.sha256)
        plan = home / f"{graph_name}.plan"
        request = PlanRequest(
            onnx=str(onnx),
            plan=str(plan),
            timing_cache=str(home / TIMING_CACHE),
            profiles=[
                {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
                for shapes in options.profiles()
            ],
            options=options,
        )
        is_rtx = str(int(backend == RTX))
        error = run_worker("plan_worker", request, POLYGRAPHY_USE_TENSORRT_RTX=is_rtx)
        if error:
            raise BackendError(
                f"{name}: {graph_name}: {error}",
                "if memory is lacking, free some, or build for smaller shapes; else run the graphs "
                "without plans, on onnxruntime-fp32, and please report this",
            )
        files[graph_name] = BuiltFile(
            file=plan.relative_to(folder).as_posix(),
            sha256=sha256_of(plan),
            onnx_sha256=graph.sha256,
        )
        progress(f"{name} {graph_name}", len(files), len(graphs))
    return Target(
        backend=backend,
        precision=precision,
        device=_device(backend),
        versions={MODULES[backend]: library_version(MODULES[backend])},
        files=files,
        tolerance=None,
        compute_capabilities=options.compute_capabilities or (cuda_device().compute_capability,),
        profiles=options.profiles(),
        batch_sizes=options.batch_sizes,
        sequence_lengths=options.sequence_lengths,
    )
