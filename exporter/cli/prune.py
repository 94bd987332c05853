"""The output of `fpabee-export --from ENGINES --exits`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from ...runtime.cli.inspect import not_built_lines
from ...runtime.rule_words import rule_in_words
from ...runtime.rules.base import ExitRule
from ..prune.drop_exits import DropExitsResult


def to_dict(result: DropExitsResult) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "exits": list(result.exits),
        "layers": list(result.manifest.exit_layers),
        "verification": result.agreement.to_dict(),
        "points": msgspec.to_builtins(result.points),
        "default_operating_point": result.default or "",
        "not_valid_any_more": [
            asdict(lost) | {"command": _calibrate(result, lost.target)} for lost in result.lost
        ],
        "built": list(result.built),
        "left_out": list(result.left_out),
        "not_built": msgspec.to_builtins(result.manifest.not_built),
    }


def show(result: DropExitsResult, console: Console, exits_before: int) -> None:
    """Print the result for people."""
    layers = ", ".join(map(str, result.manifest.exit_layers))
    size = sum(path.stat().st_size for path in result.folder.rglob("*") if path.is_file())
    console.print(
        f"{result.folder}: {len(result.exits)} of {exits_before} exits kept, after layers "
        f"{layers}; {size / 2**20:.0f} MiB, target {result.manifest.default_target}"
    )
    console.print(
        f"verified on {result.agreement.rows} texts: logits within "
        f"{result.agreement.max_logit_difference:.1e} of the PyTorch model"
    )
    if result.exits[-1] < exits_before:
        console.print(
            "the last exit is not kept: full depth is now layer "
            f"{result.manifest.exit_layers[-1]}, and scores are compared with the exit there"
        )
    if len(result.exits) == exits_before:
        points = ", ".join(result.points) or "no operating points"
        console.print(f"all exits are kept; calibrated again on the same rows: {points}")
    elif result.points:
        console.print(_points(result))
        console.print("fpabee-bench measures the times of both folders")
    for lost in result.lost:
        console.print(f"no longer valid: {lost.point} of {lost.target}: {lost.reason}")
        console.print(f"  {_calibrate(result, lost.target)}")
    if result.default not in (None, result.default_before):
        now, before = (
            name or "the default rule" for name in (result.default, result.default_before)
        )
        console.print(f"default operating point: {now} (before: {before})")
    for name in result.built:
        console.print(f"built {name} again")
    for name in result.left_out:
        console.print(f"{name} is left out, because it cannot run or be built here")
    for line in not_built_lines(result.manifest.not_built, result.folder):
        console.print(line)


def _calibrate(result: DropExitsResult, target: str) -> str:
    """The command that calibrates the points of a target."""
    return f"fpabee-calibrate {result.folder} --data DATA --target {shlex.quote(target)}"


def _points(result: DropExitsResult) -> Table:
    table = Table("point", "", "rule", "score", "drop (95 %)", "depth", box=box.SIMPLE_HEAD)
    for name, change in result.points.items():
        for when, point in (("before", change.before), ("after", change.after)):
            low, high = point.drop_interval
            table.add_row(
                name if when == "before" else "",
                when,
                rule_in_words(ExitRule.from_dict(point.rule)),
                f"{point.metric} {point.score:.4f}",
                f"{100 * (point.full_depth_score - point.score):+.2f} ({low:+.2f} to {high:+.2f})",
                f"{point.mean_depth:.2f}",
            )
    return table
