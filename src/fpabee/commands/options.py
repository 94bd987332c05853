"""Options that several commands share, and the values that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rich_click as click
from click import get_current_context
from click.core import ParameterSource

from ..runtime.errors import FpabeeError, InputError, RuleError
from ..runtime.files import ReadOptions
from ..runtime.rules.rules import OF_SHARES, RULES, ExitRule
from ..runtime.targets import MOST_THREADS
from .command import in_terms_of_options, option_of

if TYPE_CHECKING:
    from ..exporter.targets.plans import PlanOptions

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

_FIELDS = ("text", "text_pair", "label")
PATH = click.Path(path_type=Path)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the text of an option."""
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 2,4,6", param, ctx)


class FiniteRange(click.FloatRange):
    """A range of numbers without `nan` and `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def option(names: str, metavar: str, help: str, **settings: Any) -> Decorator:
    """An option with a value; its names are separated by spaces, as on the help page."""
    return click.option(*names.split(), metavar=metavar, help=help, **settings)


def flag(names: str, help: str, **settings: Any) -> Decorator:
    """An option without a value."""
    return click.option(*names.split(), is_flag=True, help=help, **settings)


def path(names: str, help: str, metavar: str = "FILE", required: bool = False) -> Decorator:
    """An option that takes a path."""
    return option(names, metavar, help, type=PATH, required=required)


def count(
    name: str, help: str, default: int | None = None, min: int = 1, max: int | None = None
) -> Decorator:
    """An option that takes a whole number."""
    return option(name, "N", help, type=click.IntRange(min, max), default=default)


def number(name: str, help: str, default: float | None = None, **limits: Any) -> Decorator:
    """An option that takes a finite number; the limits are those of `click.FloatRange`."""
    return option(name, "X", help, type=FiniteRange(**limits), default=default)


def numbers(names: str, metavar: str, help: str, **settings: Any) -> Decorator:
    """An option that takes whole numbers separated by commas."""
    return option(names, metavar, help, type=Numbers(), **settings)


def choice(
    names: str, metavar: str, help: str, values: Iterable[str], **settings: Any
) -> Decorator:
    """An option that takes one of a few values, which its help lists.

    Args:
        names: as in `option`.
        metavar: what stands for the value on the help page.
        help: the sentence before the list.
        values: strings, or a class of string enums.
        **settings: of `click.option`.
    """
    choices = [value.value if isinstance(value, Enum) else value for value in values]
    help = f"{help} One of {', '.join(choices)}."
    return option(names, metavar, help, type=click.Choice(choices), **settings)


def only_with(names: str, is_met: object, what: str) -> None:
    """Refuse options that have no effect here.

    Args:
        names: the parameters of the options, separated by spaces.
        is_met: whether what they need is given.
        what: what they need.

    Raises:
        click.UsageError: one of them is given all the same.
    """
    if not is_met and (flags := typed(names)):
        raise click.UsageError(f"{flags} can be used only with {what}")


def not_with(names: str, clashes: object, what: str) -> None:
    """Refuse options that contradict others; the arguments are those of `only_with`."""
    if clashes and (flags := typed(names)):
        raise click.UsageError(f"{flags} cannot be used with {what}")


@contextmanager
def wrong_usage(kind: type[FpabeeError] = InputError) -> Iterator[None]:
    """Options whose values the library refuses, whatever the files hold, are wrong usage.

    Args:
        kind: the error of the library.

    Raises:
        click.UsageError: instead of it.
    """
    try:
        yield
    except kind as error:
        raise click.UsageError(in_terms_of_options(error)) from error


def typed(names: str) -> str:
    """Which of some options are on the command line; empty if none of them is."""
    source = get_current_context().get_parameter_source
    on_command_line = [
        name for name in names.split() if source(name) is ParameterSource.COMMANDLINE
    ]
    return " and ".join(map(option_of, on_command_line))


_FOLDER = "Folder written by fpabee-export or fpabee-convert"
engines = click.argument("engines", type=PATH, help=f"{_FOLDER}.")


def engines_or_hub(required: bool = True) -> Decorator:
    """An engines folder that is only read; `hub.engines_folder` finds it."""
    help = f"{_FOLDER}, or OWNER/NAME of one on the Hugging Face hub."
    return click.argument("engines", type=PATH, required=required, help=help)


target = option("--target", "NAME", "Target to use. Default: the default target of the folder.")
threads = count("--threads", "Number of CPU threads. Default: all cores.", max=MOST_THREADS)
quiet = flag("--quiet", "Show no progress.")
as_json = flag("--json as_json", "Print the result as one JSON object.")

rule = option(
    "--rule rule_text",
    "RULE",
    'Exit rule and settings, such as "fpabee threshold=0.2 patience=2". Without a name, or with '
    "that of the rule of the operating point, the settings change that rule. One of "
    f"{', '.join(RULES)}.",
)
"""An exit rule; `chosen_rule` reads it."""

columns = option(
    "--column columns",
    "FIELD=NAME",
    "Where a field is if not under its own name, such as text=sentence. Fields: text, text_pair "
    "and label. May be repeated.",
    multiple=True,
)
"""Where texts and labels are; `read_options` reads it."""


PLANS = {"TensorRT plans": "--sm --batch --sequence"}
"""The panel of the options that `plans` adds."""


def _capabilities(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Compute capabilities such as `8.6`, from `86` or `8.6`."""
    parts = [part.strip() for part in value.split(",")]
    named = [f"{p[:-1]}.{p[-1]}" if p.isdigit() and len(p) > 1 else p for p in parts]
    return tuple(dict.fromkeys(named))


