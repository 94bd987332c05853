#!/usr/bin/env python
"""Print the output of `fpabee-run --with-text` as a table."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from fpabee.runtime.cli.console import table_console


@click.command()
@click.argument("predictions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(predictions: Path) -> None:
    """Print PREDICTIONS, a JSON lines file, as a table."""
    table = Table("text", "label", "score", "exit")
    for line in predictions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        labels = row["labels"] if "labels" in row else [row["label"]]
        scores = row["scores"] if "scores" in row else [row["score"]]
        shown = ", ".join(f"{score:.3f}" for score in scores)
        table.add_row(row["text"], ", ".join(labels), shown, str(row["exit"]))
    table_console().print(table)


if __name__ == "__main__":
    main()
