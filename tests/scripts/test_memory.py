"""The table of memory and loading times covers every target that runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

from fpabee.runtime.targets import runnable_targets


def test_every_target_has_its_figures(
    load_script: Callable[[str], ModuleType], engines: Mapping[str, Path]
) -> None:
    result = CliRunner().invoke(load_script("memory").main, ["table", str(engines["bert"])])
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if "-fp" in line]
    assert [row[0] for row in rows] == runnable_targets(engines["bert"])
    for _, *cells in rows:
        assert len(cells) == 6
        assert all(float(cell) >= 0 for cell in cells)
