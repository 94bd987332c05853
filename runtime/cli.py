"""`fpabee-run`: classify a file with an engines folder. JSON lines out, all else on stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import __version__
from .distributions import Measure
from .engine import Engine, Prediction
from .errors import FpabeeError, InputError
from .exit_rules import RULES, ExitRule, Threshold
from .summary import Summary
from .text_io import Row, TextFormat, read_rows

F = TypeVar("F", bound=Callable[..., Any])

version_option = click.version_option(__version__, package_name="fpabee")


def exits_with_one_line(function: F) -> F:
    """Turn our errors into one line on stderr and exit code 1; bugs keep their traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except FpabeeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except BrokenPipeError:
            # The reader (such as head) has seen enough: not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return wrapper  # type: ignore[return-value]


_RULE_OPTIONS = (
    "measure",
    "threshold",
    "agreement",
    "patience",
    "exit",
    "min_exit",
    "max_exit",
)


class _ThresholdType(click.ParamType[Threshold]):
    """One number, or one for each exit: `0.1` or `0.1,0.2,0.3`."""

    name = "number[,number...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Threshold:
        """Numbers of the text on the command line."""
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number, nor a list such as 0.1,0.2", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


def rule_options(function: F) -> F:
    """Options that describe an exit rule; `chosen_rule` reads them."""
    options = [
        click.option("--rule", type=click.Choice(list(RULES)), help="Exit rule."),
        click.option(
            "--measure",
            type=click.Choice([m.value for m in Measure]),
            help="Similarity measure of fpabee.",
        ),
        click.option(
            "--threshold",
            type=_ThresholdType(),
            help="Threshold of the rule: one, or one for each exit with commas.",
        ),
        click.option("--agreement", type=float, help="Threshold of either's measure."),
        click.option("--patience", type=click.IntRange(min=1), help="Signs in a row to stop."),
        click.option("--exit", type=click.IntRange(min=1), help="The exit of budget."),
        click.option("--min-exit", type=click.IntRange(min=1), help="No row stops before it."),
        click.option("--max-exit", type=click.IntRange(min=1), help="Every row stops there."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def chosen_rule(default: ExitRule, name: str | None, settings: dict[str, Any]) -> ExitRule:
    """The rule that the options describe: a named one, or the default with changes.

    Raises:
        RuleError: a setting that the rule does not take, or one that it needs is missing.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    base = default.to_dict() if name in (None, default.name) else {"name": name}
    if given.get("measure", base.get("measure")) != base.get("measure"):
        # Thresholds of two measures are on different scales.
        base.pop("threshold", None)
    return ExitRule.from_dict(base | given)


@click.command(context_settings={"show_default": True})
@click.argument("engines", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "source",
    required=True,
    help=".txt (a text a line), .jsonl (objects with text, text_pair), or - for stdin.",
)
@click.option(
    "--input-format",
    type=click.Choice([f.value for f in TextFormat]),
    help="Default: by the file's name.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write. Default: stdout.")
@click.option("--target", help="A built target. Default: the folder's.")
@click.option(
    "--operating-point", help="A calibrated rule of the target, by name. Default: the target's."
)
@rule_options
@click.option("--full-depth", is_flag=True, help="Run every layer for every row.")
@click.option("--max-length", type=click.IntRange(min=1), help="Truncate to fewer tokens.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@click.option("--with-text", is_flag=True, help="Repeat the text in the output.")
@click.option("--all-scores", is_flag=True, help="Give the probabilities of all labels.")
@click.option("--metrics", is_flag=True, help="Score against the labels in the input.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
@version_option
@exits_with_one_line
def main(
    engines: Path,
    source: str,
    input_format: str | None,
    output: Path | None,
    target: str | None,
    operating_point: str | None,
    rule: str | None,
    full_depth: bool,
    max_length: int | None,
    threads: int | None,
    with_text: bool,
    all_scores: bool,
    metrics: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Classify the texts of --input with ENGINES, a folder that fpabee-export wrote."""
    overrides = rule is not None or any(settings[name] is not None for name in _RULE_OPTIONS)
    if operating_point and overrides:
        raise click.UsageError("--operating-point names a whole rule: give no rule options with it")
    if full_depth and (operating_point or overrides):
        raise click.UsageError("--full-depth runs every layer: give no rule with it")
    with Engine.load(engines, target, operating_point, threads, max_length=max_length) as engine:
        chosen = chosen_rule(engine.rule, rule, settings) if overrides else engine.rule
        summary = Summary(engine, None if full_depth else chosen, metrics)
        rows = read_rows(source, TextFormat(input_format) if input_format else None)
        with _writer(output) as out, _progress(quiet) as advance:
            for row, prediction in _classified(engine, rows, chosen, full_depth):
                index = summary.rows
                summary.add(row, prediction)
                record = _record(engine, index, row, prediction, with_text, all_scores)
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                advance(summary)
        if not quiet:
            point = None if overrides or full_depth else engine.operating_point
            summary.print(Console(stderr=True, highlight=False), point)
        elif metrics:
            summary.print_metrics(Console(stderr=True, highlight=False))


def _classified(
    engine: Engine, rows: Iterable[Row], rule: ExitRule, full_depth: bool
) -> Iterator[tuple[Row, Prediction]]:
    """Rows with their predictions; holds only the rows of the window at work."""
    waiting: deque[Row] = deque()

    def texts() -> Iterator[Any]:
        for row in rows:
            waiting.append(row)
            yield row.content

    for prediction in engine.stream(texts(), rule=rule, full_depth=full_depth):
        yield waiting.popleft(), prediction


def _record(
    engine: Engine, index: int, row: Row, prediction: Prediction, with_text: bool, all_scores: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {"index": index, **row.fields}
    if with_text:
        record["text"] = row.text
        if row.text_pair is not None:
            record["text_pair"] = row.text_pair
    scores = [round(score, 6) for score in prediction.scores]
    if engine.multi_label:
        record |= {"labels": list(prediction.labels), "scores": scores}
    else:
        record |= {"label": prediction.labels[0], "score": scores[0]}
    # Once more the index: a field of the input must not hide a result.
    record |= {"index": index, "exit": prediction.exit, "layer": prediction.layer}
    if prediction.truncated:
        record["truncated"] = True
    if all_scores:
        record["all_scores"] = {
            label: round(value, 6)
            for label, value in zip(engine.labels, prediction.probabilities, strict=True)
        }
    return record


@contextmanager
def _writer(output: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that appears only when it is complete."""
    if output is None:
        with open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False) as stream:
            yield stream
        return
    partial = output.with_name(output.name + ".partial")
    try:
        if output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
        partial.replace(output)
    except FpabeeError as error:
        hint = f"{error.hint}; rows done so far are in {partial}"
        raise type(error)(error.message, hint) from error
    except OSError as error:
        raise InputError(
            f"cannot write {output}: {error.strerror}",
            f"check the folder and the free space; rows done so far are in {partial}"
            if partial.exists()
            else "give another --output",
        ) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Summary], None]]:
    if quiet or not sys.stderr.isatty():
        yield lambda summary: None
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    started = time.perf_counter()
    with bar:
        task = bar.add_task("loading", total=None)

        def advance(summary: Summary) -> None:
            if summary.rows % 64 == 0:
                rate = summary.rows / (time.perf_counter() - started)
                bar.update(task, description=f"{summary.rows} rows, {rate:.0f} rows/s")

        yield advance
