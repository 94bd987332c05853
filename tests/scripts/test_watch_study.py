"""The scripts about watched promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import watch_study
import watch_traffic

from fpabee.runtime import Budget

from ..programs import printed
from ..runtime.serving.test_serve import served
from ..runtime.watching import promising


def test_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_study, "BEFORE", 200)
    monkeypatch.setattr(watch_study, "ROWS", 300)
    changed = watch_study.changed_rows(watch_study.LOGITS / "trec-minilm.npz")
    assert changed.mean() == pytest.approx(0.01, rel=0.1)
    cells = watch_study.row_of("trec", changed, 2).strip("| ").split(" | ")
    assert cells[:3] == ["trec", "0.96", "0 of 2"]
    delays = [float(cell.replace(",", "")) for cell in cells[3:]]
    assert delays[0] > delays[2] > 0
    assert delays[1] > delays[3] > 0


def test_traffic(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    folder = promising(engine_copy(), set_points, early=Budget(exit=1))
    usual = tmp_path / "usual.txt"
    usual.write_text("the film\nrain\n", encoding="utf-8")
    arguments: list[Any] = ["--usual", usual, "--new", usual, "--texts", 300]
    with served(folder, "--watch", "50", "--threads", "1") as (_, port):
        server = f"http://127.0.0.1:{port}"
        *_, first, second = printed(watch_traffic.main, server, *arguments).splitlines()
    assert first.startswith("| usual | 304 |")
    assert second.startswith("| new | ")
