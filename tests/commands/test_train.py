"""`fpabee-train`: its options, its output and its errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fpabee.calibration.progress import Progress
from fpabee.commands.train import main
from fpabee.exporter.training import TrainOptions, workflow
from fpabee.exporter.training.report import DataSource, TrainReport
from fpabee.runtime import ProblemType

from ..programs import invoke

FILES = ["--train", "train.jsonl", "--dev", "dev.jsonl", "--output", "model dir"]


run = partial(invoke, main, *FILES)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replaces the training by one that only reports."""
    monkeypatch.chdir(tmp_path)
    Path("encoder").mkdir()
    for file in ("train.jsonl", "dev.jsonl"):
        Path(file).write_text('{"text": "rain", "label": "a"}\n')

    def train(_: Path, options: TrainOptions, progress: Progress, command: str) -> TrainReport:
        progress("train, loss 0.500", 25, 50)
        scores = {"dev": [{"accuracy": 0.75}, {"accuracy": 0.875}]}
        data = {"train": DataSource(options.train, 8, "0")}
        task = ProblemType.SINGLE_LABEL
        labels = ("a", "b")
        exits = (2, 4)
        return TrainReport(options, task, "bert", data, labels, exits, 0, scores, 1.5, command, {})

    monkeypatch.setattr(workflow, "train", train)


@pytest.mark.usefixtures("trained")
def test_progress_is_on_stderr_and_results_on_stdout() -> None:
    result = run("--backbone", "encoder")
    assert "loss 0.500" in result.stderr
    assert "dev: scores of every exit" in result.stdout
    assert "0.8750" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: fpabee-export 'model dir'"
    quiet = run("--backbone", "encoder", "--quiet", "--json")
    assert quiet.stderr == ""
    report: dict[str, Any] = json.loads(quiet.stdout)
    assert report["scores"]["dev"][1] == {"accuracy": 0.875}
    assert report["command"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--backbone"),
        (["--backbone", "x", "--epochs", "0"], "give --epochs above 0"),
        (["--backbone", "x", "--exits", "a"], "--exits"),
    ],
)
def test_usage_errors_exit_2(arguments: list[str], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
