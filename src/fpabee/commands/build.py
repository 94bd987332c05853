"""`fpabee-build`: add targets to an engines folder, by their names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click

from ..calibration.scoring import METRICS
from ..exporter.targets.backends import RTX, TENSORRT
from ..exporter.targets.build import BuildResult, build_targets
from ..exporter.targets.builders import BUILDERS, builder_of
from ..runtime.errors import FpabeeError
from ..runtime.files import read_rows
from ..runtime.targets import why_not
from . import options
from .command import READING, command, in_terms_of_options
from .console import echo, step_progress

_NAMES = "; ".join(f"{name}: {builder.needs}" for name, builder in BUILDERS.items())


@command(
    examples="""
fpabee-build engines/ openvino-fp32
fpabee-build engines/ onnxruntime-int8 openvino-int8 --texts texts.jsonl
fpabee-build engines/ tensorrt-fp16 --batch 1,1,4
""",
    panels={**READING, **options.PLANS},
)
@click.argument("engines", type=options.PATH, help="Engines folder.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", help=f"Targets. {_NAMES}.")
@options.path(
    "--texts",
    "Texts like those to classify, in any format of fpabee-run. Targets are checked on them, and "
    "int8 takes its ranges from some of them.",
)
@options.quiet
@options.as_json
@options.columns
@options.plans(batch="1,8,32")
def main(
    engines: Path,
    names: tuple[str, ...],
    texts: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Add targets to ENGINES, each checked against the model. Does not need PyTorch.

    A target is a library and a precision. One that fails its check leaves the folder as it was.
    """
    options.only_with("columns", texts, "--texts")
    with options.wrong_usage():
        backends = {builder_of(name).backend for name in names}
    options.only_with("batch sequence", backends & {RTX, TENSORRT}, "a target of TensorRT")
    options.only_with("compute_capabilities", RTX in backends, "a target of TensorRT for RTX")
    plans = options.plan_options(settings)
    rows = read_rows(texts, options.read_options(settings)) if texts is not None else ()
    contents = list(dict.fromkeys(row.content for row in rows))  # again would verify nothing more
    with step_progress(quiet) as progress:
        result = build_targets(engines, names, contents, plans, progress)
    if as_json:
        click.echo(json.dumps({"folder": str(engines), **to_dict(result)}))
    elif result.added:
        show(result)
        for line in next_steps(engines, result, [*result.lost_points, *result.added], texts):
            echo(f"next: {line}")
    refusals = [refusal(result, name) for name in result.refused]
    for each in refusals[:-1]:
        echo(f"error: {in_terms_of_options(each)}", err=True)
    if refusals:
        raise refusals[-1]


def refusal(result: BuildResult, name: str) -> FpabeeError:
    """Why a target was not added, with its name."""
    error = result.refused[name]
    return FpabeeError(f"{name} was not added: {error.message}", error.hint)


def show(result: BuildResult) -> None:
    """Say what was added, and what that changes."""
    for name, agreement in result.added.items():
        texts = f"verified on {agreement.rows} texts" if agreement else "not run here"
        echo(f"added {name}: {texts}")
    echo(result.default or f"default target: {result.manifest.default_target}")
    for name, points in result.lost_points.items():
        echo(f"no longer valid: {', '.join(points)} of {name}, whose files or library have changed")


def to_dict(result: BuildResult) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "targets": list(result.manifest.targets),
        "added": {
            name: agreement and agreement.to_dict() for name, agreement in result.added.items()
        },
        "refused": {name: str(error) for name, error in result.refused.items()},
        "default_target": result.manifest.default_target,
        "lost_points": result.lost_points,
    }


def next_steps(
    folder: Path, result: BuildResult, names: Sequence[str], texts: Path | None
) -> list[str]:
    """The commands that come next: calibrate what has no operating points, or else run.

    Rerankers run, because only a conversion certifies their operating points.

    Args:
        folder: the engines folder.
        result: what was built into it.
        names: the targets to calibrate; if none of them runs here, the default target.
        texts: a file of texts; None: none was given, so what to give is in capitals.
    """
    manifest = result.manifest
    if manifest.task.problem_type not in METRICS:
        return [f"fpabee-run {shlex.quote(str(folder))} QUERIES"]
    calibrate = f"fpabee-calibrate {shlex.quote(str(folder))} --data DATA"
    lacking = [name for name, target in manifest.targets.items() if not target.operating_points]
    here = [
        name
        for name in dict.fromkeys(names)
        if name in manifest.targets and why_not(manifest, name) is None
    ]
    steps = [f"{calibrate} --target {shlex.quote(name)}" for name in here if name in lacking]
    if not here and manifest.default_target in lacking:
        steps = [calibrate]
    inputs = "TEXTS" if texts is None else shlex.quote(str(texts))
    return steps or [f"fpabee-run {shlex.quote(str(folder))} {inputs}"]
