"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the GPU that
will run the plans.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import util
from pathlib import Path

import msgspec

from ...runtime.artifact.folder import BAD_JSON, read_regular, sha256_of, verified_graph
from ...runtime.artifact.manifest import BuiltFile, Manifest, Target, with_target
from ...runtime.backends.cuda_probe import cuda_device, extra
from ...runtime.backends.tensorrt import MODULES, library_version
from ...runtime.errors import (
    BackendError,
    Call,
    FpabeeError,
    MissingExtraError,
    Remedy,
    VerificationError,
)
from ...runtime.progress import Progress, silent
from .options import BUILD_ON_DEVICE, RTX, TENSORRT, PlanOptions, profile_of
from .plan_check import check_precision
from .plan_worker import PlanRequest, PlanResult, replace_file

TIMING_CACHE = "timing.cache"
"""Timings of kernels, in the folder of a target; those with the same layers can begin with them."""
_BUILD_FILE = "build.json"
_MAX_BUILD_BYTES = 16 * 2**20
_SIGKILL = 9  # on Windows, the module `signal` does not have it
_LACKS_MEMORY = re.compile("memory|bad_alloc", re.IGNORECASE)


class _BuildRecord(msgspec.Struct):
    """`build.json`: how the plans in a target's folder were built."""

    library: str
    version: str
    options: dict[str, object]
    graphs: dict[str, BuiltFile] = {}


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


def lacks_memory(error: FpabeeError) -> bool:
    """Whether a build failed for lack of memory, so that the same build may succeed later."""
    return bool(_LACKS_MEMORY.search(error.message))


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
    resume: bool = False,
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
        resume: keep existing plans of the same graph, options and library.
        progress: called with (what, done, total).

    Returns:
        The manifest with the target, and the target's name.

    Raises:
        BackendError: the backend cannot build this here, or a build failed. The plans that could
            be built are kept for `resume`.
        VerificationError: a plan is not in its precision. The others are kept as well.
    """
    error = unavailable_reason(backend)
    if error:
        raise error
    options = options.fitted(manifest, backend, precision)
    graphs = manifest.graphs_in(precision)
    device = "" if backend == RTX else "sm" + cuda_device().compute_capability.replace(".", "")
    name = f"{backend}-{precision}" + (f"-{device}" if device else "")
    home = folder / "targets" / name
    home.mkdir(parents=True, exist_ok=True)
    settings = asdict(options) | {"profiles": msgspec.to_builtins(options.profiles())}
    record = _BuildRecord(backend, library_version(MODULES[backend]), settings)
    if resume:
        record.graphs = {
            graph: built
            for graph, built in _earlier_plans(home, record).items()
            if graph in graphs and built.onnx_sha256 == graphs[graph].sha256
        }
    wanted = [graph for graph in graphs if graph not in record.graphs]
    progress(name, len(record.graphs), len(graphs))

    def build(graph_name: str) -> PlanResult | FpabeeError:
        graph, exact = graphs[graph_name], manifest.graphs[graph_name]
        onnx = verified_graph(folder, graph.file, graph.sha256)
        plan = home / f"{graph_name}.plan"
        result = _run_worker(
            PlanRequest(
                module=MODULES[backend],
                onnx=str(onnx),
                plan=str(plan),
                timing_cache=str(home / TIMING_CACHE),
                profiles=[
                    {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
                    for shapes in options.profiles()
                ],
                options=options,
            )
        )
        if result.error:
            return BackendError(f"{graph_name}: {result.error}")
        fp32 = verified_graph(folder, exact.file, exact.sha256)
        try:
            check_precision(plan, graph, result, precision, onnx, fp32)
        except VerificationError as error:
            plan.unlink()
            return error
        return result

    failures: list[FpabeeError] = []
    with ThreadPoolExecutor(1 if backend == TENSORRT else jobs) as pool:
        for graph, result in zip(wanted, pool.map(build, wanted), strict=True):
            if isinstance(result, FpabeeError):
                failures.append(result)
                continue
            file = f"targets/{name}/{graph}.plan"
            record.graphs[graph] = BuiltFile(
                file=file, sha256=sha256_of(folder / file), onnx_sha256=graphs[graph].sha256
            )
            replace_file(home / _BUILD_FILE, msgspec.json.format(msgspec.json.encode(record)))
            done = len(record.graphs)
            progress(f"{name} {graph} ({result.seconds:.1f} s)", done, len(graphs))
    if failures:
        first = failures[0]
        raise type(first)(
            f"{name}: {len(failures)} of {len(graphs)} plans could not be built, "
            f"first {first.message}",
            _remedy(folder, backend, precision, first),
        )
    target = Target(
        backend=backend,
        precision=precision,
        device=device,
        versions={MODULES[backend]: record.version},
        files={graph: record.graphs[graph] for graph in graphs},
        tolerance=None,
        compute_capabilities=options.compute_capabilities or (cuda_device().compute_capability,),
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        profiles=options.profiles(),
        batch_sizes=options.batch_sizes,
        sequence_lengths=options.sequence_lengths,
    )
    return with_target(manifest, name, target), name


def _remedy(folder: Path, backend: str, precision: str, failure: FpabeeError) -> Remedy:
    if lacks_memory(failure):
        settings = {} if precision == "fp32" else {precision: True}
        call = Call("add_targets", folder, backend=backend, **settings, resume=True)
        return Remedy(
            "free some memory, and build the missing plans with fewer {jobs}: {call}", call=call
        )
    return Remedy(
        "try {other}, or run the graphs without plans, on onnxruntime-fp32; please report this "
        "with the output of {call}",
        other="bf16" if precision == "fp16" else "fp16",
        call=Call("inspect", env=True),
    )


def _earlier_plans(home: Path, wanted: _BuildRecord) -> dict[str, BuiltFile]:
    """The intact plans of an earlier build with the same options and library."""
    try:
        raw = read_regular(home / _BUILD_FILE, _MAX_BUILD_BYTES)
        known = msgspec.json.decode(raw, type=_BuildRecord)
    except (OSError, *BAD_JSON):
        return {}
    options = msgspec.json.decode(msgspec.json.encode(wanted.options))
    if (known.library, known.version, known.options) != (wanted.library, wanted.version, options):
        return {}

    def is_intact(graph: str, built: BuiltFile) -> bool:
        plan = home / f"{graph}.plan"
        is_own = built.file == f"targets/{home.name}/{plan.name}"
        return is_own and plan.is_file() and sha256_of(plan) == built.sha256

    return {graph: built for graph, built in known.graphs.items() if is_intact(graph, built)}


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
