"""The examples in calibration's docstrings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.runtime import Engine

from ..docstrings import run_code, run_sessions

WORDS = ("the", "good", "bad", "film", "plot", "music", "stop", "turn", "on", "light", "rain")


def test_code_runs(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy("bert")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(60)]
    with Engine.load(folder, threads=1) as engine:
        answers = engine.predict(texts, full_depth=True)
    pairs = zip(texts, answers, strict=True)
    rows = [json.dumps({"text": text, "label": answer.labels[0]}) for text, answer in pairs]
    (tmp_path / "dev.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)

    found = run_code("fpabee.calibration")

    assert found == ["CalibrationOptions", "calibrate", "threshold_for_depth"]


def test_sessions_print_what_they_say() -> None:
    assert run_sessions("fpabee.calibration") == ["Bound"]
