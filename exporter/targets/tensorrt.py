"""Build TensorRT plans from an engines folder's graphs. Needs neither torch nor onnx.

`tensorrt-rtx` builds on any machine, for the GPUs that are named; `tensorrt` builds on the
GPU that will run the plans.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

import msgspec

from ...runtime.backends.cuda_probe import cuda_device
from ...runtime.errors import BackendError, MissingExtraError, VerificationError
from ...runtime.manifest import (
    BuiltFile,
    Graph,
    Manifest,
    Range,
    Shapes,
    Target,
    TensorSpec,
    sha256_of,
    verified,
)
from .plan_worker import PlanRequest, PlanResult

RTX = "tensorrt-rtx"
TENSORRT = "tensorrt"
PORTABLE = ("8.6", "8.9", "12.0")
"""Ampere, Ada and Blackwell GPUs of desktops, laptops and workstations."""

_MODULES = {RTX: "tensorrt_rtx", TENSORRT: "tensorrt"}
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_BATCH_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTH_STEPS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_BUILD_FILE = "build.json"
# Below this a plan is mostly not weights, and its size says nothing of their precision.
_TELLING_BYTES = 4 * 2**20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        batch: smallest, typical and largest number of rows.
        sequence: the same in tokens; the largest is lowered to what the model takes.
        compute_capabilities: GPUs to build for; only with TensorRT for RTX.
        version_compatible: plans that later versions of TensorRT can run.
        hardware_compatible: plans for Ampere and everything after it.
        optimization_level: 0 to 5; None: the library's own.
        workspace: most scratch memory in bytes; None: no limit.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    sequence: tuple[int, int, int] = (16, 64, 128)
    compute_capabilities: tuple[str, ...] = PORTABLE
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    workspace: int | None = None


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


def why_not(backend: str) -> MissingExtraError | BackendError | None:
    """Why a backend cannot build here; None if it can."""
    if util.find_spec(_MODULES[backend]) is None:
        return MissingExtraError(
            f"{_MODULES[backend]} is not installed", f"pip install 'fpabee[{backend}]'"
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
    progress: Progress = lambda what, done, total: None,
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
            built stay where they are.
        VerificationError: a plan is not in its precision.
    """
    error = why_not(backend)
    if error:
        raise error
    options = _fitted(options, manifest, backend, precision)
    graphs = manifest.graphs_in(precision)
    name = target_name(backend, precision)
    home = folder / "targets" / name
    home.mkdir(parents=True, exist_ok=True)
    record = _record(home, backend, options, resume)
    wanted = {g: graph for g, graph in graphs.items() if not _is_built(home, g, graph, record)}
    done, lock = len(graphs) - len(wanted), threading.Lock()
    progress(name, done, len(graphs))

    def build(item: tuple[str, Graph]) -> str:
        nonlocal done
        graph_name, graph = item
        onnx = verified(folder, graph.file, graph.sha256)
        plan = home / f"{graph_name}.plan"
        result = _run_worker(_request(backend, onnx, plan, graph, options, home))
        if result.error:
            return f"{graph_name}: {result.error}"
        reference = folder / manifest.graphs[graph_name].file
        _check_precision(plan, graph, result, precision, reference)
        built = _Built(graph.sha256, sha256_of(plan), round(result.seconds, 3), result.size)
        with lock:
            record.graphs[graph_name] = built
            (home / _BUILD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record)))
            done += 1
            progress(f"{name} {graph_name} ({result.seconds:.1f} s)", done, len(graphs))
        return ""

    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(build, wanted.items()) if failure]
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise BackendError(
            f"{name}: {len(failures)} of {len(graphs)} plans could not be built{more}; "
            f"first {failures[0]}",
            f"the others are kept: fpabee-export --from {folder} --backend {backend} "
            f"--{precision} --resume",
        )
    target = _target(folder, home, backend, precision, graphs, record, options)
    targets = {**manifest.targets, name: target}
    return msgspec.structs.replace(manifest, targets=targets), name


def _fitted(options: PlanOptions, manifest: Manifest, backend: str, precision: str) -> PlanOptions:
    """The options with shapes that the model takes."""
    longest = manifest.tokenizer.max_length
    low, typical, high = (min(length, longest) for length in options.sequence)
    if list(options.batch) != sorted(options.batch) or not low <= typical <= high:
        raise BackendError(
            f"batch {options.batch} or sequence {options.sequence} does not ascend",
            "give smallest, typical and largest: --batch 1,8,32 --sequence 16,64,128",
        )
    capabilities = options.compute_capabilities if backend == RTX else ()
    for capability in capabilities:
        if capability not in _RTX_CAPABILITIES:
            raise BackendError(
                f"TensorRT for RTX has no support for compute capability {capability}; "
                f"it has {', '.join(_RTX_CAPABILITIES)}",
                "there use TensorRT, on the device: fpabee-export --from ENGINES "
                "--backend tensorrt",
            )
        if capability == "7.5" and precision == "fp32":
            raise BackendError(
                "TensorRT for RTX has no fp32 matrix products on compute capability 7.5",
                "export with --fp16, or leave 75 out of --sm",
            )
    return dataclasses.replace(
        options, sequence=(low, typical, high), compute_capabilities=capabilities
    )


