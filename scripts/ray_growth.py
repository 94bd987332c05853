#!/usr/bin/env python
"""Measure how Ray jobs grow with rows and actors, and print the table of docs/ray.md.

    python -m scripts.ray_growth                   # the tests' random model, with exit 0
    python -m scripts.ray_growth demo/engines      # a model of your own

The texts are those of `scripts/demo_data/test.jsonl.gz`, repeated. Each job reads Parquet files and
writes Parquet files; its time is that from the read to the last file, without the start of Ray. The
time of an actor is what its process and all its threads take of the CPUs while it classifies.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import pyarrow
import ray
from msgspec.structs import replace
from pyarrow import parquet
from ray.data import DataContext

import fpabee.runtime.serving.ray as serving
from fpabee.runtime import Confidence, Engine, read_manifest, read_rows
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.cli.options import Numbers

DATA = Path(__file__).parent / "demo_data" / "test.jsonl.gz"
FILES = 8


class Timed(serving.Classify):
    """Also says how long each batch took."""

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Add the column `cpu`: in the first row of the batch the seconds of CPU time, else 0."""
        start = time.process_time()
        answers = super().__call__(batch)
        seconds = [0.0] * batch.num_rows
        seconds[0] = time.process_time() - start
        return answers.append_column("cpu", [seconds])


def random_engines(folder: Path) -> Path:
    """An engines folder of the tests' BERT: 3 layers, 32 wide, random weights, an exit 0."""
    from tests.conftest import add_exit_0, make_model

    from fpabee.exporter import export

    engines = folder / "engines"
    export(make_model("bert", folder / "model"), engines)
    add_exit_0(engines)
    rule = Confidence(threshold=0.8, exit_0_threshold=0.8)
    write_manifest(engines, replace(read_manifest(engines), default_rule=rule.to_dict()))
    return engines


def write_texts(folder: Path, rows: int) -> Path:
    """A folder of Parquet files with `rows` texts in all."""
    folder.mkdir()
    texts = itertools.cycle([row.text for row in read_rows(DATA)])
    for number in range(FILES):
        ids = range(number, rows, FILES)
        columns = {"id": ids, "text": list(itertools.islice(texts, len(ids)))}
        parquet.write_table(pyarrow.table(columns), folder / f"{number}.parquet")
    return folder


def measure(texts: Path, engines: Path, actors: int, output: Path) -> tuple[float, float]:
    """Seconds of a job, and seconds of CPU time of its actors."""
    start = time.perf_counter()
    dataset = ray.data.read_parquet(str(texts))
    serving.classify(dataset, engines, actors=actors).write_parquet(str(output))
    seconds = time.perf_counter() - start
    answers = parquet.read_table(output, columns=["id", "cpu"])
    assert len(set(answers["id"].to_pylist())) == answers.num_rows
    return seconds, sum(answers["cpu"].to_pylist())


@click.command()
@click.argument("engines", required=False, type=click.Path(path_type=Path))
@click.option("--rows", default="10000,100000,1000000", type=Numbers(int, "10000,100000"))
@click.option("--actors", default="1,2", type=Numbers(int, "1,2"))
def main(engines: Path | None, **settings: Any) -> None:
    """Measure jobs on ENGINES, and print a Markdown table."""
    serving.Classify = Timed  # type: ignore[misc]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        folder = engines or random_engines(home)
        with Engine.load(folder, threads=1) as engine:
            engine.predict([row.text for row in read_rows(DATA)])
            shares = ", ".join(f"{share:.0%}" for share in engine.tally.shares)
        click.echo(f"ray {ray.__version__}; rows by exit, from the first exit: {shares}\n")
        click.echo("| rows | actors | seconds | rows a second | CPU seconds | rows a CPU second |")
        click.echo("|---|---|---|---|---|---|")
        for rows in settings["rows"]:
            texts = write_texts(home / f"texts-{rows}", rows)
            for actors in settings["actors"]:
                output = home / f"answers-{rows}-{actors}"
                seconds, cpu = measure(texts, folder, actors, output)
                rates = f"{seconds:.1f} | {rows / seconds:.0f} | {cpu:.1f} | {rows / cpu:.0f}"
                click.echo(f"| {rows} | {actors} | {rates} |")


if __name__ == "__main__":
    main()
