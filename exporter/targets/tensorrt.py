"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the
GPU that will run the plans.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import util
from pathlib import Path

import msgspec

from ...runtime.artifact.folder import read_regular, sha256_of, verified_graph
from ...runtime.artifact.manifest import BuiltFile, Graph, Manifest, Target
from ...runtime.backends.cuda_probe import cuda_device
from ...runtime.backends.tensorrt import MODULES, build_command, library_version
from ...runtime.errors import (
    BackendError,
    FpabeeError,
    MissingExtraError,
    VerificationError,
)
from ...runtime.progress import Progress, silent
from .options import RTX, TENSORRT, PlanOptions, profile_of
from .plan_check import check_precision
from .plan_worker import PlanRequest, PlanResult

_BUILD_FILE = "build.json"
_MAX_BUILD_BYTES = 16 * 2**20
_SIGKILL = 9  # the module `signal` lacks it on Windows
_LACKS_MEMORY = re.compile("memory|bad_alloc", re.IGNORECASE)


class _Built(msgspec.Struct, frozen=True):
    onnx_sha256: str
    sha256: str
    seconds: float
    size: int


class _BuildRecord(msgspec.Struct):
    """`build.json`: what is in a target's folder, and how it came about."""

    library: str
    version: str
    options: dict[str, object]
    graphs: dict[str, _Built] = {}


def unavailable_reason(backend: str) -> MissingExtraError | BackendError | None:
    """Why a backend cannot build here; None if it can."""
    if util.find_spec(MODULES[backend]) is None:
        return MissingExtraError(
            f"{MODULES[backend]} is not installed", f"pip install 'fpabee[{backend}]'"
        )
    if backend == TENSORRT:
        device = cuda_device()
        if device.error:
            return BackendError(
                f"TensorRT builds on the GPU that runs the plans, and here {device.error}",
                "run this on the device: fpabee-export --from ENGINES --backend tensorrt",
            )
    return None


