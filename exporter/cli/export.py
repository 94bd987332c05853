"""`fpabee-export`: compile a model_dir into an engines folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import msgspec

from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import ProblemType
from ...runtime.cli.console import Shown, echo, table_console
from ...runtime.cli.errors import exits_with_one_line
from ...runtime.cli.inspect import not_built_lines
from ...runtime.cli.options import (
    column_options,
    read_options,
    version_option,
)
from ...runtime.files import ReadOptions
from ...runtime.optional_packages import require
from ..add_targets import AddTargetsOptions, add_targets, check_options, drop_graphs
from ..precision.formats import Half
from ..prune.drop_exits import DropExitsOptions, drop_exits
from ..targets.options import RTX_CAPABILITIES, TENSORRT, PlanOptions
from . import prune as placement_shown


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in value.split(",")) if value else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 2,4,6") from None


def _exits(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value == "auto":
        raise click.BadParameter(
            "auto was removed, because the exits it chose ran no faster beyond noise: give exit "
            "numbers such as 2,4,6"
        )
    return _numbers(context, parameter, value)


def _three(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    numbers = _numbers(context, parameter, value) or ()
    if len(numbers) != 3 or list(numbers) != sorted(numbers) or numbers[0] < 1:
        raise click.BadParameter(f"{value!r} is not a smallest, typical and largest size")
    return numbers[0], numbers[1], numbers[2]


def _capabilities(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Compute capabilities such as `8.6` of `86` or `8.6`."""
    parts = [part.strip().replace(".", "") for part in value.split(",")]
    if not all(part.isdigit() and len(part) > 1 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of compute capabilities such as 86,89")
    found = tuple(dict.fromkeys(f"{part[:-1]}.{part[-1]}" for part in parts))
    for capability in found:
        if capability not in RTX_CAPABILITIES:
            raise click.BadParameter(
                f"TensorRT for RTX has no support for {capability}; it has "
                f"{', '.join(RTX_CAPABILITIES)}. For others build on the device, with --backend "
                "tensorrt"
            )
    return found


@click.command(context_settings={"show_default": True})
@click.argument("model_dir", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write. Default: engines.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="Add to this engines folder instead, from the graphs it holds. Needs no torch.",
)
@click.option(
    "--exits",
    callback=_exits,
    metavar="N,N,...",
    help="Exits to keep, such as 2,4,6. Default: all. With --from and -o: into a new folder.",
)
@click.option(
    "--target", help="Whose points --from --exits calibrates again. Default: the folder's."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for --from --exits.")
@click.option(
    "--problem-type",
    type=click.Choice([kind.value for kind in ProblemType]),
    help="For checkpoints that do not name their task.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Longest sequence in tokens. Default: what the model takes.",
)
@click.option(
    "--verify-data",
    type=click.Path(path_type=Path),
    help="More texts to verify with, in any format of fpabee-run.",
)
@click.option("--force", is_flag=True, help="Replace an engines folder that is there.")
@click.option("--fp16", is_flag=True, help="Also write fp16, and build it where possible.")
@click.option("--bf16", is_flag=True, help="Also write bf16, and build it where possible.")
@click.option("--int8", is_flag=True, help="Also write int8 for TensorRT, and build it.")
@click.option(
    "--calibration-data",
    type=click.Path(path_type=Path),
    help="Rows like those to classify: for the ranges of --int8, or labelled for --from "
    "--exits, if the folder no longer has those that calibrated it.",
)
@column_options
@click.option(
    "--keep-fp32",
    multiple=True,
    metavar="NODE|auto",
    help="Keep a node (GRAPH:NODE) in fp32, or all that overflow.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Build for this one, or fail. Default: those that can be built here.",
)
@click.option(
    "--sm",
    "compute_capabilities",
    callback=_capabilities,
    default="86,89,120",
    help="GPUs to build tensorrt-rtx plans for.",
)
@click.option("--batch", callback=_three, default="1,8,32", help="Rows: least, typical, most.")
@click.option(
    "--sequence", callback=_three, default="16,64,128", help="Tokens: least, typical, most."
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Of the builder.")
@click.option("--workspace", type=click.IntRange(1, 2**20), help="Most scratch memory, in MiB.")
@click.option("--version-compatible", is_flag=True, help="Plans for later TensorRT versions.")
@click.option("--hardware-compatible", is_flag=True, help="Plans for Ampere and later GPUs.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Builds at a time.")
@click.option("--resume", is_flag=True, help="Keep plans that are already built.")
@click.option(
    "--no-onnx",
    is_flag=True,
    help="Drop the ONNX graphs at the end, on devices short of space: only plans remain.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@version_option
@exits_with_one_line
def main(
    model_dir: str | None,
    output: Path | None,
    source: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compile MODEL_DIR, a trained multi-exit model or a hub id, into an engines folder."""
    if (model_dir is None) == (source is None):
        raise click.UsageError("give either MODEL_DIR or --from an engines folder")
    reading = read_options(settings)
    is_read = settings["verify_data"] or settings["calibration_data"]
    if not is_read and reading != ReadOptions():
        raise click.UsageError(
            "columns and the format are those of --verify-data and --calibration-data: give one"
        )
    reads_labels = settings["exits"] is not None and settings["calibration_data"]
    if not (source and reads_labels) and (reading.label_column or reading.label_separator):
        raise click.UsageError("labels are read of --calibration-data with --from --exits only")
    exits = settings.pop("exits")
    place = {name: settings.pop(name) for name in ("target", "threads")}
    fresh = {name: settings.pop(name) for name in ("problem_type", "max_length", "force")}
    if source is not None and exits is not None:
        if output is None:
            raise click.UsageError("--from with --exits writes a new folder: name it with -o")
        if fresh["problem_type"] or fresh["max_length"]:
            raise click.UsageError("--from takes the task and the length from the folder")
        others = ("fp16", "bf16", "int8", "keep_fp32", "backends", "no_onnx", "verify_data")
        if any(settings[name] for name in others):
            raise click.UsageError(
                "--exits keeps the precisions and targets that are there; add others to the new "
                "folder, with a second --from"
            )
        options = DropExitsOptions(
            exits=exits,
            data=settings["calibration_data"],
            force=fresh["force"],
            targets=_extend_options(settings | {"calibration_data": None}, reading),
            reading=reading,
            **place,
        )
        _place(source, output, options, Shown(quiet), as_json)
        return
    if any(place.values()):
        raise click.UsageError(
            "--target and --threads go with --from ENGINES --exits N,N,... -o NEW"
        )
    if source is not None and (output is not None or any(fresh.values())):
        raise click.UsageError("--from adds to a folder: what was exported stays as it is")
    fresh["exits"] = exits
    wanted = _extend_options(settings, reading)
    if source is not None and wanted.verify_data and not wanted.precisions:
        raise click.UsageError("--verify-data goes with a new export, or with --fp16 or --bf16")
    if wanted.keep_fp32 and not wanted.precisions:
        raise click.UsageError("--keep-fp32 needs a precision: --fp16 or --bf16")
    if wanted.int8_data is not None and not wanted.int8:
        raise click.UsageError("--calibration-data goes with --int8")
    if wanted.int8 and wanted.int8_data is None and source is None:
        raise click.UsageError("--int8 needs --calibration-data")
    if (settings["version_compatible"] or settings["hardware_compatible"]) and (
        wanted.backends != (TENSORRT,)
    ):
        raise click.UsageError(
            "--version-compatible and --hardware-compatible go with --backend tensorrt"
        )
    if settings["no_onnx"] and source is None:
        raise click.UsageError("--no-onnx goes with --from, on the device")
    shown = Shown(quiet)
    content: dict[str, Any] = {}
    lines: list[str] = []
    if model_dir is not None:
        check_options(wanted)
        fresh |= {"verify_data": wanted.verify_data, "reading": reading}
        folder, content, lines = _export(model_dir, output, fresh, shown)
    else:
        assert source is not None
        folder = source
    if wanted.precisions or wanted.int8 or wanted.backends or source is not None:
        if not as_json:
            _echo(lines)
            lines = []
        more, added = _extend(folder, wanted, shown)
        if settings["no_onnx"]:
            drop_graphs(folder)
            added.append("the ONNX graphs are dropped: other targets need a new export")
        content |= more
        lines += added
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **content}))
    else:
        _echo([*lines, f"next: fpabee-run {folder} --input texts.txt"])


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        echo(line)


def _place(
    source: Path, output: Path, options: DropExitsOptions, shown: Shown, as_json: bool
) -> None:
    """Keep some exits of an engines folder, in a new one."""
    with shown as progress:
        result = drop_exits(source, output, options, progress)
    if as_json:
        click.echo(json.dumps({"folder": str(output), **placement_shown.to_dict(result)}))
        return
    placement_shown.show(result, table_console(), len(read_manifest(source).segments))
    echo(f"next: fpabee-run {output} --input texts.txt")


def _extend_options(settings: dict[str, Any], reading: ReadOptions) -> AddTargetsOptions:
    workspace = settings["workspace"]
    return AddTargetsOptions(
        precisions=tuple(half for half in Half if settings[half.value]),
        int8=settings["int8"],
        int8_data=settings["calibration_data"],
        backends=settings["backends"] or None,
        keep_fp32=settings["keep_fp32"],
        verify_data=settings["verify_data"],
        plans=PlanOptions(
            batch=settings["batch"],
            sequence=settings["sequence"],
            compute_capabilities=settings["compute_capabilities"],
            version_compatible=settings["version_compatible"],
            hardware_compatible=settings["hardware_compatible"],
            optimization_level=settings["optimization_level"],
            workspace=None if workspace is None else workspace * 2**20,
        ),
        jobs=settings["jobs"],
        resume=settings["resume"],
        reading=reading,
    )


def _export(
    model_dir: str,
    output: Path | None,
    fresh: dict[str, Any],
    shown: Shown,
) -> tuple[Path, dict[str, Any], list[str]]:
    require("export")
    from ..pipeline import ExportOptions, export

    problem_type = fresh.pop("problem_type")
    options = ExportOptions(
        problem_type=ProblemType(problem_type) if problem_type else None,
        **fresh,
    )
    with shown as progress:
        result = export(model_dir, output or "engines", options, progress)
    manifest, agreement = result.manifest, result.agreement
    content = {
        "segments": len(manifest.segments),
        "targets": list(manifest.targets),
        "bytes": result.size,
        "verification": agreement.to_dict(),
    }
    lines = [
        f"{result.folder}: {len(manifest.segments)} segments, {result.size / 2**20:.0f} MiB, "
        f"target {manifest.default_target}",
        f"verified on {agreement.rows} texts: logits within {agreement.max_logit_difference:.1e}, "
        f"labels agree {agreement.label_agreement:.2%}, exits agree {agreement.exit_agreement:.2%}",
    ]
    return result.folder, content, lines


def _extend(
    folder: Path, options: AddTargetsOptions, shown: Shown
) -> tuple[dict[str, Any], list[str]]:
    with shown as progress:
        result = add_targets(folder, options, progress)
    lines = []
    for check in result.checks:
        lines.append(
            f"{check.precision}: emulated on {check.rows} texts, {check.agreement}"
            + (f", {len(check.kept)} nodes kept in fp32" if check.kept else "")
        )
    for name in result.built:
        target = result.manifest.targets[name]
        where = ", ".join(target.compute_capabilities)
        ran = (
            "not run here" if target.tolerance is None else f"logits within {target.tolerance:.1e}"
        )
        lines.append(f"built {name} for compute capability {where} ({ran})")
    lines += not_built_lines(result.not_built, folder)
    for name, points in result.lost_points.items():
        lines += [
            f"not valid any more: {', '.join(points)} of {name}, measured on what it was before",
            f"  fpabee-calibrate {folder} --data DATA --target {shlex.quote(name)}",
        ]
    content = {
        "targets": list(result.manifest.targets),
        "precisions": [check.to_dict() for check in result.checks],
        "built": list(result.built),
        "not_built": msgspec.to_builtins(result.not_built),
        "not_valid_any_more": result.lost_points,
    }
    return content, lines
