"""The study of calibration resumes, and its tables cover what was run."""

from __future__ import annotations

from pathlib import Path

import calibration_study
import numpy as np
import pytest
from click.testing import CliRunner


def test_a_study_resumes_and_writes_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_study, "_SYNTHETIC_ROWS", 1500)
    monkeypatch.setattr(calibration_study, "SUMMARY_ROWS", 200)
    page, name = tmp_path / "page.md", "multi-label, 6 exits"
    command = ["--work", tmp_path / "work", "--output", page, "--population", name, "--rows", 200]
    for repeats in (1, 2):
        words = [*map(str, command), "--repeats", str(repeats)]
        result = CliRunner().invoke(calibration_study.main, words)
        assert result.exit_code == 0, result.output
        lines = [line for line in page.read_text().splitlines() if line.startswith(f"| {name} |")]
        summary, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        assert [row[2] for row in rows] == [each.name for each in calibration_study.PROMISES]
        assert {row[3] for row in rows} == {str(repeats)}
    by_name = {row[2]: row for row in rows}
    assert by_name["safe"][6] == "100 %"  # 160 rows cannot show 0.5 points at 95 %
    assert by_name["fast"][6] == "0 %"
    balanced, safe = by_name["balanced"], by_name["safe"]
    assert summary[1:] == [balanced[4], *balanced[7:], safe[5], *safe[7:]]


def test_the_last_exit_of_a_synthetic_population_is_calibrated() -> None:
    rows = calibration_study.SYNTHETIC["calibrated, 6 exits"].rows()
    last = rows.logits[-1]
    likely = last.max(axis=-1) - np.log(np.exp(last).sum(axis=-1))
    right = last.argmax(axis=-1) == rows.expected
    assert np.exp(likely).mean() == pytest.approx(right.mean(), abs=0.02)
