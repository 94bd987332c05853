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

from ..artifact.folder import read_manifest
from ..artifact.manifest import ProblemType
from ..errors import InputError, Remedy
from ..targets import rule_of, target_of

_MODEL = """# Written by fpabee, which must be installed for the server's Python.
from fpabee.runtime.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
_INPUTS = {"TEXT": "", "TEXT_PAIR": " optional: true"}
_NO_COPY = shutil.ignore_patterns("calibration", "*.partial")


def write_repository(
    engines: Path,
    repository: Path,
    name: str,
    *,
    target: str | None = None,
    max_texts: int = 256,
    **parameters: Any,
) -> Path:
    """Add a model to a model repository. The engine is not loaded, so any machine can do it.

    Args:
        engines: the engines folder, which is copied.
        repository: the folder of the repository; it is made if it does not exist.
        name: the name of the model, which is that of its folder.
        target: the target that runs; default: the default target of the folder.
        max_texts: most texts in a request.
        **parameters: `operating_point`, `threads`, `max_length` and `max_rows`, as in
            `Engine.load` and `Scheduler`; None: the default of these.

    Returns:
        The folder of the model.

    Raises:
        InputError: the repository already has a model with this name.
        FpabeeError: the engines folder cannot be used, or has no such target or operating point.
    """
    manifest = read_manifest(engines)
    chosen = target_of(engines, manifest, target or manifest.default_target)
    rule_of(engines, manifest, chosen, parameters.get("operating_point"))
    folder = repository / name
    if folder.exists():
        raise InputError(f"{folder} already exists", Remedy("choose another {name}, or remove it"))
    answers = len(manifest.task.labels)
    names = answers if manifest.task.problem_type is ProblemType.MULTI_LABEL else 1
    outputs = {
        "LABEL": ("STRING", names),
        "SCORE": ("FP32", names),
        "PROBABILITIES": ("FP32", answers),
        "EXIT": ("INT32", 1),
        "LAYER": ("INT32", 1),
        "TRUNCATED": ("BOOL", 1),
        "DEADLINE_LIMITED": ("BOOL", 1),
        "DEADLINE_MISSED": ("BOOL", 1),
    }
    gpu = manifest.targets[chosen].on_gpu
    lines = [
        'backend: "python"',
        f"max_batch_size: {max_texts}",
        *(f"input {{ {_tensor(text, 'STRING', 1)}{more} }}" for text, more in _INPUTS.items()),
        *(f"output {{ {_tensor(output, *kind)} }}" for output, kind in outputs.items()),
        f"instance_group {{ count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }}",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in {"target": chosen, **parameters}.items()
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
