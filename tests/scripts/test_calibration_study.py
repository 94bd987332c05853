"""The study of calibration resumes, and its tables cover what was run."""

from __future__ import annotations

from pathlib import Path

import calibration_study
import pytest

from ..programs import printed


def test_a_study_resumes_and_writes_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_study, "_SYNTHETIC_ROWS", 1500)
    monkeypatch.setattr(calibration_study, "SIZES", (200,))
    names = "useful exit 0", "guard, 50 % flagged"
    command: list[object] = ["--work", tmp_path]
    for name in names:
        command += ["--population", name]
    for repeats in (1, 2):
        printed(calibration_study.main, *command, "--repeats", repeats)
        lines = [
            line.split("|")[1:-1] for line in (tmp_path / "tables.md").read_text().splitlines()
        ]
        cells = [[cell.strip() for cell in line] for line in lines if len(line) == 10][2:]
        expected = [(names[0], "200", goal) for goal in calibration_study.GOALS]
        expected += [(names[1], "800", goal) for goal in calibration_study.PROMISES]
        assert [tuple(cell[:3]) for cell in cells] == expected
        assert {cell[3] for cell in cells} == {str(repeats)}
    by_goal = {(cell[0], cell[2]): cell for cell in cells}
    assert by_goal[names[0], "safe"][5] == "2"  # 200 rows cannot show 0.5 points at 95 %
    assert by_goal[names[0], "fast"][5:7] == ["0", "-"]
    assert by_goal[names[1], "changed 1"][6] == "0"
