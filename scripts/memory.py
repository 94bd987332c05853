#!/usr/bin/env python
"""Measure the memory and the loading time of an engines folder, as a Markdown table.

    python scripts/memory.py table engines/

Each target runs in fresh processes, as a chain and as one full graph: it is loaded with all its
segments, and then one text runs to full depth. Memory is resident memory over that of a process
that has imported the runtime. Targets of OpenVINO are loaded twice: cold, and from their cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from peers_child import resident_mib

from fpabee.exporter.merge import write_one_graph
from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.backends.onnxruntime_session import usable_cores
from fpabee.runtime.cli.errors import exits_with_one_line
from fpabee.runtime.environment import cpu_name
from fpabee.runtime.targets import runnable_targets

TEXT = "It is not that the plot is bad, but nobody could call it good either."


def load(folder: str, target: str) -> tuple[float, float]:
    """Seconds to load a target of a folder, and the memory that it takes in MiB."""
    before, started = resident_mib(), time.perf_counter()
    with Engine.load(folder, target, preload=True) as engine:
        seconds = time.perf_counter() - started
        engine.predict([TEXT], full_depth=True)
        return seconds, resident_mib() - before


def measured(folder: Path, target: str) -> list[str]:
    """The cells of a folder and target: loading cold, loading again, and memory."""
    with TemporaryDirectory() as cache:
        found = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, __file__, "load", str(folder), target],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"XDG_CACHE_HOME": cache},
            )
            found.append(json.loads(done.stdout))
    (cold, _), (warm, memory) = found
    return [f"{cold:.1f}", f"{warm:.1f}", f"{memory:.0f}"]


@click.group()
def main() -> None:
    """Measure memory and loading times."""


@main.command("load")
@click.argument("folder")
@click.argument("target")
def _load(folder: str, target: str) -> None:
    click.echo(json.dumps(load(folder, target)))


@main.command()
@click.argument("engines", type=click.Path(exists=True, path_type=Path))
@exits_with_one_line
def table(engines: Path) -> None:
    """Print the table of ENGINES."""
    click.echo("| target | chain: load s | again s | MiB | full graph: load s | again s | MiB |")
    click.echo("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as place:
        manifest, whole = read_manifest(engines), Path(place)
        kept = write_one_graph(engines, whole)
        for target in runnable_targets(engines):
            cells = measured(engines, target)
            cells += measured(whole, target) if target in kept.targets else ["", "", ""]
            click.echo(f"| {target} | " + " | ".join(cells) + " |")
    click.echo(
        f"\n{manifest.model.model_type}, {manifest.model.layers} layers of "
        f"{manifest.model.hidden_size}; {cpu_name()}, {usable_cores()} threads."
    )


if __name__ == "__main__":
    main()
