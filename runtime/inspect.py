"""`fpabee-inspect`: what is in an engines folder, and what of it this machine can run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from .. import __version__
from .backends.cuda_probe import cuda_device
from .cli import exits_with_one_line, version_option
from .errors import ArtifactError, BackendError, FpabeeError
from .manifest import Manifest, NotBuilt, Target, read_manifest, resolve

_PACKAGES = (
    "numpy",
    "tokenizers",
    "msgspec",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "onnx",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class TargetState:
    """One target of a folder.

    Attributes:
        name: the target.
        size: bytes of its files, or of the graphs that it runs.
        why_not: why it cannot run here; empty if it can.
        tolerance: largest difference of a logit from the PyTorch model; None: not measured.
    """

    name: str
    size: int
    why_not: str
    tolerance: float | None


def target_states(folder: Path, manifest: Manifest) -> list[TargetState]:
    """Every target of a folder, and whether it can run here."""
    states = []
    for name, target in manifest.targets.items():
        try:
            size = sum(path.stat().st_size for path in _files(folder, manifest, target))
            _check(target, name, folder)
            why_not = ""
        except FpabeeError as error:
            size, why_not = 0, str(error)
        states.append(TargetState(name, size, why_not, target.tolerance))
    return states


def not_built_lines(left: Mapping[str, NotBuilt], folder: Path) -> list[str]:
    """What a folder lacks, why, and the command that builds it, two lines each."""
    lines = []
    for name, note in left.items():
        command = note.command.replace("ENGINES", str(folder))
        lines += [f"not built: {name}: {note.reason}", f"  there: {command}"]
    return lines


def environment() -> dict[str, str]:
    """Versions and devices, for a bug report."""
    device = cuda_device()
    found = {"fpabee": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {
        "system": platform.platform(),
        "cpu": _cpu(),
        "gpu": device.error or f"{device.name}, compute capability {device.compute_capability}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines()[:40] if ":" in line)
    content = {key.strip(): value.strip() for key, value in lines.items()}
    flags = content.get("flags", "").split()
    telling = [
        f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags
    ]
    return f"{content.get('model name', platform.machine())} ({' '.join(telling)})"


def _files(folder: Path, manifest: Manifest, target: Target) -> list[Path]:
    if target.files:
        return [resolve(folder, file.file) for file in target.files.values()]
    graphs = manifest.graphs_in(target.precision)
    return [resolve(folder, graph.file) for graph in graphs.values()]


def _check(target: Target, name: str, folder: Path) -> None:
    if target.backend == "onnxruntime":
        from .backends.onnxruntime_session import check_device

        check_device(target.device)
    elif target.backend in ("tensorrt", "tensorrt-rtx"):
        from .backends.tensorrt import check_target

        check_target(target, name)
    else:
        raise BackendError(
            f"backend {target.backend!r} is not known to fpabee {__version__}",
            "pip install -U fpabee",
        )


@click.command()
@click.argument("engines", type=click.Path(path_type=Path), required=False)
@click.option("--env", "show_env", is_flag=True, help="Versions and devices, for a bug report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@version_option
@exits_with_one_line
def main(engines: Path | None, show_env: bool, as_json: bool) -> None:
    """Say what is in ENGINES, and which of its targets this machine can run."""
    if engines is None and not show_env:
        raise click.UsageError("give an engines folder, or --env")
    content: dict[str, Any] = {}
    if show_env:
        content["environment"] = environment()
    if engines is not None:
        if not engines.is_dir():
            raise ArtifactError(f"{engines} is not a folder", "make one with fpabee-export")
        manifest = read_manifest(engines)
        content |= _describe(manifest)
        content["targets"] = [asdict(state) for state in target_states(engines, manifest)]
        content["not_built"] = msgspec.to_builtins(manifest.not_built)
    if as_json:
        click.echo(json.dumps(content))
        return
    console = Console(soft_wrap=True, highlight=False)
    for name, value in content.pop("environment", {}).items():
        console.print(f"{name}: {value}", markup=False)
    if engines is not None:
        _print(console, content)
        for line in not_built_lines(manifest.not_built, engines):
            console.print(line, markup=False)


def _describe(manifest: Manifest) -> dict[str, Any]:
    return {
        "fpabee": manifest.fpabee_version,
        "model": f"{manifest.model.model_type}, {manifest.model.layers} layers of "
        f"{manifest.model.hidden_size}, {manifest.model.pooling} pooling",
        "task": manifest.task.problem_type.value,
        "labels": list(manifest.task.labels),
        "exits": list(manifest.exit_layers),
        "max_length": manifest.tokenizer.max_length,
        "precisions": ["fp32", *manifest.precisions],
        "rule": manifest.default_rule,
        "default_target": manifest.default_target,
        "operating_points": {
            name: list(target.operating_points)
            for name, target in manifest.targets.items()
            if target.operating_points
        },
    }


def _print(console: Console, content: dict[str, Any]) -> None:
    for name in ("model", "task", "labels", "exits", "max_length", "precisions", "rule"):
        value = content[name]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        console.print(f"{name}: {text}", markup=False)
    table = Table("target", "MiB", "logits within", "here")
    for state in content["targets"]:
        name = state["name"] + (" (default)" if state["name"] == content["default_target"] else "")
        tolerance = "not measured" if state["tolerance"] is None else f"{state['tolerance']:.1e}"
        table.add_row(name, f"{state['size'] / 2**20:.0f}", tolerance, state["why_not"] or "runs")
    console.print(table)


if __name__ == "__main__":
    main()
