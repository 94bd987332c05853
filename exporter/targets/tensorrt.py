"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the GPU that
will run the plans.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...calibration.progress import Progress
from ...runtime.artifact.folder import EnginesFolder, sha256_of
from ...runtime.artifact.manifest import BuiltFile, Target
from ...runtime.backends.tensorrt import MODULES, library_version
from ...runtime.errors import BackendError
from ...runtime.machine import cuda_device
from ..staging import replacing, unique_name
from .backends import RTX
from .plan_worker import PlanRequest
from .plans import (
    PlanOptions,
    batch_sizes_of,
    fitted,
    profile_of,
    profiles_of,
    sequence_lengths_of,
)
from .worker import run_worker

TIMING_CACHE = "timing.cache"
"""Timings of kernels, in the folder of a target; those with the same layers can begin with them."""


def plans_record(
    engines: EnginesFolder, backend: str, precision: str, options: PlanOptions
) -> Target:
    """The record of a target of plans that is built on this machine, without its files.

    Args:
        engines: the engines folder.
        backend: `tensorrt-rtx` or `tensorrt`.
        precision: of the graphs to build.
        options: shapes and GPUs.
    """
    options = fitted(options, engines.manifest, backend)
    module = MODULES[backend]
    here = cuda_device()
    builds_here = backend != RTX
    return Target(
        backend=backend,
        precision=precision,
        device="sm" + here.compute_capability.replace(".", "") if builds_here else "",
        versions={module: library_version(module)},
        tolerance=None,
        compute_capabilities=options.compute_capabilities or (here.compute_capability,),
        built_on=here.model if builds_here else msgspec.UNSET,
        profiles=profiles_of(options),
        batch_sizes=batch_sizes_of(options),
        sequence_lengths=sequence_lengths_of(options),
    )


def build_plans(
    engines: EnginesFolder, target: Target, options: PlanOptions, home: Path, progress: Progress
) -> dict[str, BuiltFile]:
    """Build the plans of a target.

    Args:
        engines: the engines folder.
        target: the record of the target.
        options: shapes and GPUs.
        home: the folder to write the plans to; it must exist.
        progress: called with (what, done, total).

    Returns:
        The record of each plan, by the name of its graph.

    Raises:
        BackendError: a build failed.
    """
    options = fitted(options, engines.manifest, target.backend)
    graphs = engines.manifest.graphs_of(target)
    files: dict[str, BuiltFile] = {}
    progress(target.name, 0, len(graphs))
    with replacing(home) as new:
        for graph_name, graph in graphs.items():
            plan = new / graph_name
            request = PlanRequest(
                onnx=str(engines.graph(graph)),
                plan=str(plan),
                # Timings stay also if the build is stopped, so that the next one is faster.
                timing_cache=str(home / TIMING_CACHE),
                profiles=[
                    {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
                    for shapes in target.profiles
                ],
                compute_capabilities=options.compute_capabilities,
            )
            build_in_worker(request, target, graph_name)
            sha256 = sha256_of(plan)
            file = unique_name(graph_name, sha256, ".plan")
            plan.rename(new / file)
            path = (home / file).relative_to(engines.path).as_posix()
            files[graph_name] = BuiltFile(file=path, sha256=sha256, onnx_sha256=graph.sha256)
            progress(f"{target.name} {graph_name}", len(files), len(graphs))
    return files


def build_in_worker(request: PlanRequest, target: Target, what: str) -> None:
    """Build one plan.

    Args:
        request: what to build.
        target: the record of the target.
        what: what is built, for messages.

    Raises:
        BackendError: it could not be built.
    """
    is_rtx = str(int(target.backend == RTX))
    error = run_worker("plan_worker", request, POLYGRAPHY_USE_TENSORRT_RTX=is_rtx)
    if error:
        raise BackendError(
            f"{target.name}: {what}: {error}",
            "if memory is lacking, free some, or build for smaller shapes; else run the graphs "
            "without plans, on onnxruntime-fp32, and please report this",
        )
