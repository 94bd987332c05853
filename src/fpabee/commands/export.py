"""`fpabee-export`: compile a model into an engines folder."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import rich_click as click

from ..exporter.early import Config
from ..exporter.paths import check_model_dir, check_output, resolved
from ..exporter.targets.build import build_targets
from ..exporter.targets.builders import (
    FP16_TARGETS,
    INT8_TARGETS,
    OPENVINO_TARGETS,
    buildable,
    check_buildable,
    check_enough_texts,
)
from ..runtime.artifact.manifest import ProblemType
from ..runtime.files import read_rows
from ..runtime.machine import require
from ..runtime.tasks.kinds import CLASSIFICATION
from . import options
from .build import next_steps, refusal, show, to_dict
from .command import READING, command, in_terms_of_options
from .console import echo, step_progress
from .options import only_with


@command(
    examples="""
fpabee-export model_dir -o engines/
fpabee-export model_dir -o engines/ --fp16
fpabee-export model_dir -o engines/ --int8 --texts texts.jsonl
fpabee-export model_dir -o engines/ --exits 4,8,12
""",
    panels={"Model": "--problem-type --max-length", **READING},
)
@click.argument(
    "model_dir",
    help="Trained multi-exit model: a folder, or an id on the Hugging Face hub.",
)
@options.path("-o --output", "Folder to write. Default: engines.", "DIR")
@options.numbers(
    "--exits",
    "N,N,...",
    "Exits to keep, by number. Default: all.",
)
@options.flag("--fp16", "Also build the targets in fp16 that this machine can, for GPUs.")
@options.flag("--int8", "Also build the targets in int8 that this machine can, for CPUs.")
@options.path(
    "--texts",
    "Texts like those to classify, to verify with as well; --int8 takes its ranges from some of "
    "them.",
)
@options.flag("--force", "Replace an existing engines folder.")
@options.quiet
@options.as_json
@options.choice(
    "--problem-type",
    "TYPE",
    "Task of a checkpoint that does not name it.",
    CLASSIFICATION,
)
@options.count(
    "--max-length",
    "Number of tokens to which longer texts are truncated. Default: what the model supports.",
)
@options.columns
def main(
    model_dir: str,
    output: Path | None,
    fp16: bool,
    int8: bool,
    texts: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    exits: tuple[int, ...] | None,
    problem_type: str | None,
    max_length: int | None,
    **settings: Any,
) -> None:
    """Compile MODEL_DIR into an engines folder, with one ONNX segment for each exit.

    Targets of OpenVINO need no files, so they are added where it is installed. fpabee-build adds
    other targets later, by their names, and does not need PyTorch.
    """
    only_with("columns", texts, "--texts")
    only_with("int8", texts, "--texts")
    reading = options.read_options(settings)
    folder = output or Path("engines")
    config = Config(_check_paths(model_dir, folder, texts, force))
    config.check_exits(exits)
    config.check_length(max_length)
    rows = read_rows(texts, reading) if texts is not None else ()
    contents = list(dict.fromkeys(row.content for row in rows))  # again would verify nothing more
    families = [FP16_TARGETS] if fp16 else []
    if int8:
        check_enough_texts(len(contents))
        require("quantize")
        families.append(INT8_TARGETS)
    for targets in families:
        check_buildable(targets)
    asked = [buildable(targets) for targets in families]
    require("export")
    from ..exporter.pipeline import ExportOptions, export

    wanted = ExportOptions(
        exits=exits,
        problem_type=ProblemType(problem_type) if problem_type else None,
        max_length=max_length,
        texts=contents,
        force=force,
    )
    with step_progress(quiet) as progress:
        exported = export(model_dir, folder, wanted, progress)
    manifest = exported.manifest
    agreement = exported.agreement
    if not as_json:
        size = exported.size / 2**20
        echo(f"{exported.folder}: {len(manifest.segments)} segments, {size:.0f} MiB")
        echo(f"added {manifest.default_target}: verified on {agreement.rows} texts")
    names = [*buildable(OPENVINO_TARGETS), *chain.from_iterable(asked)]
    with step_progress(quiet) as progress:
        built = build_targets(folder, names, contents, progress=progress)
    if as_json:
        content = {
            "folder": str(folder),
            "segments": len(manifest.segments),
            "bytes": exported.size,
            "verification": agreement.to_dict(),
            **to_dict(built),
        }
        click.echo(json.dumps(content))
    # What was asked for and is not there is an error, which is printed once, at the end.
    failed = next((names[0] for names in asked if built.refused.keys() >= {*names}), None)
    if not as_json:
        for name, error in built.refused.items():
            if name != failed:
                echo(f"not added: {name}: {in_terms_of_options(error)}")
        show(built)
        to_calibrate = [name for name in built.added if name not in OPENVINO_TARGETS]
        for line in next_steps(folder, built, to_calibrate, texts):
            echo(f"next: {line}")
    if failed is not None:
        raise refusal(built, failed)


def _check_paths(model_dir: str, output: Path, texts: Path | None, force: bool) -> Path:
    """Check the paths of an export, before texts are read and PyTorch is loaded.

    Returns:
        A folder with the configuration of the model.

    Raises:
        ModelError: there is no such model, or it is an engines folder.
        InputError: an input is inside of the output.
        ArtifactError: the output must not be written.
    """
    config = check_model_dir(model_dir)
    check_output(resolved(output), force, (model_dir, texts))
    return config
