"""`fpabee COMMAND`, also `python -m fpabee COMMAND`: all commands under one name."""

from __future__ import annotations

from importlib import import_module

import click

from . import __version__

# Of each: the module, loaded when the command is used, and what the list of commands says.
_COMMANDS = {
    "train": ("fpabee.exporter.cli.train", "Train a multi-exit classifier."),
    "export": ("fpabee.exporter.cli.export", "Compile a trained model into an engines folder."),
    "run": ("fpabee.runtime.cli.run", "Classify the texts of files."),
    "bench": ("fpabee.exporter.cli.bench", "Time an engines folder against one full graph."),
    "calibrate": ("fpabee.calibration.cli", "Choose operating points on labelled rows."),
    "inspect": ("fpabee.runtime.cli.inspect", "Say what a folder holds, and what of it runs here."),
}

_EPILOG = """\b
Completion of commands and options, in the shell's start file:
  bash:  eval "$(_FPABEE_COMPLETE=bash_source fpabee)"
  zsh:   eval "$(_FPABEE_COMPLETE=zsh_source fpabee)"
  fish:  _FPABEE_COMPLETE=fish_source fpabee | source
"""


class _Commands(click.Group):
    """Lists names and one line of help each; loads a command only when it is used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name, and its own arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in _COMMANDS:
            command = import_module(_COMMANDS[name][0]).main
        return name, command, rest


@click.group(
    cls=_Commands,
    commands=[click.Command(name, short_help=line) for name, (_, line) in _COMMANDS.items()],
    epilog=_EPILOG,
)
@click.version_option(__version__, package_name="fpabee", prog_name="fpabee")
def main() -> None:
    """Compile, run, measure and calibrate early-exit text classifiers.

    Every command is also there as fpabee-COMMAND; fpabee COMMAND --help says what it takes.
    """


if __name__ == "__main__":
    main()
