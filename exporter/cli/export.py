"""`fpabee-export`: compile a model into an engines folder, or extend such a folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click

from ...runtime.artifact.manifest import MANIFEST_NAME, ProblemType
from ...runtime.cli import options
from ...runtime.cli.command import READING, command, in_terms_of_options
from ...runtime.cli.console import echo, step_progress
from ...runtime.cli.options import not_with, only_with
from ...runtime.errors import InputError, VerificationError
from ...runtime.files import read_rows
from ...runtime.machine import require
from ..add_targets import AddTargetsOptions, AddTargetsResult, add_targets, check_options
from ..paths import check_model_dir, check_output, resolved
from ..targets.backends import FP16, INT8, ONNXRUNTIME, OPENVINO, RTX, TENSORRT, unavailable_reason
from ..targets.plans import PlanOptions

Content = dict[str, Any]


def _capabilities(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Compute capabilities such as `8.6`, from `86` or `8.6`."""
    parts = [part.strip() for part in value.split(",")]
    named = [f"{p[:-1]}.{p[-1]}" if p.isdigit() and len(p) > 1 else p for p in parts]
    return tuple(dict.fromkeys(named))


@command(
    examples="""
fpabee-export model_dir -o engines/
fpabee-export model_dir -o engines/ --fp16
fpabee-export model_dir -o engines/ --exits 4,8,12
fpabee-export --from engines/ --backend tensorrt --fp16
""",
    panels={
        "Model": "--problem-type --max-length",
        "Precision and verification": "--calibration-data --verify-data --target",
        **READING,
        "TensorRT plans": "--sm --batch --sequence",
    },
)
@click.argument(
    "model_dir",
    required=False,
    help="Trained multi-exit model: a folder, or an id on the Hugging Face hub.",
)
@options.path("-o --output", "Folder to write. Default: engines.", "DIR")
@options.path(
    "--from source",
    "Add to this engines folder instead of exporting a model. Does not need PyTorch.",
    "ENGINES",
)
@options.numbers(
    "--exits",
    "N,N,...",
    "Exits to keep. Default: all.",
)
@options.flag("--fp16", "Also export fp16, and build its targets.")
@options.flag("--int8", "Also export int8, and build its targets.")
@options.choice(
    "--backend backends",
    "BACKEND",
    "Build for this backend, or fail. May be repeated. Default: build what this machine can.",
    [TENSORRT, RTX, OPENVINO, ONNXRUNTIME],
    multiple=True,
)
@options.flag("--force", "Replace an existing engines folder.")
@options.quiet
@options.as_json
@options.choice(
    "--problem-type",
    "TYPE",
    "Task of a checkpoint that does not name it.",
    ProblemType,
)
@options.count(
    "--max-length",
    "Number of tokens to which longer texts are truncated. Default: what the model supports.",
)
@options.path(
    "--calibration-data",
    "Texts that set the value ranges of --int8.",
)
@options.path(
    "--verify-data",
    "More texts to verify with.",
)
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
@options.option(
    "--target",
    "NAME",
    "Target to make the default. Default: a fast one on this machine.",
)
def main(
    model_dir: str | None,
    output: Path | None,
    source: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compile MODEL_DIR into an engines folder, with one ONNX segment for each exit.

    With --from, add precisions and targets to an engines folder.
    """
    if (model_dir is None) == (source is None):
        raise click.UsageError("give either MODEL_DIR or --from ENGINES")
    _check_usage(source is None, settings)
    reading = options.read_options(settings)
    folder = source or output or Path("engines")
    if model_dir is not None:
        _check_paths(model_dir, folder, settings)
    for name in ("calibration_data", "verify_data"):
        rows = read_rows(settings[name], reading) if settings[name] else ()
        settings[name] = [row.content for row in rows]
    say = (lambda line: None) if as_json else echo
    content: Content = {}
    targets = _target_options(settings)
    if model_dir is not None:
        check_options(targets)
        content = _export(model_dir, folder, settings, quiet, say)
        if not (targets.fp16 or targets.int8 or targets.backends):
            # Plans are built only if they are asked for. OpenVINO needs no files.
            problem = unavailable_reason(OPENVINO)
            targets = replace(targets, backends=() if problem else (OPENVINO,))
            if problem:
                say(f"not added: {OPENVINO}: {in_terms_of_options(problem)}")
    with step_progress(quiet) as progress:
        added = add_targets(folder, targets, progress)
    content |= _show_added(added, say)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **content}))
    else:
        asked = source is not None or settings["int8"] or bool(settings["backends"])
        for line in _next_steps(folder, added, asked):
            echo(f"next: {line}")
    if settings["int8"] or settings["backends"]:
        _check_kept(added, settings["int8"])


def _check_usage(is_new: bool, settings: dict[str, Any]) -> None:
    """Refuse options that contradict each other, or that have no effect.

    Raises:
        click.UsageError: which, and what they need.
    """
    data = settings["calibration_data"]
    only_with(
        "columns",
        data or settings["verify_data"],
        "--verify-data or --calibration-data",
    )
    not_with("output force exits problem_type max_length", not is_new, "--from")
    only_with(
        "verify_data",
        is_new or settings["fp16"] or OPENVINO in settings["backends"],
        "a new export, --fp16 or --backend openvino",
    )
    only_with("calibration_data", settings["int8"], "--int8")
    only_with("int8", data or not is_new, "--calibration-data")


def _check_paths(model_dir: str, output: Path, settings: dict[str, Any]) -> None:
    """Check the paths of a new export, before texts are read and PyTorch is loaded.

    Raises:
        ModelError: there is no such model.
        InputError: it is an engines folder, or an input is inside of the output.
        ArtifactError: the output must not be written.
    """
    if Path(model_dir, MANIFEST_NAME).is_file():
        raise InputError(
            f"{model_dir} is an engines folder, not a model_dir",
            f"to add targets: fpabee-export --from {model_dir}; to run: fpabee-run {model_dir}",
        )
    inputs = model_dir, settings["calibration_data"], settings["verify_data"]
    check_output(resolved(output), settings["force"], inputs)
    check_model_dir(model_dir)


def _target_options(settings: dict[str, Any]) -> AddTargetsOptions:
    """The options of `add_targets`; the fields of both classes are named like settings."""
    sizes = settings["batch"], settings["sequence"]
    try:
        plans = PlanOptions(*sizes, settings["compute_capabilities"])
    except InputError as error:
        raise click.UsageError(in_terms_of_options(error)) from error
    changes = {
        "backends": settings["backends"] or None,
        "default_target": settings["target"],
        "plans": plans,
    }
    return msgspec.convert(settings | changes, AddTargetsOptions)


def _export(
    model_dir: str,
    output: Path,
    settings: dict[str, Any],
    quiet: bool,
    say: Callable[[str], None],
) -> Content:
    require("export")
    from ..pipeline import ExportOptions, export

    wanted = msgspec.convert(settings, ExportOptions)
    with step_progress(quiet) as progress:
        result = export(model_dir, output, wanted, progress)
    manifest, agreement = result.manifest, result.agreement
    say(f"{result.folder}: {len(manifest.segments)} segments, {result.size / 2**20:.0f} MiB")
    say(f"added {manifest.default_target}: verified on {agreement.rows} texts")
    return {
        "segments": len(manifest.segments),
        "bytes": result.size,
        "verification": agreement.to_dict(),
    }


def _check_kept(added: AddTargetsResult, int8: bool) -> None:
    """Fail if nothing has passed that was asked for by `--backend` or `--int8`.

    Raises:
        VerificationError: none of them is kept.
    """
    wanted = [one for one in added.checked if one.name != FP16]
    asked = [one for one in wanted if not int8 or INT8 in one.name]
    reasons = {one.name: one.refused for one in asked if one.refused}
    if asked and len(reasons) == len(asked):
        names, first = " and ".join(reasons), next(iter(reasons.values()))
        raise VerificationError(f"{names} did not pass: {first.message}", first.hint)


def _next_steps(folder: Path, added: AddTargetsResult, asked: bool) -> list[str]:
    """The commands that come next: calibrate what has no operating points yet, or else run.

    Args:
        folder: the engines folder.
        added: what was added to it.
        asked: whether targets for CPUs were asked for, so that each of them is calibrated and not
            only the default target.
    """
    manifest, new = added.manifest, [*added.lost_points]
    new += (one.name for one in added.checked if asked or one.name.startswith(TENSORRT))
    names = dict.fromkeys(name for name in new if name in manifest.targets)
    calibrate = f"fpabee-calibrate {shlex.quote(str(folder))} --data DATA"
    lacking = {name for name, target in manifest.targets.items() if not target.operating_points}
    steps = [f"{calibrate} --target {shlex.quote(name)}" for name in names if name in lacking]
    if not names and manifest.default_target in lacking:
        steps = [calibrate]
    return steps or [f"fpabee-run {shlex.quote(str(folder))} texts.txt"]


def _show_added(result: AddTargetsResult, say: Callable[[str], None]) -> Content:
    for one in result.checked:
        if one.refused:
            say(f"not added: {one.name}: {in_terms_of_options(one.refused)}")
        else:
            texts = f"verified on {one.agreement.rows} texts" if one.agreement else "not run here"
            say(f"added {one.name}: {texts}")
    say(result.default or f"default target: {result.manifest.default_target}")
    for name, points in result.lost_points.items():
        say(f"no longer valid: {', '.join(points)} of {name}, whose graphs or plans have changed")
    return {
        "targets": list(result.manifest.targets),
        "checked": [
            {
                "name": one.name,
                "refused": one.refused and str(one.refused),
                "agreement": one.agreement and one.agreement.to_dict(),
            }
            for one in result.checked
        ],
        "default_target": result.manifest.default_target,
        "not_valid_any_more": result.lost_points,
    }
