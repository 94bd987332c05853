"""`fpabee-export`: compile a model_dir into an engines folder."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..runtime.cli import exits_with_one_line, version_option
from ..runtime.manifest import ProblemType
from .extras import require


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in value.split(",")) if value else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of exits such as 2,4,6") from None


@click.command(context_settings={"show_default": True})
@click.argument("model_dir")
@click.option(
    "-o", "--output", default="engines", type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--exits", callback=_numbers, help="Exits to keep, such as 2,4,6. Default: all.")
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
    help="More texts to verify with (.txt or .jsonl).",
)
@click.option("--force", is_flag=True, help="Replace an engines folder that is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@version_option
@exits_with_one_line
def main(
    model_dir: str, output: Path, quiet: bool, as_json: bool, problem_type: str | None, **rest: Any
) -> None:
    """Compile MODEL_DIR, a trained multi-exit model or a hub id, into an engines folder."""
    require("export")
    from .pipeline import ExportOptions, export

    options = ExportOptions(
        problem_type=ProblemType(problem_type) if problem_type else None, **rest
    )
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    shown: AbstractContextManager[Any] = nullcontext() if quiet else bar
    with shown:
        task = bar.add_task("load", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = export(model_dir, output, options, progress)
    manifest, parity = result.manifest, result.parity
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(result.folder),
                    "segments": len(manifest.segments),
                    "targets": list(manifest.targets),
                    "bytes": result.size,
                    "verification": parity.to_dict(),
                }
            )
        )
        return
    click.echo(
        f"{result.folder}: {len(manifest.segments)} segments, {result.size / 2**20:.0f} MiB, "
        f"target {manifest.default_target}"
    )
    click.echo(
        f"verified on {parity.rows} texts: logits within {parity.max_logit_difference:.1e}, "
        f"labels agree {parity.label_agreement:.2%}, exits agree {parity.exit_agreement:.2%}"
    )
    click.echo(f"next: fpabee-run {result.folder} --input texts.txt")