def target_name(backend: str, precision: str) -> str:
    """The name of the target that is built here."""
    if backend == RTX:
        return f"{RTX}-{precision}"
    return f"{TENSORRT}-{precision}-sm{cuda_device().compute_capability.replace('.', '')}"


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
        manifest: its manifest; the one with the target is returned, not written.
        backend: `tensorrt-rtx` or `tensorrt`.
        precision: of the graphs to build.
        options: see `PlanOptions`.
        jobs: builds at a time.
        resume: keep plans that are there, of the same graph, options and library.
        progress: called with (what, done, total).

    Returns:
        The manifest with the target, and the target's name.

    Raises:
        BackendError: the backend cannot build this here, or a segment failed; plans that were
            built stay where they are. The hint ends with `--resume` if the same build may succeed.
        VerificationError: a plan is not in its precision; the others stay as well.
    """
    error = unavailable_reason(backend)
    if error:
        raise error
    options = options.fitted(manifest, backend, precision)
    graphs = manifest.graphs_in(precision)
    name = target_name(backend, precision)
    home = folder / "targets" / name
    home.mkdir(parents=True, exist_ok=True)
    record = _record(home, backend, options, resume)
    wanted = {g: graph for g, graph in graphs.items() if not _is_built(home, g, graph, record)}
    done, lock = len(graphs) - len(wanted), threading.Lock()
    progress(name, done, len(graphs))

    def build(item: tuple[str, Graph]) -> FpabeeError | None:
        nonlocal done
        graph_name, graph = item
        onnx = verified_graph(folder, graph.file, graph.sha256)
        plan = home / f"{graph_name}.plan"
        result = _run_worker(_request(backend, onnx, plan, graph, options, home))
        if result.error:
            return BackendError(f"{graph_name}: {result.error}")
        exact = manifest.graphs[graph_name]
        fp32 = verified_graph(folder, exact.file, exact.sha256)
        try:
            check_precision(plan, graph, result, precision, onnx, fp32)
        except VerificationError as error:
            return error
        built = _Built(graph.sha256, sha256_of(plan), round(result.seconds, 3), result.size)
        with lock:
            record.graphs[graph_name] = built
            # Anew: if it is a link, the file that it leads to is not ours.
            (home / _BUILD_FILE).unlink(missing_ok=True)
            (home / _BUILD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record)))
            done += 1
            progress(f"{name} {graph_name} ({result.seconds:.1f} s)", done, len(graphs))
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(build, wanted.items()) if failure]
    if failures:
        first = failures[0]
        raise type(first)(
            f"{name}: {len(failures)} of {len(graphs)} plans could not be built, "
            f"first {first.message}",
            _remedy(folder, manifest, backend, precision, first),
        )
    target = _target(folder, home, backend, precision, graphs, record, options)
    targets = {**manifest.targets, name: target}
    return msgspec.structs.replace(manifest, targets=targets), name


def _remedy(
    folder: Path, manifest: Manifest, backend: str, precision: str, failure: FpabeeError
) -> str:
    """What helps after a failed build: to repeat it, only if it lacked memory."""
    if _LACKS_MEMORY.search(failure.message):
        command = build_command(backend, precision).replace("ENGINES", str(folder))
        return f"free some memory, and build the missing plans with fewer jobs: {command} --resume"
    portable = [name for name, target in manifest.targets.items() if not target.files]
    same = [name for name in portable if manifest.targets[name].precision == precision]
    other = "--bf16" if precision == "fp16" else "--fp16"
    return (
        f"try another precision ({other}), or run the graphs without plans (fpabee-run {folder} "
        f"--input texts.txt --target {(same or portable or ['onnxruntime-fp32'])[0]}); "
        "please report this with the versions that fpabee-inspect --env prints"
    )


def _record(home: Path, backend: str, options: PlanOptions, resume: bool) -> _BuildRecord:
    fresh = _BuildRecord(backend, library_version(MODULES[backend]), asdict(options))
    if not resume:
        return fresh
    try:
        raw = read_regular(home / _BUILD_FILE, _MAX_BUILD_BYTES)
        known = msgspec.json.decode(raw, type=_BuildRecord)
    except (OSError, msgspec.DecodeError):
        return fresh
    plain = msgspec.json.decode(msgspec.json.encode(fresh.options))
    same = (known.library, known.version, known.options) == (backend, fresh.version, plain)
    return known if same else fresh


def _is_built(home: Path, name: str, graph: Graph, record: _BuildRecord) -> bool:
    built = record.graphs.get(name)
    plan = home / f"{name}.plan"
    return (
        built is not None
        and built.onnx_sha256 == graph.sha256
        and plan.is_file()
        and sha256_of(plan) == built.sha256
    )


def _request(
    backend: str, onnx: Path, plan: Path, graph: Graph, options: PlanOptions, home: Path
) -> PlanRequest:
    return PlanRequest(
        module=MODULES[backend],
        onnx=str(onnx),
        plan=str(plan),
        profiles=[
            {spec.name: profile_of(spec, shapes) for spec in graph.inputs}
            for shapes in options.profiles()
        ],
        compute_capabilities=list(options.compute_capabilities),
        workspace=options.workspace,
        optimization_level=options.optimization_level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        timing_cache=str(home / "timing.cache"),
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


def _target(
    folder: Path,
    home: Path,
    backend: str,
    precision: str,
    graphs: dict[str, Graph],
    record: _BuildRecord,
    options: PlanOptions,
) -> Target:
    files = {
        name: BuiltFile(
            file=(home / f"{name}.plan").relative_to(folder).as_posix(),
            sha256=record.graphs[name].sha256,
            onnx_sha256=graph.sha256,
        )
        for name, graph in graphs.items()
    }
    device = "" if backend == RTX else f"sm{cuda_device().compute_capability.replace('.', '')}"
    capabilities = options.compute_capabilities or (cuda_device().compute_capability,)
    return Target(
        backend=backend,
        precision=precision,
        device=device,
        versions={MODULES[backend]: record.version},
        files=files,
        tolerance=None,
        compute_capabilities=capabilities,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        profiles=options.profiles(),
        batch_sizes=options.batch_sizes,
        sequence_lengths=options.sequence_lengths,
    )
