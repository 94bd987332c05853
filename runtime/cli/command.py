"""The frame of every command: its help page, `--version`, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import rich_click as click
from rich.text import Text

from ... import __version__
from ...help_pages import LOOK, Command
from .errors import exits_with_one_line

READING = {
    "Reading files": "--input-format --text-column --text-pair-column --label-column --no-quotes"
}
RULE = {"Exit rule": "--rule --threshold --patience --exit --max-exit --exit-0-threshold"}


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
        made: Command = make(click.version_option(__version__)(exits_with_one_line(function)))
        made.params.append(made.params.pop(0))  # --version, which stands beside --help
        return made

    return decorate
