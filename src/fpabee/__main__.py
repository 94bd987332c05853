"""The entry point of `fpabee`, of `fpabee-run` and the like, and of `python -m fpabee`.

Applications that embed the runtime install neither click nor rich, so nothing is imported here that
needs them.
"""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path


def main() -> None:
    """Start the command that this process is named after, or the list of all commands."""
    if util.find_spec("rich_click") is None:
        from .runtime.machine import package

        install = f"pip install {package('cpu')}"
        sys.exit(f"error: commands need rich-click, not installed here -> {install}")
    from .commands import COMMANDS, load
    from .commands import main as every_command

    name = Path(sys.argv[0]).stem.removeprefix("fpabee-")
    command = load(name) if name in COMMANDS else every_command
    command()


if __name__ == "__main__":
    main()
