"""The study of calibration resumes, and its table covers what was run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("calibration_study")


def test_a_study_resumes_and_writes_its_table(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_SYNTHETIC_ROWS", 1500)
    page = tmp_path / "page.md"
    name = "multi-label, 6 exits"
    command = ["--work", tmp_path / "work", "--page", page, "--population", name, "--rows", 200]
    for repeats in (1, 2):
        result = CliRunner().invoke(script.main, [*map(str, command), "--repeats", str(repeats)])
        assert result.exit_code == 0, result.output
        lines = [line for line in page.read_text().splitlines() if line.startswith(f"| {name} |")]
        *cells, alone = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        assert [row[2] for row in cells] == [promise.name for promise in script.PROMISES]
        assert {row[3] for row in cells} == {str(repeats)} == {alone[1]}
        kinds = next(line for line in page.read_text().splitlines() if "per exit" in line)
        assert "| confidence |" in kinds
        assert kinds.count("|") == len(alone) + 1
    refused = {row[2]: row[6] for row in cells}
    assert refused["safe"] == "100 %"  # 160 rows cannot show 0.5 points at 95 %
    assert refused["fast"] == "0 %"


def test_the_last_exit_of_a_synthetic_population_is_calibrated(script: ModuleType) -> None:
    rows = script.SYNTHETIC["calibrated, 6 exits"].rows()
    last = rows.logits[-1]
    likely = last.max(axis=-1) - script.np.log(script.np.exp(last).sum(axis=-1))
    right = last.argmax(axis=-1) == rows.expected
    assert script.np.exp(likely).mean() == pytest.approx(right.mean(), abs=0.02)
