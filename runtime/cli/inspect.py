"""`fpabee-inspect`: what is in an engines folder, and what of it this machine can run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from ..artifact.folder import read_manifest
from ..artifact.manifest import Manifest, NotBuilt
from ..backends.tensorrt import build_command
from ..environment import environment, providers
from ..errors import ArtifactError, VerificationError
from ..inspection import (
    Integrity,
    Part,
    TargetState,
    chain_parts,
    check_integrity,
    target_states,
)
from .console import echo, table_console
from .errors import exits_with_one_line
from .options import version_option


def not_built_lines(left: Mapping[str, NotBuilt], folder: Path) -> list[str]:
    """What a folder lacks, why, and the command that builds it, two lines each.

    The command is made here, of what this fpabee knows: nobody should run what a file says.
    """
    lines = []
    for name, note in left.items():
        command = build_command(note.backend, note.precision)
        there = command.replace("ENGINES", shlex.quote(str(folder))) or "pip install -U fpabee"
        lines += [f"not built: {name}: {note.reason}", f"  there: {there}"]
    return lines


@click.command()
@click.argument("engines", type=click.Path(path_type=Path), required=False)
@click.option("--env", "show_env", is_flag=True, help="Versions and devices, for a bug report.")
@click.option(
    "--check",
    is_flag=True,
    help="Compare the hashes of all files, and run the reference texts on every target that "
    "can run here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@version_option
@exits_with_one_line
def main(engines: Path | None, show_env: bool, check: bool, as_json: bool) -> None:
    """Say what is in ENGINES, and which of its targets this machine can run."""
    if engines is None and (check or not show_env):
        raise click.UsageError("give an engines folder" + ("" if check else ", or --env"))
    content: dict[str, Any] = {}
    if show_env:
        content["environment"] = environment() | {"providers": providers()}
        if not as_json:
            _print_values(content["environment"])
    found = None
    if engines is not None:
        if not engines.is_dir():
            raise ArtifactError(f"{engines} is not a folder", "make one with fpabee-export")
        manifest = read_manifest(engines)
        parts, states = chain_parts(engines, manifest), target_states(engines, manifest)
        found = check_integrity(engines, manifest, states) if check else None
        content |= _describe(manifest)
        content["chain"] = [asdict(part) for part in parts]
        content["targets"] = [_state_to_dict(state) for state in states]
        content["not_built"] = msgspec.to_builtins(manifest.not_built)
        if found is not None:
            content["check"] = asdict(found) | {"passed": found.passed}
        if not as_json:
            _print(engines, manifest, parts, states)
            if found is not None:
                _print_check(found)
    if as_json:
        click.echo(json.dumps(content))
    if found is not None and not found.passed:
        raise VerificationError(
            f"{engines} is not as it was exported: {len(found.damaged)} of {found.files} files "
            f"are damaged, {len(found.refused)} targets do not give what the model gave",
            "copy the engines folder again, or export the model again",
        )


def _state_to_dict(state: TargetState) -> dict[str, Any]:
    """A state for JSON, where the reason keeps the key that it has had since version 0.1."""
    content = asdict(state)
    content["why_not"] = content.pop("unavailable_reason")
    return content


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


def _print(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    states: Sequence[TargetState],
) -> None:
    shown = _describe(manifest)
    default, rule = shown.pop("default_target"), shown.pop("rule")
    del shown["operating_points"]
    _print_values(shown)
    settings = "".join(f", {key} {value}" for key, value in rule.items() if key != "name")
    echo(f"rule without an operating point: {rule.get('name')}{settings}")
    for line in chain_lines(parts, manifest.tokenizer.max_length):
        echo(line)
    table = Table("target", "MiB", "logits within", "operating points", "here")
    for state in states:
        target = manifest.targets[state.name]
        points = [
            point + (" (default)" if point == target.default_operating_point else "")
            for point in target.operating_points
        ]
        table.add_row(
            state.name + (" (default)" if state.name == default else ""),
            _mebibytes(state.size),
            "not measured" if state.tolerance is None else f"{state.tolerance:.1e}",
            ", ".join(points),
            state.unavailable_reason or _runs(state, target.default_operating_point),
        )
    table_console().print(table)
    for line in not_built_lines(manifest.not_built, folder):
        echo(line)


def _runs(state: TargetState, default: str) -> str:
    if not state.no_rule:
        return "runs"
    rule = f"default operating point {default!r}" if default else "default rule"
    return f"runs, but its {rule} cannot be used: {state.no_rule}"


def chain_lines(parts: Sequence[Part], max_length: int) -> Iterator[str]:
    """A picture of a chain: a line for each segment, from the text down.

    Args:
        parts: the segments.
        max_length: tokens of the longest text.
    """
    yield f"text, up to {max_length} tokens"
    rows = []
    for part in parts:
        first, last = part.layers
        layers = f"layer {last}" if first == last else f"layers {first}-{last}"
        calls = Counter(part.calls)
        names = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in calls.items())
        size = "missing" if part.size is None else f"{_mebibytes(part.size)} MiB"
        rows.append((layers, size, f"{len(part.calls)} call{'s' * (len(part.calls) > 1)}", names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for part, (layers, size, count, names) in zip(parts, rows, strict=True):
        yield "  |"
        yield (
            f"  +-- {layers:{widths[0]}}  {size:>{widths[1]}}  {count:{widths[2]}}  "
            f"{names:{widths[3]}} --> exit {part.exit}"
        )


def _print_check(found: Integrity) -> None:
    whole = found.files - len(found.damaged)
    echo(f"hashes: {whole} of {found.files} files are whole")
    for message in found.damaged:
        echo(f"  {message}")
    for name, agreement in found.agreement.items():
        echo(f"{name} is the model that was exported: {agreement}")
    for name, message in found.refused.items():
        echo(f"{name} is refused: {message}")


def _print_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        echo(f"{name}: {text}")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    main()
