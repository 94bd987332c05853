#!/usr/bin/env python
"""Fuzz what reads a stranger's files: manifest, inputs, tokenizer, model folder.

    python scripts/fuzz.py engines/ --model-dir model_dir --seconds 60

Every reader gets files that are changed ever further, guided by the lines of ours that they reach
(Atheris, `pip install 'fpabee[fuzz]'`, Linux). It must read the file or refuse it with an error of
ours, in bounded time and memory. All else is a find: another exception, a panic or crash of a
library, a file that takes too long or too much. Each reader runs in a process of its own. A find's
file is kept, and `--only TARGET --replay FILE` reads it once more. Exit code 1: there was a find.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import util
from pathlib import Path

import click
import msgspec
from fuzz_judge import BROKEN, Job, Report
from rich.table import Table

from fpabee.runtime.cli.console import table_console

WORKER = Path(__file__).parent / "fuzz_worker.py"
GROUPS = {
    "manifest": ("manifest",),
    "reference": ("reference",),
    "inputs": (
        *("txt", "jsonl", "csv", "tsv"),
        *("txt.gz", "jsonl.gz", "csv.gz", "tsv.gz"),
        "parquet",
    ),
    "tokenizer": ("tokenizer",),
    "model": ("config.json", "model.safetensors"),
}
TARGETS = [name for names in GROUPS.values() for name in names]
# A target whose process ends so often is not worth more time.
MOST_CRASHES = 20
_TELLING = ("ERROR: ", "panicked", "overflow", "memory allocation")
# Seconds after which a process is ended that libFuzzer should have ended.
_LATE = 60.0
_LONGEST_INPUT = 4 * 2**20


def fuzz(job: Job, seconds: float, runs: int, seed: int, replay: Path | None = None) -> Report:
    """Fuzz a target; its process is started again where an input ended it.

    Args:
        job: what to do; `place` is a folder for files that are of no use afterwards.
        seconds: for how long.
        runs: at most so many inputs; 0: any number.
        seed: of chance.
        replay: read this file only.
    """
    place = Path(job.place)
    corpus = place / "corpus"
    corpus.mkdir()
    ends, total = time.monotonic() + seconds, Report("")
    for attempt in range(MOST_CRASHES):
        left = round(ends - time.monotonic())
        remaining = runs - total.inputs
        if left < 1 or (runs and remaining < 1):
            break
        again = msgspec.structs.replace(job, place=str(place / f"{attempt}"))
        Path(again.place).mkdir()
        flags = [
            f"-max_total_time={left}",
            f"-runs={remaining if runs else -1}",
            f"-seed={seed + attempt}",
            # The bound is of processor time, and others may use the processor too.
            f"-timeout={round(4 * job.seconds)}",
            f"-max_len={_LONGEST_INPUT}",
            f"-artifact_prefix={place}/",
            "-rss_limit_mb=0",
            "-len_control=0",
            "-mutate_depth=1",
            "-reduce_inputs=0",
            str(replay or corpus),
        ]
        command = [sys.executable, str(WORKER), msgspec.json.encode(again).decode(), *flags]
        code, stderr = _run(command, left + _LATE)
        report_file = Path(job.report)
        if code == BROKEN or not report_file.is_file():
            raise click.ClickException(stderr.decode(errors="replace").strip())
        report = msgspec.json.decode(report_file.read_bytes(), type=Report)
        report_file.unlink()
        if code:
            data = Path(report.path).read_bytes()
            report.inputs += 1
            report.add(_last_words(code, stderr), data, Path(job.keep))
        total.join(report)
        shutil.rmtree(again.place)
        if not code or replay:
            break
    return total


def _run(command: list[str], seconds: float) -> tuple[int, bytes]:
    """Exit code and stderr; 124 if it does not end, though libFuzzer would end it."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return 124, error.stderr or b""
    return done.returncode, done.stderr


def _last_words(code: int, stderr: bytes) -> str:
    """How a process ended, in its own words."""
    lines = re.sub(r"==\d+== ?", "", stderr.decode(errors="replace")).splitlines()
    telling = [line for line in lines if any(word in line for word in _TELLING)]
    return f"exit code {code}: {' '.join(telling[:2]) or 'no word'}"


def table(reports: dict[str, Report]) -> Table:
    """What was found, a line a target."""
    shown = Table()
    for column in ("target", "inputs", "accepted", "refused", "finds", "longest", "most memory"):
        shown.add_column(column, justify="left" if column == "target" else "right")
    for name, report in reports.items():
        counts = (report.inputs, report.accepted, report.refused, len(report.finds))
        shown.add_row(
            name, *map(str, counts), f"{report.seconds:.2f} s", f"{report.mebibytes:.0f} MiB"
        )
    return shown


def chosen_targets(only: Iterable[str], has_model: bool) -> list[str]:
    """The targets of the names of groups and targets; all without any."""
    wanted = {target for name in only for target in GROUPS.get(name, (name,))}
    if wanted.intersection(GROUPS["model"]) and not has_model:
        raise click.UsageError("files of a model are fuzzed with --model-dir")
    here = [name for name in TARGETS if has_model or name not in GROUPS["model"]]
    return [name for name in here if name in wanted] if wanted else here


@click.command()
@click.argument("engines", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model-dir", type=click.Path(exists=True, path_type=Path), help="A model, too.")
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--runs", default=0, help="At most so many inputs for each target.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(
        [*GROUPS, *(n for names in GROUPS.values() for n in names if n not in GROUPS)]
    ),
    help="A group of targets, or one.",
)
@click.option("--seed", default=1, show_default=True, help="Of chance.")
@click.option("--most-seconds", default=5.0, show_default=True, help="Processor time of an input.")
@click.option("--most-mib", default=256.0, show_default=True, help="Memory of an input, in MiB.")
@click.option(
    "--keep",
    default="fuzz-finds",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Folder for the files that are finds.",
)
@click.option("--replay", type=click.Path(exists=True, path_type=Path), help="Read this file only.")
def main(
    engines: Path,
    model_dir: Path | None,
    seconds: int,
    runs: int,
    only: tuple[str, ...],
    seed: int,
    most_seconds: float,
    most_mib: float,
    keep: Path,
    replay: Path | None,
) -> None:
    """Fuzz what reads the files of ENGINES, an engines folder, and of inputs."""
    if util.find_spec("atheris") is None:
        raise click.ClickException("Atheris is not installed -> pip install 'fpabee[fuzz]'")
    names = chosen_targets(only, model_dir is not None)
    if replay and len(names) != 1:
        raise click.UsageError("--replay needs one target: name it with --only")
    reports = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            job = Job(
                engines=str(engines),
                model_dir=str(model_dir) if model_dir else None,
                target=name,
                place=place,
                keep=str(keep / name),
                report=str(Path(place) / "report.json"),
                seconds=most_seconds,
                mebibytes=most_mib,
            )
            reports[name] = fuzz(job, seconds, runs, seed, replay)
    table_console().print(table(reports))
    finds = [(name, find) for name, report in reports.items() for find in report.finds]
    for name, find in finds:
        click.echo(f"{name}: {find.what}, {find.times} times, such as {find.file}")
    if finds:
        sys.exit(1)


if __name__ == "__main__":
    main()
