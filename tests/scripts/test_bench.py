"""The benchmark prints a whole table, with the rule and the versions below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import bench
import pytest

from ..programs import printed


def test_the_table_has_both_workloads_and_all_ratios(
    engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPEATS", 1)
    texts = tmp_path / "texts.txt"
    texts.write_text("is it not a good film\nturn on the light\n")
    options = ["--input", texts, "--depth", "0.8", "--rule", "entropy"]
    output = printed(bench.main, engines["bert"], *options)
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    head, _, single, file = ([cell.strip() for cell in line] for line in lines)
    assert tuple(head) == bench.COLUMNS
    assert single[0] == "texts one by one"
    assert file[0] == "file of 2 texts"
    for _, full, _, with_rule, speedup, theory, share in (single, file):
        assert float(full) > 0
        assert float(with_rule) > 0
        ratio = float(speedup.rstrip("x")) / float(theory.rstrip("x"))
        assert float(share) == pytest.approx(ratio, rel=0.1)
    assert "Rule: entropy" in output
    assert "threads; fpabee " in output
