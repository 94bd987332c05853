"""The look of help pages and usage errors, the same for every command."""

from __future__ import annotations

import rich_click as click
from rich.text import Text

LOOK = {
    "theme": "default-slim",
    "text_markup": None,
    "max_width": 100,
    "options_table_column_types": ["opt_all_metavar", "help"],
    "options_table_help_sections": ["help", "required", "default"],
    "append_metavars_help_string": "{}",
    "default_string": "(default: {})",
    "required_long_string": "(required)",
}


class _Formatter(click.RichHelpFormatter):
    def write_error(self, e: click.ClickException) -> None:
        """Write a usage error as one line, like all errors."""
        # `fpabee --help` and shell completion should not load numpy.
        from ..runtime.errors import in_one_line

        message = in_one_line(e.format_message())
        context = e.ctx if isinstance(e, click.UsageError) else None
        if context and " -> " not in message:
            message += f" -> see {context.command_path} --help"
        self.write(Text(f"error: {message}"), soft_wrap=True)

    def getvalue(self) -> str:
        """The page without the spaces that fill each line."""
        return "".join(f"{line.rstrip()}\n" for line in super().getvalue().splitlines())


class _Context(click.RichContext):
    formatter_class = _Formatter


class Command(click.RichCommand):
    """A command with this look."""

    context_class = _Context


class Group(click.RichGroup):
    """A group of commands with this look."""

    context_class = _Context
