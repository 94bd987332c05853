"""Write a model repository for NVIDIA's Triton Inference Server.

REPOSITORY/NAME/config.pbtxt    inputs, outputs, devices and parameters
REPOSITORY/NAME/1/model.py      imports `triton_model`
REPOSITORY/NAME/1/engines/      a copy of the engines folder
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..artifact.folder import check_outside, read_manifest
from ..artifact.manifest import ProblemType
from ..errors import InputError
from ..targets import rule_of, target_of

__all__ = ["write_repository"]

_MODEL = """# Written by fpabee, which must be installed for the server's Python.
from fpabee.runtime.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
INPUTS = {"TEXT": "", "TEXT_PAIR": " optional: true"}
"""The inputs of the model, and what their configuration adds."""
OUTPUTS = {
    "LABEL": ("STRING", "labels"),
    "SCORE": ("FP32", "scores"),
    "PROBABILITIES": ("FP32", "probabilities"),
    "EXIT": ("INT32", "exit"),
    "LAYER": ("INT32", "layer"),
    "TRUNCATED": ("BOOL", "truncated"),
    "DEADLINE_LIMITED": ("BOOL", "deadline_limited"),
    "DEADLINE_MISSED": ("BOOL", "deadline_missed"),
}
"""The outputs of the model: their types, and the attribute of `Prediction` that they hold."""
_NO_COPY = shutil.ignore_patterns("calibration")


def write_repository(
    engines: Path,
    repository: Path,
    name: str,
    *,
    target: str | None = None,
    max_texts: int = 256,
    max_rows: int = 1000,
    **parameters: Any,
) -> Path:
    """Add a model to a model repository. The engine is not loaded, so any machine can do it.

    Args:
        engines: the engines folder, which is copied.
        repository: the folder of the repository; it is made if it does not exist.
        name: the name of the model, which is that of its folder.
        target: the target that runs; default: the default target of the folder.
        max_texts: most texts in a request.
        max_rows: most rows that are unanswered at a time; more are refused.
        **parameters: `operating_point`, `threads` and `max_length`, as in `Engine.load`.

    Returns:
        The folder of the model.

    Raises:
        InputError: the repository already has a model with this name or is inside the folder of a
            model, or the name contains a separator of folders.
        FpabeeError: the engines folder cannot be used, or has no such target or operating point.
    """
    manifest = read_manifest(engines)
    chosen = target_of(engines, manifest, target or manifest.default_target)
    rule_of(engines, manifest, chosen, parameters.get("operating_point"))
    folder = repository / name
    if Path(name).name != name or name == "..":
        raise InputError(f"{name!r} is not the name of a folder", "choose another `name`")
    check_outside(folder)
    if folder.exists():
        raise InputError(f"{folder} already exists", "choose another `name`, or remove it")
    labels = len(manifest.task.labels)
    width = labels if manifest.task.problem_type is ProblemType.MULTI_LABEL else 1
    sizes = {"labels": width, "scores": width, "probabilities": labels}
    gpu = manifest.targets[chosen].on_gpu
    lines = [
        'backend: "python"',
        f"max_batch_size: {min(max_texts, max_rows)}",
        *(f"input {{ {_tensor(text, 'STRING', 1)}{more} }}" for text, more in INPUTS.items()),
        *(
            f"output {{ {_tensor(output, kind, sizes.get(source, 1))} }}"
            for output, (kind, source) in OUTPUTS.items()
        ),
        f"instance_group {{ count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }}",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in {"target": chosen, "max_rows": max_rows, **parameters}.items()
            if value is not None
        ),
    ]
    try:
        shutil.copytree(engines, folder / "1" / "engines", ignore=_NO_COPY)
        (folder / "1" / "model.py").write_text(_MODEL, "utf-8")
        (folder / "config.pbtxt").write_text("\n".join([*lines, ""]), "utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _tensor(name: str, kind: str, size: int) -> str:
    return f"name: {_quoted(name)} data_type: TYPE_{kind} dims: {size}"


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)
