#!/usr/bin/env python
"""Measure how fast the example for Spark is with a packed file, compared with a plain graph.

    python scripts/spark_times.py engines/ --input texts.txt --spark spark-env/

The plain graph is the same model without exits, packed like the file. Each round runs both, with
one process and with two. The time of a run is that of the whole command, less that of a run over
one text, which starts Spark and loads the model. The texts are repeated until there are enough.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import pyarrow as pa
from one_graph import write_one_graph
from pyarrow import dataset, parquet

from fpabee.commands.command import exits_with_one_line
from fpabee.commands.console import step_progress
from fpabee.exporter.single_file import pack
from fpabee.runtime import read_manifest
from fpabee.runtime.files import read_rows
from fpabee.runtime.machine import environment

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "spark_classify.py"
PLAIN = "plain graph"
WITH_EXITS = "with exits"
START = "start"
FILE = "file"
WORKERS = (1, 2)
FILES = 8


def write_texts(folder: Path, texts: Sequence[str]) -> None:
    """Write texts as several Parquet files, of which Spark gives some to each process."""
    folder.mkdir()
    for number in range(min(FILES, len(texts))):
        part = pa.table({"text": texts[number::FILES]})
        parquet.write_table(part, folder / f"{number}.parquet")


def seconds_of(spark: Path, workers: int, packed: Path, texts: Path, output: Path) -> float:
    """How long the example takes."""
    variables = os.environ | {"PYSPARK_PYTHON": str(spark / "bin" / "python")}
    submit = str(spark / "bin" / "spark-submit")
    command = [submit, "--master", f"local[{workers}]", str(EXAMPLE)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, str(packed), str(texts), str(output)],
        env=variables,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(done.stderr.decode(errors="replace"))
    return time.perf_counter() - started


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@click.option(
    "--spark",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Virtual environment with pyspark, pandas<3, pyarrow, onnxruntime and tokenizers.",
)
@click.option("--rows", type=click.IntRange(1), default=100_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@exits_with_one_line
def main(engines: Path, source: str, spark: Path, rows: int, rounds: int) -> None:
    """Measure the example with ENGINES, and print a table in Markdown."""
    texts = [row.content for row in read_rows(source) if isinstance(row.content, str)]
    cases = [*product(WORKERS, (PLAIN, WITH_EXITS), (START, FILE))]
    seconds = defaultdict[tuple[int, str, str], list[float]](list)
    with TemporaryDirectory() as name, step_progress(quiet=False) as progress:
        place = Path(name)
        packed = pack(engines, place / WITH_EXITS)
        write_one_graph(engines, place / "one")
        pack(place / "one", place / PLAIN, packed.target)
        write_texts(place / START, texts[:1])
        write_texts(place / FILE, [*islice(cycle(texts), rows)])
        for number, case in enumerate(cases * rounds):
            progress("run", number, len(cases) * rounds)
            workers, graph, work = case
            output = place / f"answers-{number}"
            taken = seconds_of(spark, workers, place / graph, place / work, output)
            seconds[case].append(taken)
        answers = dataset.dataset(output, format="parquet").to_table(["exit"])
    layers = np.array(read_manifest(engines).exit_layers)
    depth = layers[answers["exit"].to_numpy() - packed.exits[0]].mean()
    median = {case: statistics.median(each) for case, each in seconds.items()}
    click.echo(f"| processes | start, s | {PLAIN}, s | {WITH_EXITS}, s | times as fast |")
    click.echo("|---|---|---|---|---|")
    for workers in WORKERS:
        start = median[workers, WITH_EXITS, START]
        plain, with_exits = (
            median[workers, graph, FILE] - median[workers, graph, START]
            for graph in (PLAIN, WITH_EXITS)
        )
        times = f"{plain:.1f} | {with_exits:.1f} | {plain / with_exits:.2f}"
        click.echo(f"| {workers} | {start:.1f} | {times} |")
    click.echo(
        f"\nMedians of {rounds} rounds over {rows:,} texts, whose mean depth is {depth:.2f} of "
        f"{layers[-1]} layers; {packed.target}; {', '.join(map(' '.join, environment().items()))}."
    )


if __name__ == "__main__":
    main()
