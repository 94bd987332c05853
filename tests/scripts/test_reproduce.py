"""The comparison of the paper: settings from dev, scores from test, tables from stored runs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import reproduce
from tests.conftest import WORDS
from tests.programs import printed

from fpabee.calibration.scoring import LabelledLogits
from fpabee.runtime import ProblemType

LAYERS = [1, 2, 3, 4]


def make(rows: int) -> LabelledLogits:
    """Rows whose logits become more certain with depth."""
    generator = np.random.default_rng(rows)
    truth = generator.integers(0, 3, rows)
    depth = np.linspace(0.5, 3, len(LAYERS))[:, None, None]
    noise = generator.normal(size=(len(LAYERS), rows, 3))
    logits = (2 * np.eye(3)[truth] * depth + noise).astype(np.float32)
    return LabelledLogits(logits, np.full(rows, 9, np.intp), truth, ProblemType.SINGLE_LABEL)


@pytest.mark.parametrize("first_exit", [0, 1])
def test_settings_save_enough_on_dev_and_are_evaluated_on_test(first_exit: int) -> None:
    dev, test = (dataclasses.replace(make(rows), first_exit=first_exit) for rows in (200, 190))
    layers = [layer - 1 + first_exit for layer in LAYERS]
    content = reproduce.compare(dev, test, layers)
    right = (test.logits.argmax(axis=-1) == test.expected).mean(axis=1)
    assert content["full_depth"] == pytest.approx(right[-1])
    kinds = {setting["kind"] for setting in content["settings"]}
    assert kinds >= {"fpabee", "pabee", "entropy", "entropy per exit"}
    for setting in content["settings"]:
        assert right.min() <= setting["score"] <= 1
    if first_exit:  # one is enough, because this takes seconds
        on_dev = reproduce.compare(dev, dev, layers)["settings"]
        assert len(on_dev) == len(content["settings"])
        assert all(setting["saving"] >= setting["wished"] - 1e-9 for setting in on_dev)


def test_a_table_has_means_over_seeds(tmp_path: Path) -> None:
    def store(seed: int, **scores: float) -> None:
        half = {"wished": 0.5, "saving": 0.51}
        settings = [half | {"kind": kind, "score": score} for kind, score in scores.items()]
        run = {"name": "mini-sst2", "seed": seed, "metric": "accuracy", "rows": 20}
        content = run | {"full_depth": 0.95, "settings": settings}
        (tmp_path / f"{seed}.json").write_text(json.dumps(content))

    # Only rules with a setting for every seed are compared.
    store(42, fpabee=0.90, pabee=0.89, entropy=0.5)
    store(43, fpabee=0.92, pabee=0.91)
    lines = reproduce.table(tmp_path).splitlines()
    assert "| fpabee | - | 91.00 ± 1.41 (51 %) | - |" in lines
    assert "Seeds 42, 43; accuracy at full depth 95.00 ± 0.00; 20 rows." in lines
    assert "| entropy | - | - | - |" in lines
    (row,) = (line for line in lines if line.startswith("| mini-sst2 |"))
    assert row.startswith("| mini-sst2 | - / +1.00 / - | - / - / - |")


@pytest.mark.slow
def test_a_model_that_was_trained_elsewhere_is_compared_once(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "work" / "mini-sst2-42"
    shutil.copytree(tiny_models["bert"], model)
    (model / "training.json").write_text("{}")
    (tmp_path / "sst2").mkdir()
    for part in ("dev", "test"):
        rows = [
            {
                "text": " ".join(WORDS[n % 30 : n % 30 + n % 4 + 1]),
                "label": ("music", "alarm")[n % 2],
            }
            for n in range(90)
        ]
        with gzip.open(tmp_path / "sst2" / f"{part}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    command = ["--only", "mini-sst2", "--seed", "42", "--data", str(tmp_path)]
    command += ["--work", str(tmp_path / "work")]
    for _ in range(2):
        printed(reproduce.main, *command)
        monkeypatch.setattr(reproduce, "compare", None)  # not called again
    assert "\n| entropy |" in (tmp_path / "work" / "rules.md").read_text()
