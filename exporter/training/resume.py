"""The output folder of a training: what must not be replaced, and where to resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ...runtime.artifact.folder import check_outside
from ...runtime.errors import InputError, Remedy
from .options import TrainOptions
from .report import in_json_types

_OPTIONS_NAME = "options.json"
# Options that do not change what the encoder learns.
_NEUTRAL = {"resume", "force", "test", "exit_0", "exit_0_only"}


def checkpoints_of(output: Path) -> Path:
    """Where the checkpoints of an unfinished training are."""
    return output / "checkpoints"


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of an unfinished training; None if there is none."""
    # The trainer writes this file last.
    states = checkpoints_of(output).glob("checkpoint-*/trainer_state.json")
    complete = [path.parent for path in states if path.stat().st_size]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(output: Path, options: TrainOptions) -> None:
    """Check that no model is replaced without `force`, and that there is something to resume.

    Raises:
        InputError: there is already a model, or no finished epoch to resume after, or the folder
            is an engines folder or inside of the folder of a model.
    """
    holds_model = (output / "config.json").is_file()
    check_outside(output if holds_model else output / "config.json")
    if options.resume:
        if last_checkpoint(output) is None:
            raise InputError(
                f"{checkpoints_of(output)} holds no finished epoch to resume after",
                Remedy("leave out {resume}"),
            )
    elif holds_model and not (options.force or options.in_place):
        raise InputError(
            f"{output} already holds a model",
            Remedy("give {force} to replace it, or another {output}"),
        )


def begin(output: Path, options: TrainOptions, rows: str) -> None:
    """Make room for checkpoints, or check that existing ones belong to the same training.

    Args:
        output: the output folder.
        options: of this training.
        rows: hash of the training rows.

    Raises:
        InputError: the training to resume was started with other rows or options.
    """
    folder = checkpoints_of(output)
    settings = in_json_types(options) | {"rows": rows}
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _OPTIONS_NAME).write_text(json.dumps(settings), encoding="utf-8")
        return
    before = json.loads((folder / _OPTIONS_NAME).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name not in _NEUTRAL and before.get(name) != value:
            detail = "other rows" if name == "rows" else f"{name} {before.get(name)}, not {value}"
            raise InputError(
                f"the training in {folder} was started with {detail}",
                Remedy("give the same data and options as then, or leave out {resume}"),
            )
