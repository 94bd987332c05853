"""What commands print for people: every line and table goes through here.

Names of labels, targets and points come from files, and a file may contain escape codes that a
terminal obeys. So all characters that are not printable are escaped; JSON does that itself.
"""

from __future__ import annotations

from typing import Any

import rich_click as click
from rich.console import Console
from rich.text import Text

from ..errors import printable

_WIDE = 1000


def echo(line: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(line), err=err)


class PlainConsole(Console):
    """A console without markup, emoji codes and control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Escape a line, a cell or a title."""
        return super().render_str(printable(text), **settings)


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or in a file as wide as they need."""
    console = PlainConsole()
    # Without a terminal, rich would break cells to fit 80 columns.
    return console if console.is_terminal else PlainConsole(width=_WIDE)
