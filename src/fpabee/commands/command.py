"""The frame of every command: its help page, and errors in one line."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import rich_click as click
from rich.text import Text

from ..runtime.errors import FpabeeError
from . import COMMANDS
from .console import echo
from .help_pages import LOOK, Command

READING = {"Reading files": "--column"}

_INTERRUPTED = 130  # as in a shell
_PARAMETER = re.compile(r"`(\w+)`")
_READING = "input_format text_column text_pair_column label_column max_length"
_DEVICE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def command(examples: str, panels: Mapping[str, str]) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function that has options.

    Args:
        examples: command lines that end the help page.
        panels: the options of each topic, separated by spaces; those that are not named come first.
    """
    titles = {"Arguments": "", "Options": "", **panels}
    sections = [click.RichOptionPanel(name, flags.split()) for name, flags in titles.items()]
    sections[0].column_types = ["opt_long", "help"]
    lines = [f"  {line}" for line in examples.strip().splitlines()]

    def decorate(function: Callable[..., None]) -> Command:
        make: Any = click.command(
            cls=Command,
            panels=sections,
            context_settings={"show_default": True, "rich_help_config": LOOK},
            epilog=Text("\n".join(["Examples:", *lines])),
        )
        made: Command = make(exits_with_one_line(function))
        return made

    return decorate


def exits_with_one_line(function: Callable[..., None]) -> Callable[..., None]:
    """Print an error of ours as one line and exit with code 1; a bug keeps its traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        code = 0
        try:
            function(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader of our output, such as `head`, has seen enough. That is not an error.
            _drop_stdout()
        except (FpabeeError, OSError) as error:
            echo(f"error: {in_terms_of_options(_ours(error))}", err=True)
            code = 1
        except KeyboardInterrupt as interrupt:
            more = map(in_terms_of_options, interrupt.args)
            echo(": ".join(["interrupted", *more]), err=True)
            code = _INTERRUPTED
        # Not above, where the error still holds open files.
        if code:
            sys.exit(code)

    return wrapper


def in_terms_of_options(error: FpabeeError) -> str:
    """An error whose hint names options of the running command instead of parameters."""
    hint = hint_of(error)
    return f"{error.message} -> {hint}" if hint else error.message


def hint_of(error: FpabeeError) -> str:
    """The hint of an error, with options of the running command instead of parameters.

    A part of it about how inputs are read is left out if the command has no such option.
    """
    parts = re.split("(?=, or |; )", error.hint)
    lacks = {name for name in _READING.split() if option_of(name) == name}
    hint = "".join(part for part in parts if lacks.isdisjoint(_PARAMETER.findall(part)))
    hint = re.sub("^(, or |; )", "", hint or error.hint)
    return _PARAMETER.sub(lambda match: option_of(match[1]), hint)


def option_of(parameter: str) -> str:
    """The option of the running command that sets a parameter, or the command of this name.

    Else it is the parameter's name.
    """
    context = click.get_current_context(silent=True)
    spelled = f"--{parameter.replace('_', '-')}"
    field = parameter.removesuffix("_column")
    for option in context.command.params if context else ():
        if option.name == "columns" and field != parameter:
            return f"--column {field}=NAME"
        if option.name == parameter or spelled in option.opts:
            is_option = isinstance(option, click.Option)
            return max(option.opts, key=len) if is_option else parameter.upper()
    return f"fpabee-{parameter}" if parameter in COMMANDS else parameter


def _ours(error: FpabeeError | OSError) -> FpabeeError:
    """An error of ours, also for a path that the system refuses, or for a full standard output."""
    if isinstance(error, FpabeeError):
        return error
    if error.filename is not None:
        return FpabeeError(
            f"{error.filename}: {error.strerror}", "check the path and its permissions"
        )
    if error.errno not in _DEVICE_ERRORS:
        raise error
    # Otherwise Python would try to write again when it exits.
    _drop_stdout()
    return FpabeeError(
        f"cannot write to standard output: {error.strerror}", "free some space on that device"
    )


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
