"""Options that several commands share, and how their errors are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from ... import __version__
from ..files import LABEL_SEPARATOR, ReadOptions, TextFormat
from ..files.writers import OutputFormat
from ..rules.measures import Measure
from ..rules.rules import RULES, ExitRule, Threshold

F = TypeVar("F", bound=Callable[..., Any])

version_option = click.version_option(__version__, package_name="fpabee")

check_option = click.option(
    "--check",
    is_flag=True,
    help="First run the folder's reference texts: is it the model that was exported?",
)

RULE_OPTIONS = (
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


class FiniteRange(click.FloatRange):
    """A range of numbers; `nan` and `inf`, which Python takes for numbers, are none."""

    def _describe_range(self) -> str:
        """Nothing, where there are no bounds; click would write x<=None."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number of the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def _with(options: Sequence[Callable[[F], F]], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


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
        click.option("--agreement", type=FiniteRange(), help="Threshold of either's measure."),
        click.option("--patience", type=click.IntRange(min=1), help="Signal in a row to stop."),
        click.option("--exit", type=click.IntRange(min=1), help="The exit of budget."),
        click.option("--min-exit", type=click.IntRange(min=1), help="No row stops before it."),
        click.option("--max-exit", type=click.IntRange(min=1), help="Every row stops there."),
    ]
    return _with(options, function)


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


def input_options(function: F) -> F:
    """What is read, and how; see `chosen_sources` and `column_options`."""
    source = click.option(
        "--input",
        "sources",
        multiple=True,
        help="One more of FILES, read after those. May be repeated.",
    )
    files = click.argument("files", nargs=-1, type=click.Path(allow_dash=True))
    return files(source(column_options(function)))


def chosen_sources(files: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
    """All inputs in the order in which they are read.

    Args:
        files: the positional ones.
        sources: those given with `--input`.

    Raises:
        click.UsageError: there is none.
    """
    if not files and not sources:
        raise click.UsageError(
            "there is nothing to classify: give files, such as texts.txt, or - for standard input"
        )
    return (*files, *sources)


def text_options(function: F) -> F:
    """Options that say how texts are read; `read_options` takes them."""
    options = [
        click.option(
            "--input-format",
            type=click.Choice([f.value for f in TextFormat]),
            help="Default: by the file's name.",
        ),
        click.option("--text-column", default="text", help="Field of the text."),
        click.option("--text-pair-column", help="Field of the second text. Default: text_pair."),
        click.option(
            "--no-quotes",
            "literal_quotes",
            is_flag=True,
            help='In .csv and .tsv, " does not quote.',
        ),
    ]
    return _with(options, function)


def column_options(function: F) -> F:
    """Those of `text_options`, and options that say how labels are read."""
    options = [
        click.option("--label-column", help="Field of true labels. Default: labels or label."),
        click.option(
            "--label-separator",
            help=f"Between labels in a cell. Default: {LABEL_SEPARATOR} in a column labels.",
        ),
    ]
    return text_options(_with(options, function))


def read_options(settings: dict[str, Any]) -> ReadOptions:
    """The options that say how inputs are read; takes them out of the settings.

    Raises:
        click.UsageError: two options name the same column.
    """
    names = [field.name for field in fields(ReadOptions)]
    options = ReadOptions(**{name: settings.pop(name) for name in names if name in settings})
    columns = [options.text_column, options.text_pair_column, options.label_column]
    named = [name for name in columns if name is not None]
    if len(set(named)) < len(named):
        raise click.UsageError("a column is text, text_pair or label: give each its own")
    return options


def output_options(function: F) -> F:
    """Options that say where results go and what becomes of a run that is interrupted."""
    options = [
        click.option(
            "--output", type=click.Path(path_type=Path), help="File to write. Default: stdout."
        ),
        click.option(
            "--output-format",
            type=click.Choice([f.value for f in OutputFormat]),
            help="Default: by the file's name, or JSON lines.",
        ),
        click.option(
            "--resume", is_flag=True, help="Go on with the rows that stand in OUTPUT.partial."
        ),
        click.option(
            "--on-error",
            type=click.Choice(["stop", "skip"]),
            default="stop",
            help="A row that cannot be read: stop, or write its error in its place.",
        ),
    ]
    return _with(options, function)
