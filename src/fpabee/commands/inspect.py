"""`fpabee-inspect`: what an engines folder contains, and which targets this machine can run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich_click as click
from rich import box
from rich.table import Table

from ..calibration.report.words import passes_in_words
from ..runtime.artifact.folder import EnginesFolder, resolve
from ..runtime.artifact.manifest import Manifest
from ..runtime.artifact.operating_point import OperatingPoint
from ..runtime.artifact.quick import QuickCosts, quick_of, quick_problem
from ..runtime.engine import Engine
from ..runtime.errors import COPY_AGAIN, CheckError, FpabeeError
from ..runtime.hub import engines_folder
from ..runtime.machine import environment, providers
from ..runtime.rules.words import settings_in_words
from ..runtime.targets import backend_class, rule_alone, target_of
from ..runtime.tasks import task_of
from . import options
from .command import command, in_terms_of_options
from .console import echo, echo_wrapped, table_console
from .points import ranking_in_words


@command(
    examples="""
fpabee-inspect engines/
fpabee-inspect engines/ --check
fpabee-inspect --env
""",
    panels={},
)
@options.engines_or_hub(required=False)
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
    checked = None
    if show_env:
        content["environment"] = environment() | {"providers": providers()}
        if not as_json:
            _print_values(content["environment"])
    if engines is not None:
        folder = EnginesFolder.read(engines_folder(engines, every_target=True))
        states = [_state_of(folder, name) for name in folder.manifest.targets]
        content |= _summary(folder.manifest) | {"targets": states}
        if not as_json:
            _print(folder, states)
        if check:
            content["check"] = checked = _check(folder, states)
            if not as_json:
                _print_check(checked)
    if as_json:
        click.echo(json.dumps(content))
    if checked and not checked["passed"]:
        raise CheckError(
            f"{engines} is not as it was made: {len(checked['damaged'])} of {checked['files']} "
            f"files are damaged; refused targets: {', '.join(checked['refused']) or 'none'}",
            COPY_AGAIN,
        )


def _state_of(engines: EnginesFolder, name: str) -> dict[str, Any]:
    """The state of a target; its size is that of its files, or of the graphs that it runs."""
    target = engines.manifest.targets[name]
    state: dict[str, Any] = {
        "name": name,
        "size": 0,
        "logits_differ_by": target.tolerance,
        "speed": target.relative_speed,
        "unavailable_reason": "",
        "default_operating_point": target.default_operating_point,
        "operating_points": {
            point: {"promise": _promised(record), "mean_depth": record.mean_depth}
            | _passes(engines.manifest, record)
            for point, record in target.operating_points.items()
        },
    }
    try:
        for graph in (target.files or engines.manifest.graphs_of(target)).values():
            state["size"] += resolve(engines.path, graph.file).stat().st_size
        backend_class(target).check(target, name)
    except FpabeeError as error:
        state["unavailable_reason"] = in_terms_of_options(error)
    return state


def _check(engines: EnginesFolder, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare every hash, and run the reference texts on every target that can run here."""
    files = engines.damage()
    agreement = dict[str, str]()
    refused = dict[str, str]()
    for name in (state["name"] for state in states if not state["unavailable_reason"]):
        try:
            _, rule = rule_alone(engines.manifest, name, None)
            with Engine.load(engines.path, name, rule=rule) as engine:
                agreement[name] = str(engine.check())
        except FpabeeError as error:
            refused[name] = error.message
    damaged = [message for message in files if message]
    return {
        "files": len(files),
        "damaged": damaged,
        "agreement": agreement,
        "refused": refused,
        "passed": not damaged and not refused,
    }


def _summary(manifest: Manifest) -> dict[str, Any]:
    model = manifest.model
    return {
        "fpabee_version": manifest.fpabee_version,
        "model": f"{model.model_type}, {model.layers} layers of {model.hidden_size}, "
        f"{model.pooling} pooling",
        "problem_type": manifest.task.problem_type.value,
        "labels": list(manifest.task.labels),
        "exit_layers": list(manifest.exit_layers),
        "max_length": manifest.tokenizer.max_length,
        "precisions": ["fp32", *manifest.precisions],
        "default_rule": manifest.default_rule,
        "default_target": manifest.default_target,
    }


def _print(engines: EnginesFolder, states: Sequence[dict[str, Any]]) -> None:
    manifest = engines.manifest
    shown = _summary(manifest)
    default = shown.pop("default_target")
    rule = shown.pop("default_rule")
    task = task_of(manifest.task)
    shown["problem_type"] = task.name
    _print_values(shown)
    echo(f"rule without an operating point: {settings_in_words(rule)}")
    table = Table("target", "MiB", "logits differ by", "speed", "runs here", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"  # --target needs the whole name
    below = []
    for state in states:
        name = state["name"]
        difference = state["logits_differ_by"]
        speed = state["speed"]
        table.add_row(
            name + " (default)" * (name == default),
            f"{state['size'] / 2**20:.1f}",
            "not measured" if difference is None else f"{difference:.1e}",
            "" if speed is None else f"{speed:.2f}x",
            "no" if state["unavailable_reason"] else "yes",
        )
        for point, record in state["operating_points"].items():
            is_default = point == state["default_operating_point"]
            mark = " (default of the target)" if is_default else ""
            cost = f"{record['mean_depth']:.2f} layers per {task.item}"
            if "quick_target" in record:
                costs = QuickCosts(*(record[name] for name in QuickCosts._fields))
                cost = passes_in_words(costs, record["quick_target"], name, f"{task.item}s")
                if record["quick_problem"]:
                    cost = f"it has lost its promise: {record['quick_problem']}"
            below.append(f"{name} {point}{mark}: {record['promise']}; {cost}")
        if state["unavailable_reason"]:
            below.append(f"{name} cannot run here: {state['unavailable_reason']}")
    table_console().print(table)
    for line in below:
        echo_wrapped(line)
    runs = [state["name"] for state in states if not state["unavailable_reason"]]
    if runs and default not in runs:
        instead = target_of(engines, None)
        echo(f"the default target {default} cannot run here; {instead} runs instead")


def _passes(manifest: Manifest, point: OperatingPoint) -> dict[str, Any]:
    """The quick pass of a point, if it has one: its target, its problem, and its costs."""
    quick = quick_of(point)
    if quick is None:
        return {}
    return {
        "quick_target": quick.target,
        "quick_problem": quick_problem(manifest, quick),
        **QuickCosts.of(point.exits, point.measured_speedup, quick.p99_share)._asdict(),
    }


def _promised(point: OperatingPoint) -> str:
    if point.certificate is not None and "top" in point.rule:
        return ranking_in_words(point.certificate, point.rule["top"])
    if point.certificate is not None:
        return str(point.certificate)
    return "no guarantee" if point.goal is None else f"no guarantee; goal: {point.goal}"


def _print_check(checked: Mapping[str, Any]) -> None:
    intact = checked["files"] - len(checked["damaged"])
    echo(f"hashes: {intact} of {checked['files']} files are intact")
    for message in checked["damaged"]:
        echo(f"  {message}")
    for name, agreement in checked["agreement"].items():
        echo(f"{name} reproduces the exported model: {agreement}")
    for name, message in checked["refused"].items():
        echo(f"{name} is refused: {message}")


def _print_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        echo(f"{name.replace('_', ' ')}: {text}")
