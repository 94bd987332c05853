"""What `fpabee-export --from ENGINES --exits` says of its result."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from ...calibration.descriptions import rule_in_words
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.cli.inspect import not_built_lines
from ...runtime.rules.base import ExitRule
from ..prune.drop_exits import DropExitsResult

CAUTIOUS = "the cautious rule"


def to_dict(result: DropExitsResult) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "exits": list(result.exits),
        "layers": list(result.manifest.exit_layers),
        "verification": result.agreement.to_dict(),
        "points": {
            name: {
                "before": msgspec.to_builtins(point.before),
                "after": msgspec.to_builtins(point.after),
            }
            for name, point in result.points.items()
        },
        "default_operating_point": result.default or "",
        "not_valid_any_more": [
            asdict(lost) | {"command": _calibrate(result, lost.target)} for lost in result.lost
        ],
        "built": list(result.built),
        "not_built": msgspec.to_builtins(result.manifest.not_built),
    }


def show(result: DropExitsResult, console: Console, exits_before: int) -> None:
    """Print the result for people."""
    kept, layers = len(result.exits), ", ".join(map(str, result.manifest.exit_layers))
    size = sum(path.stat().st_size for path in result.folder.rglob("*") if path.is_file())
    console.print(
        f"{result.folder}: {kept} of {exits_before} exits kept, after layers {layers}; "
        f"{size / 2**20:.0f} MiB, target {result.manifest.default_target}"
    )
    console.print(
        f"verified on {result.agreement.rows} texts: logits within "
        f"{result.agreement.max_logit_difference:.1e} of the PyTorch model"
    )
    if kept == exits_before:
        console.print("nothing was dropped: all exits are kept")
    if result.exits[-1] < exits_before:
        last = result.manifest.exit_layers[-1]
        console.print(
            f"the last exit is gone: full depth is layer {last} now, and drops are against it"
        )
    if result.points and kept == exits_before:
        console.print(f"calibrated again on the same rows: {', '.join(result.points)}")
    elif result.points:
        console.print(_points(result))
        console.print("times are not compared here: fpabee-bench measures them")
    for lost in result.lost:
        console.print(f"not valid any more: {lost.point} of {lost.target}: {lost.reason}")
        console.print(f"  {_calibrate(result, lost.target)}")
    if result.default not in (None, result.default_before):
        now, before = (name or CAUTIOUS for name in (result.default, result.default_before))
        console.print(f"default, where no point is named: {now} (before: {before})")
    for name in result.built:
        console.print(f"built {name} again")
    for line in not_built_lines(result.manifest.not_built, result.folder):
        console.print(line)


def _calibrate(result: DropExitsResult, target: str) -> str:
    """The command that calibrates the points of a target."""
    return f"fpabee-calibrate {result.folder} --data DATA --target {shlex.quote(target)}"


def _points(result: DropExitsResult) -> Table:
    table = Table("point", "", "rule", "score", "drop (95 %)", "depth", title="Points:")
    for name, point in result.points.items():
        table.add_row(name, "before", *_row(point.before))
        table.add_row("", "after", *_row(point.after), end_section=True)
    return table


def _row(point: OperatingPoint) -> list[str]:
    low, high = point.drop_interval
    drop = 100 * (point.full_depth_score - point.score)
    return [
        rule_in_words(ExitRule.from_dict(point.rule)),
        f"{point.metric} {point.score:.4f}",
        f"{drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{point.mean_depth:.2f}",
    ]
