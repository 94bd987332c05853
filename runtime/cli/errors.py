"""How commands report errors: one line on standard error, and the exit code."""

from __future__ import annotations

import errno
import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from ..errors import Call, FpabeeError, Remedy, in_one_line
from ..files.destination import INTERRUPTED

F = TypeVar("F", bound=Callable[..., Any])

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

# The command of each public function that a remedy may name.
_COMMANDS = {
    "export": "fpabee-export",
    "add_targets": "fpabee-export --from",
    "calibrate": "fpabee-calibrate",
    "train": "fpabee-train",
    "inspect": "fpabee-inspect",
}


def exits_with_one_line(function: F) -> F:
    """Print our errors as one line and exit with code 1; bugs keep their traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except FpabeeError as error:
            _exit_with(error)
        except BrokenPipeError:
            # The reader of our output, such as `head`, has seen enough. That is not an error.
            _drop_stdout()
            sys.exit(0)
        except OSError as error:
            _exit_with(_refused(error))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)

    return wrapper  # type: ignore[return-value]


def in_terms_of_options(error: FpabeeError) -> str:
    """An error as a command prints it: parameters are options, and functions are commands."""
    remedy = error.remedy
    text = remedy.render(_option, _command) if isinstance(remedy, Remedy) else remedy
    return f"{error.message} -> {in_one_line(text)}" if text else error.message


def _option(parameter: str) -> str:
    """The option of the running command that sets a parameter; else the parameter's name."""
    context = click.get_current_context(silent=True)
    for option in context.command.params if context else ():
        if option.name == parameter:
            is_option = isinstance(option, click.Option)
            return max(option.opts, key=len) if is_option else parameter.upper()
    return parameter


def _command(call: Call) -> str:
    words = [_COMMANDS[call.function], *(shlex.quote(str(a)) for a in call.arguments)]
    for name, value in call.keywords.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def _exit_with(error: FpabeeError) -> NoReturn:
    click.echo(f"error: {in_terms_of_options(error)}", err=True)
    sys.exit(1)


def _refused(error: OSError) -> FpabeeError:
    """What the system refuses: a path that it does not accept, or a full standard output."""
    if error.filename is not None:
        return FpabeeError(
            f"{error.filename}: {error.strerror}", "check the path and its permissions"
        )
    if error.errno not in _NO_ROOM:
        raise error
    # Otherwise Python would try to write again when it exits.
    _drop_stdout()
    return FpabeeError(
        f"cannot write to standard output: {error.strerror}", "free some space on that device"
    )


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