def _record(home: Path, backend: str, options: PlanOptions, resume: bool) -> _BuildRecord:
    fresh = _BuildRecord(backend, _version(backend), asdict(options))
    if not resume:
        return fresh
    try:
        raw = (home / _BUILD_FILE).read_bytes()
        known = msgspec.json.decode(raw, type=_BuildRecord)
    except (OSError, msgspec.DecodeError):
        return fresh
    plain = msgspec.json.decode(msgspec.json.encode(fresh.options))
    same = (known.library, known.version, known.options) == (backend, fresh.version, plain)
    return known if same else fresh


def _version(backend: str) -> str:
    """The library's version, without loading it into this process."""
    for name in metadata.packages_distributions().get(_MODULES[backend], []):
        return metadata.version(name)
    return "unknown"


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
        module=_MODULES[backend],
        onnx=str(onnx),
        plan=str(plan),
        profiles=[
            {spec.name: _shapes_of(spec, shapes) for spec in graph.inputs}
            for shapes in _profiles(options)
        ],
        compute_capabilities=list(options.compute_capabilities),
        workspace=options.workspace,
        optimization_level=options.optimization_level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        timing_cache=str(home / "timing.cache"),
    )


def _profiles(options: PlanOptions) -> tuple[Shapes, ...]:
    """Two length buckets: up to the typical length, and beyond it."""
    batch = Range(**dict(zip(("min", "opt", "max"), options.batch, strict=True)))
    low, typical, high = options.sequence
    profiles = [Shapes(batch=batch, sequence=Range(min=low, opt=typical, max=typical))]
    if high > typical:
        profiles.append(
            Shapes(batch=batch, sequence=Range(min=min(typical + 1, high), opt=high, max=high))
        )
    return tuple(profiles)


def _shapes_of(spec: TensorSpec, shapes: Shapes) -> tuple[list[int], list[int], list[int]]:
    def shape(which: str) -> list[int]:
        sizes = {
            "batch": getattr(shapes.batch, which),
            "sequence": getattr(shapes.sequence, which),
        }
        return [sizes[size] if isinstance(size, str) else size for size in spec.shape]

    return shape("min"), shape("opt"), shape("max")


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
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return PlanResult(
            error=f"the builder ended with code {done.returncode}"
            + (f": {lines[-1]}" if lines else "")
        )


def _check_precision(
    plan: Path, graph: Graph, result: PlanResult, precision: str, fp32_onnx: Path
) -> None:
    """A plan that is silently in fp32 must not pass."""
    expected = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
    wrong = [name for name, dtype in expected.items() if result.dtypes.get(name) != dtype]
    if wrong:
        found = {name: result.dtypes.get(name) for name in wrong}
        problem = f"its {wrong[0]} is {found[wrong[0]]}, not {expected[wrong[0]]}"
    elif (
        precision != "fp32"
        and fp32_onnx.stat().st_size > _TELLING_BYTES
        and result.size > 0.8 * fp32_onnx.stat().st_size
    ):
        problem = (
            f"it has {result.size / 2**20:.1f} MiB, as much as fp32 weights "
            f"({fp32_onnx.stat().st_size / 2**20:.1f} MiB)"
        )
    elif precision == "fp16" and result.layers and "Half" not in result.layers:
        problem = "the inspector finds no layer in half precision"
    else:
        return
    plan.unlink()
    raise VerificationError(
        f"{plan.name} is not in {precision}: {problem}",
        "please report this with the versions that fpabee-inspect --env prints",
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
        versions={_MODULES[backend]: record.version},
        files=files,
        tolerance=None,
        compute_capabilities=capabilities,
        profiles=_profiles(options),
        batch_sizes=_steps(_BATCH_STEPS, options.batch),
        sequence_lengths=_steps(_LENGTH_STEPS, options.sequence),
    )


def _steps(steps: tuple[int, ...], asked: tuple[int, int, int]) -> tuple[int, ...]:
    """The sizes to pad to: few, so that prepared graphs are used again."""
    inside = {step for step in steps if asked[0] < step < asked[2]}
    return tuple(sorted(inside | set(asked)))