def plans(batch: str) -> Decorator:
    """The options for shapes and GPUs of plans; `plan_options` reads them.

    Args:
        batch: the default of `--batch`.
    """
    decorators = (
        option(
            "--sm compute_capabilities",
            "SM,SM,...",
            "Compute capabilities to build tensorrt-rtx plans for.",
            callback=_capabilities,
            default="86,89,120",
        ),
        numbers("--batch", "N,N,N", "Smallest, typical and largest batch.", default=batch),
        numbers(
            "--sequence",
            "N,N,N",
            "Smallest, typical and largest number of tokens in a row.",
            default="16,64,128",
        ),
    )

    def decorate(function: Function) -> Function:
        for each in reversed(decorators):
            function = each(function)
        return function

    return decorate


def plan_options(settings: dict[str, Any]) -> PlanOptions:
    """How plans are built; takes the options of `plans` out of the settings.

    Raises:
        click.UsageError: sizes do not ascend, or TensorRT for RTX does not support a GPU.
    """
    from ..exporter.targets.plans import PlanOptions

    with wrong_usage():
        return PlanOptions(**{each.name: settings.pop(each.name) for each in fields(PlanOptions)})


def chosen_rule(default: ExitRule, text: str) -> ExitRule:
    """The rule that the value of `--rule` describes.

    Without a name, or with that of the default rule, it is the default rule with the settings that
    are given.

    Raises:
        click.UsageError: the text is empty, a word in it is not a setting, no rule has this name,
            or the rule does not take these settings, whatever the model is.
    """
    words = text.split() or [""]
    name = "" if "=" in words[0] else words.pop(0)
    changes = once("--rule", map(_setting, words))
    if not (name or changes):
        raise click.UsageError("--rule is empty; give a rule or a setting such as threshold=0.2")
    if name and name not in RULES:
        raise click.UsageError(f"--rule {name!r} does not exist; choose from {', '.join(RULES)}")
    base = default.to_dict() if name in ("", default.name) else {"name": name}
    with wrong_usage(RuleError):
        rule = ExitRule.from_dict(base | changes)
    if isinstance(rule, OF_SHARES) and "threshold" in changes:
        thresholds = np.asarray(rule.threshold)
        if (thresholds < 0).any() or (thresholds > 1).any():
            raise click.UsageError(
                f"--rule {rule.name}: threshold is {changes['threshold']!r}; give a number from 0 "
                "to 1"
            )
    return rule


def once(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Named values of an option as a dictionary.

    Raises:
        click.UsageError: a name has two values.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise click.UsageError(f"{option} gives {name} twice")
        values[name] = value
    return values


def _setting(text: str) -> tuple[str, Any]:
    """The two parts of `NAME=VALUE`; a value is a word, a number, or a list of them."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.UsageError(f"{text!r} is not a setting of a rule, such as threshold=0.2")
    values = [_word_or_number(each) for each in value.split(",")]
    return name, values if len(values) > 1 else values[0]


def _word_or_number(text: str) -> str | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def read_options(settings: dict[str, Any]) -> ReadOptions:
    """The options that say how inputs are read; takes them out of the settings.

    Raises:
        click.UsageError: a field does not exist, or two fields have the same column.
    """
    names = [field.name for field in fields(ReadOptions)]
    others = {name: settings.pop(name) for name in names if name in settings}
    pairs = [each.partition("=") for each in settings.pop("columns")]
    columns = once("--column", ((field, name) for field, _, name in pairs))
    if wrong := [field for field, name in columns.items() if field not in _FIELDS or not name]:
        raise click.UsageError(
            f"--column {wrong[0]!r}: expected FIELD=NAME with a field of {', '.join(_FIELDS)}"
        )
    with wrong_usage():
        return ReadOptions(**others, **{f"{field}_column": name for field, name in columns.items()})
