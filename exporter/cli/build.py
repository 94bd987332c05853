"""`fpabee-build`: add targets to an engines folder, by their names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from ...runtime.cli import options
from ...runtime.cli.command import READING, command, in_terms_of_options
from ...runtime.cli.console import echo, step_progress
from ...runtime.errors import InputError
from ...runtime.files import read_rows
from ..targets.build import BuildResult, build_targets
from ..targets.builders import BUILDERS
from ..targets.plans import PlanOptions

_NAMES = "; ".join(f"{name}: {builder.needs}" for name, builder in BUILDERS.items())


def _capabilities(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Compute capabilities such as `8.6`, from `86` or `8.6`."""
    parts = [part.strip() for part in value.split(",")]
    named = [f"{p[:-1]}.{p[-1]}" if p.isdigit() and len(p) > 1 else p for p in parts]
    return tuple(dict.fromkeys(named))


@command(
    examples="""
fpabee-build engines/ openvino-fp32
fpabee-build engines/ onnxruntime-int8 openvino-int8 --texts texts.jsonl
fpabee-build engines/ tensorrt-fp16 --batch 1,1,4
""",
    panels={**READING, "TensorRT plans": "--sm --batch --sequence"},
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
@options.option(
    "--sm compute_capabilities",
    "SM,SM,...",
    "Compute capabilities to build tensorrt-rtx plans for.",
    callback=_capabilities,
    default="86,89,120",
)
@options.numbers("--batch", "N,N,N", "Smallest, typical and largest batch.", default="1,8,32")
@options.numbers(
    "--sequence",
    "N,N,N",
    "Smallest, typical and largest number of tokens in a row.",
    default="16,64,128",
)
def main(
    engines: Path,
    names: tuple[str, ...],
    texts: Path | None,
    quiet: bool,
    as_json: bool,
    batch: tuple[int, int, int],
    sequence: tuple[int, int, int],
    compute_capabilities: tuple[str, ...],
    **settings: Any,
) -> None:
    """Add targets to ENGINES, each checked against the model. Does not need PyTorch.

    A target is a library and a precision. One that fails its check leaves the folder as it was.
    """
    options.only_with("columns", texts, "--texts")
    try:
        plans = PlanOptions(batch, sequence, compute_capabilities)
    except InputError as error:
        raise click.UsageError(in_terms_of_options(error)) from error
    rows = read_rows(texts, options.read_options(settings)) if texts is not None else ()
    contents = [row.content for row in rows]
    with step_progress(quiet) as progress:
        result = build_targets(engines, names, contents, plans, progress)
    content = show_built(result, (lambda line: None) if as_json else echo)
    if as_json:
        click.echo(json.dumps({"folder": str(engines), **content}))
    else:
        for line in next_steps(result):
            echo(f"next: {line}")
    for one in result.refused:
        assert one.refused is not None
        raise one.refused


def show_built(result: BuildResult, say: Callable[[str], None]) -> dict[str, Any]:
    """Say what was built, and return the same for JSON."""
    for one in result.checked:
        if one.refused:
            say(f"not added: {one.name}: {in_terms_of_options(one.refused)}")
        else:
            texts = f"verified on {one.agreement.rows} texts" if one.agreement else "not run here"
            say(f"added {one.name}: {texts}")
    manifest = result.engines.manifest
    say(result.default or f"default target: {manifest.default_target}")
    for name, points in result.lost_points.items():
        say(f"no longer valid: {', '.join(points)} of {name}, whose files have changed")
    return {
        "targets": list(manifest.targets),
        "checked": [
            {
                "name": one.name,
                "refused": one.refused and str(one.refused),
                "agreement": one.agreement and one.agreement.to_dict(),
            }
            for one in result.checked
        ],
        "default_target": manifest.default_target,
        "not_valid_any_more": result.lost_points,
    }


def next_steps(result: BuildResult) -> list[str]:
    """The commands that come next: calibrate what was built and has no operating points."""
    folder = shlex.quote(str(result.engines.path))
    targets = result.engines.manifest.targets
    built = [one.name for one in result.checked if one.refused is None]
    names = dict.fromkeys([*result.lost_points, *built])
    steps = [
        f"fpabee-calibrate {folder} --data DATA --target {shlex.quote(name)}"
        for name in names
        if name in targets and not targets[name].operating_points
    ]
    return steps or [f"fpabee-run {folder} texts.txt"]
