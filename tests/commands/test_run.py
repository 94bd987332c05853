"""`fpabee-run`: results on stdout, all else on stderr, and errors that say how to mend them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fpabee.commands.run import main
from fpabee.runtime import (
    Budget,
    Engine,
    Entropy,
    FPabee,
    Measure,
    Pabee,
    Pcee,
)
from fpabee.runtime.core import Core

from ..closeness import assert_probabilities
from ..runtime.running import Run, write_lines

TEXTS = ["the film is not bad", "rain", "", "turn the lights off in the morning", "the " * 100]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(text + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_single_label_records(run: Run, bert: Path, source: Path) -> None:
    result = run(bert, source, "--scores")
    with Engine.load(bert) as engine:
        predictions = engine.predict(TEXTS)
    for index, (record, prediction) in enumerate(zip(result.records, predictions, strict=True)):
        scores = record.pop("probabilities")
        assert scores[record["label"]] == record.pop("score") == max(scores.values())
        assert list(scores) == ["music", "weather", "alarm", "travel"]
        assert_probabilities(list(scores.values()), prediction)
        assert record.pop("truncated", False) == prediction.truncated == (index == 4)
        answer = {"label": prediction.labels[0], "exit": prediction.exit, "layer": prediction.layer}
        assert record == {"index": index, **answer}
    assert result.code == 0
    short = run(bert, source, "--max-length", "4")
    assert ["truncated" in record for record in short.records] == [True, False, False, True, True]
    assert "3 truncated" in short.err


def test_standard_input(run: Run, bert: Path, source: Path) -> None:
    from_file = run(bert, source, "--quiet")
    as_text = run(bert, "-", "--quiet", stdin=source.read_bytes())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    as_json = run(bert, "-", "--quiet", stdin=lines)
    said = run(bert, "-", "--input-format", "txt", "--quiet", stdin=lines)
    assert from_file == as_text == as_json
    assert from_file.err == ""
    assert len(said.records) == len(TEXTS)
    assert said.out != from_file.out


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], None),
        (["--rule", "pabee patience=1"], Pabee(patience=1)),
        (["--rule", "budget exit=2"], Budget(exit=2)),
        (["--rule", "entropy  threshold=1.1 "], Entropy(threshold=1.1)),
        (["--rule", "entropy threshold=0,9,9"], Entropy(threshold=(0.0, 9.0, 9.0))),
        (["--rule", "pcee threshold=0.9 patience=2"], Pcee(threshold=0.9, patience=2)),
        # Without a name, the folder's rule with what is given changed.
        (["--rule", "threshold=1.2"], FPabee(threshold=1.2)),
        (["--rule", "threshold=0.1 measure=kl"], FPabee(threshold=0.1, measure=Measure.KL)),
    ],
    ids=str,
)
def test_rules(run: Run, bert: Path, source: Path, options: list[str], rule: Any) -> None:
    result = run(bert, source, *options)
    with Engine.load(bert) as engine:
        predictions = engine.predict(TEXTS, rule=rule)
    assert [(r["exit"], r["label"]) for r in result.records] == [
        (p.exit, p.labels[0]) for p in predictions
    ]


def test_operating_point(
    run: Run, engine_copy: Callable[..., Path], set_points: Callable[..., None], source: Path
) -> None:
    folder = engine_copy("bert")
    set_points(folder, default="safe", fast=Budget(exit=1), safe=Budget(exit=3))
    result = run(folder, source, "--operating-point", "fast")
    assert {record["exit"] for record in result.records} == {1}
    assert "operating point fast: rule budget, exit 1" in result.err
    assert "calibrated" not in result.err
    result = run(folder, source)
    assert {record["exit"] for record in result.records} == {3}
    assert "operating point safe" in result.err
    result = run(folder, source, "--rule", "budget exit=1")
    assert "operating points of onnxruntime-fp32: fast, safe" in result.err


def test_summary(run: Run, bert: Path, source: Path) -> None:
    result = run(bert, source, "--rule", "budget exit=2", "--threads", "1")
    assert "5 rows in" in result.err
    assert "onnxruntime-fp32, rule budget, exit 2" in result.err
    assert "mean depth 2.00 of 3 layers, saving 33.3%" in result.err
    assert "1 truncated, 1 empty" in result.err
    histogram = [line.split()[:4] for line in result.err.splitlines()[-5:-1]]
    assert ["2", "2", "5", "100.0%"] in histogram
    assert ["3", "3", "0", "0.0%"] in histogram
    assert "not calibrated" in result.err.replace("\n", " ")


def test_summary_in_json(run: Run, bert: Path, source: Path) -> None:
    options = ("--rule", "budget exit=2", "--json")
    result = run(bert, source, *options)
    assert result.code == 0
    assert result.out == run(bert, source, *options, "--quiet").out
    content = json.loads(result.err)
    assert content.pop("seconds") > 0
    assert content.pop("rows_per_second") > 0
    assert content == {
        **{"rows": 5, "rows_before": 0, "errors": 0, "truncated": 1, "empty": 1},
        **{"target": "onnxruntime-fp32", "operating_point": None},
        **{"rule": {"name": "budget", "exit": 2}, "layers": 3, "mean_depth": 2.0},
        "saving": pytest.approx(1 / 3),
        "exits": [{"exit": n, "layer": n, "rows": 5 if n == 2 else 0} for n in (1, 2, 3)],
    }


def test_metrics(run: Run, bert: Path, tmp_path: Path) -> None:
    with Engine.load(bert) as engine:
        found = [p.labels[0] for p in engine.predict(TEXTS, full_depth=True)]
    truth = [*found[:3], "weather", "alarm"]
    rows = [{"text": t, "label": label} for t, label in zip(TEXTS, truth, strict=True)]
    source = write_lines(tmp_path / "in.jsonl", *rows)
    result = run(bert, source, "--metrics", "--full-depth", "--quiet")
    assert result.code == 0
    content = json.loads(run(bert, source, "--metrics", "--full-depth", "--json").err)
    assert (content["rule"], content["mean_depth"]) == (None, 3.0)
    assert content["metrics"]["accuracy"] == pytest.approx(accuracy_score(truth, found))
    assert result.err == (
        f"accuracy {accuracy_score(truth, found):.4f}, "
        f"macro_f1 {f1_score(truth, found, average='macro', zero_division=0):.4f}, "
        f"matthews {matthews_corrcoef(truth, found):.4f}\n"
    )
    assert "accuracy" not in run(bert, source).err


def test_a_bug_keeps_its_traceback(
    bert: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Core, "stream", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        main([str(bert), str(source)])


COMMAND = [sys.executable, "-c", "from fpabee.commands.run import main; main()"]


def test_as_a_process_any_locale_gives_utf8(bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "é", "id": "東京"})
    done = subprocess.run(
        [*COMMAND, bert, source, "--with-text"],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    record = json.loads(done.stdout.decode("utf-8"))
    assert (record["id"], record["text"]) == ("東京", "é")
    assert b"1 rows in" in done.stderr


def test_a_reader_that_stops_early_is_no_error(bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("rain\n" * 9000)
    command = [*COMMAND, str(bert), str(source), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # As head does: more is written than a pipe holds, and nobody reads on.
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
