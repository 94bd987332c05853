"""All commands under one name: `fpabee COMMAND`."""

from __future__ import annotations

from importlib import import_module

import rich_click as click
from rich.text import Text

from .. import __version__
from .help_pages import LOOK, Command, Group

# The module of each command, which is loaded when the command is used, and its line in the list.
COMMANDS = {
    "convert": (
        "fpabee.commands.convert",
        "Make a classifier or reranker faster, without labels and with a guarantee.",
    ),
    "train": ("fpabee.commands.train", "Train a multi-exit classifier."),
    "export": ("fpabee.commands.export", "Compile a trained model into an engines folder."),
    "build": ("fpabee.commands.build", "Add targets to an engines folder, by their names."),
    "calibrate": ("fpabee.commands.calibrate", "Choose operating points on labelled rows."),
    "run": ("fpabee.commands.run", "Classify the texts of files, or rank documents."),
    "serve": ("fpabee.commands.serve", "Answer texts over HTTP."),
    "pack": ("fpabee.commands.pack", "Write one ONNX file with the exits and the rule inside."),
    "inspect": (
        "fpabee.commands.inspect",
        "Show what an engines folder contains and which targets run here.",
    ),
}

_EPILOG = """\
Shell completion of commands and options: add one of these lines to your shell's start file.
  bash:  eval "$(_FPABEE_COMPLETE=bash_source fpabee)"
  zsh:   eval "$(_FPABEE_COMPLETE=zsh_source fpabee)"
  fish:  _FPABEE_COMPLETE=fish_source fpabee | source"""


def load(name: str) -> click.Command:
    """Import a command by its name."""
    module, _ = COMMANDS[name]
    command: click.Command = import_module(module).main
    return command


class _Commands(Group):
    """Lists the commands without importing them; imports the one that is used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name, and its own arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = load(name)
        return name, command, rest


@click.group(
    cls=_Commands,
    commands=[Command(name=name, short_help=line) for name, (_, line) in COMMANDS.items()],
    context_settings={"rich_help_config": LOOK},
    epilog=Text(_EPILOG),
)
@click.version_option(__version__, package_name="fpabee", prog_name="fpabee")
def main() -> None:
    """Compile, calibrate and run early-exit text classifiers.

    Each command also exists under its own name, such as fpabee-run. Type fpabee COMMAND --help
    for its options.
    """
