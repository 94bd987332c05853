"""`fpabee-inspect`: what an engines folder contains, and which targets this machine can run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from rich import box
from rich.table import Table

from ..artifact.folder import read_manifest
from ..artifact.manifest import Manifest
from ..environment import environment, providers
from ..errors import VerificationError
from ..inspection import Integrity, TargetState, check_integrity, target_states
from ..rule_words import settings_in_words
from ..targets import target_of
from . import options
from .command import command
from .console import echo, table_console
from .errors import in_terms_of_options


@command(
    examples="""
fpabee-inspect engines/
fpabee-inspect engines/ --check
fpabee-inspect --env
""",
    panels={},
)
@click.argument(
    "engines", type=options.PATH, required=False, help="Folder written by fpabee-export."
)
@options.flag(
    "--check", "Check the hashes of all files, and run the reference texts on each target."
)
@options.flag("--env show_env", "Show versions and devices, to paste into a bug report.")
@options.as_json
def main(engines: Path | None, show_env: bool, check: bool, as_json: bool) -> None:
    """Show what ENGINES contains, and which of its targets this machine can run."""
    if engines is None and (check or not show_env):
        raise click.UsageError("give ENGINES" + ("" if check else " or --env"))
    content: dict[str, Any] = {}
    found = None
    if show_env:
        content["environment"] = environment() | {"providers": providers()}
        if not as_json:
            _print_values(content["environment"])
    if engines is not None:
        manifest = read_manifest(engines)
        states = target_states(engines, manifest, in_terms_of_options)
        found = check_integrity(engines, manifest, states) if check else None
        content |= _summary(manifest) | {
            "targets": msgspec.to_builtins(states),
        }
        if found is not None:
            content["check"] = msgspec.to_builtins(found) | {"passed": found.passed}
        if not as_json:
            _print(engines, manifest, states)
            if found is not None:
                _print_check(found)
    if as_json:
        click.echo(json.dumps(content))
    if found is not None and not found.passed:
        raise VerificationError(
            f"{engines} has changed since its export: {len(found.damaged)} of {found.files} files "
            f"are damaged, and {len(found.refused)} targets do not reproduce the model",
            "copy the engines folder again, or export the model again",
        )


def _summary(manifest: Manifest) -> dict[str, Any]:
    model = manifest.model
    return {
        "fpabee": manifest.fpabee_version,
        "model": f"{model.model_type}, {model.layers} layers of {model.hidden_size}, "
        f"{model.pooling} pooling",
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


def _print(folder: Path, manifest: Manifest, states: Sequence[TargetState]) -> None:
    shown = _summary(manifest)
    default, rule = shown.pop("default_target"), shown.pop("rule")
    del shown["operating_points"]
    _print_values(shown)
    echo(f"rule without an operating point: {settings_in_words(rule)}")
    table = Table(
        *("target", "MiB", "error of logits", "speed"),
        *("operating points", "on this machine"),
        box=box.SIMPLE_HEAD,
    )
    for state in states:
        target = manifest.targets[state.name]
        points = [
            point + " (default)" * (point == target.default_operating_point)
            for point in target.operating_points
        ]
        table.add_row(
            state.name + " (default)" * (state.name == default),
            f"{state.size / 2**20:.1f}",
            "not measured" if target.tolerance is None else f"{target.tolerance:.1e}",
            "" if target.relative_speed is None else f"{target.relative_speed:.2f}x",
            ", ".join(points),
            state.unavailable_reason or "runs",
        )
    table_console().print(table)
    runs = [state for state in states if not state.unavailable_reason]
    if runs and default not in {state.name for state in runs}:
        name = target_of(folder, manifest, None)
        echo(f"the default target {default} cannot run here; {name} runs instead")


def _print_check(found: Integrity) -> None:
    intact = found.files - len(found.damaged)
    echo(f"hashes: {intact} of {found.files} files are intact")
    for message in found.damaged:
        echo(f"  {message}")
    for name, agreement in found.agreement.items():
        echo(f"{name} reproduces the exported model: {agreement}")
    for name, message in found.refused.items():
        echo(f"{name} is refused: {message}")


def _print_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        echo(f"{name}: {text}")
