"""`fpabee-convert`: its options, what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors import SafetensorError

from fpabee.calibration import Bound
from fpabee.calibration.choose import Search
from fpabee.calibration.costs import StoppingCosts
from fpabee.calibration.ranking import RankingPoint
from fpabee.calibration.result import Calibration, Outcome, Point
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.timing import QueryTimes
from fpabee.commands.convert import main
from fpabee.commands.points import KINDS
from fpabee.exporter import single_file
from fpabee.exporter.convert import Conversion, classifier, workflow
from fpabee.exporter.convert.options import Chosen, Form
from fpabee.exporter.exit_config import Pooling
from fpabee.runtime import Budget, Confidence, TopK
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.artifact.operating_point import Certificate, Promise
from fpabee.runtime.tasks import unnamed_task

from ...programs import invoke
from .conftest import SINGLE

CERTIFICATE = Certificate(
    confidence=95.0,
    promises=(
        Promise(of="changed_answers", at_most=1.0, rows=1199),
        Promise(of="missed", at_most=2.0, label="bad", rows=150),
    ),
    label_thresholds={"bad": 0.7},
)


run = partial(invoke, main)


def certified(target: str, certificate: Certificate | None, depth: float) -> Calibration:
    """What a target with six layers promises, or why it does not."""
    reported = Outcome(
        metric="agreement",
        score=0.995,
        full_depth_score=1.0 if certificate else 0.974,
        drop=0.5,
        interval=(0.1, 1.3),
        mean_depth=depth,
        exits=(200, 60, 40, 100),
        rows=400,
    )
    point = Point(
        rule=Confidence(threshold=0.9),
        chosen_on=replace(reported, rows=1200, exits=(600, 180, 120, 300)),
        held_out=reported,
        name="changed-1",
        goal=Bound(changed_answers=0.01),
        measured={"1": 1.9, "32": 2.25},
        certificate=certificate,
        refusal="" if certificate else "full depth has 31 changed answers in 1200 texts",
    )
    logits = np.zeros((4, 1200, 2), np.float32)
    reference = logits[-1] + [0, 1]
    rows = LabelledLogits(
        logits, np.ones(1200, np.intp), None, ProblemType.SINGLE_LABEL, (), 0, (), reference
    )
    return Calibration(
        folder=Path("engines"),
        target=target,
        held_out="texts that decided nothing",
        rows=rows,
        test=rows,
        points=(point,),
        default="changed-1",
        search=Search(StoppingCosts(rows, "agreement", np.ones((4, 1200))), []),
        layers=(0, 2, 4, 6),
        hardware="this one",
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Conversions that are not made; each gives the same result. The paths exist."""
    noted: list[Any] = []
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("texts.jsonl").write_text('{"text": "rain", "query": "rain", "documents": []}\n')

    def convert(*given: Any) -> Conversion:
        noted.append(given)
        form = Form(Pooling.ATTENTION, 64, 4, every=2)
        return Conversion(
            folder=Path("engines"),
            default_target="openvino-bf16",
            targets=(
                certified("onnxruntime-fp32", CERTIFICATE, 4.7),
                certified("openvino-bf16", CERTIFICATE, 4.8),
                certified("openvino-int8", None, 6.0),
            ),
            exit_layers=(0, 2, 4, 6),
            chosen=Chosen((0.81, 0.938), form, 0.021, 0.4),
            rows=4000,
            texts=3000,
            train_texts=1500,
            parts=(1200, 300, 1200, 300),
            traffic=0.004,
            accuracy=(0.955, 0.95),
            warnings=("something is odd",),
            seconds=61.2,
        )

    monkeypatch.setattr(workflow, "convert", convert)
    return noted


def test_the_summary_says_what_is_guaranteed_and_what_is_not(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(single_file, "pack", lambda *given, **_: packed.append(given))
    monkeypatch.setattr(classifier, "named_task", lambda *_: SINGLE)
    result = run("model", "texts.jsonl", "--single-file", "one")
    assert result.exit_code == 0, result.output
    assert packed == [(Path("engines"), Path("one"))]
    lines = result.stdout.splitlines()
    table = [line.split() for line in lines if line.startswith(("openvino", "onnxruntime"))]
    numbers = ["4.80", "1.9", "2.2", "0.50", "%"]
    assert ["openvino-bf16", "changed-1", "(default)", *numbers] in table
    output = " ".join(lines)
    for fact in (
        "4,000 texts, 3,000 of them distinct, and 1,500 train texts",
        "1,200 trained exits, 300 chose the best, 1,200 certified them; the other 300 decided",
        "tested on 1,199 and 150 of 1,200 texts; ",
        "at most 1 % changed answers and at most 2 % missed of 'bad', with 95 % confidence",
        "2 of 400 decisions changed",
        "openvino-int8 changed-1: No guarantee",
        "31 changed answers in 1200 texts",
        "0.40 % of the answers change",
        "accuracy: 0.9500; that of the classifier: 0.9550",
        "a hidden layer of 64 on 4 weighted means of the tokens after every 2 layers",
        "agree with the classifier on 81, 94 %",
    ):
        assert fact in output
    next_step = "next: fpabee-run engines texts.jsonl"
    assert {"warning: something is odd", "one file: one", next_step} <= {*lines}
    found = json.loads(run("model", "texts.jsonl", "--json").stdout)
    assert found["targets"][1]["points"][0]["certificate"]["confidence"] == 95
    assert found["chosen"]["form"]["pooling"] == "attention"


def ranked(target: str, changed: int, certificate: Certificate | None) -> RankingPoint:
    """What a target with six layers promises of rankings, or why it does not."""
    outcome = Outcome(
        metric="unchanged_top",
        score=1 - changed / 60,
        full_depth_score=1 - 1 / 60,
        drop=0.0,
        interval=(0.0, 0.0),
        mean_depth=2.94,
        exits=(600, 300, 2100),
        rows=60,
    )
    rule = TopK(top=10, threshold=(-0.5, 0.0), exit_0_threshold=-2.0)
    return RankingPoint(
        target=target,
        name="changed-5",
        goal=Bound(changed_answers=0.05),
        measured={"1": 2.0},
        top=10,
        rule=rule if certificate else Budget(exit=2),
        chosen_on=replace(outcome, rows=540),
        held_out=outcome,
        without_scores=replace(outcome, mean_depth=3.02),
        batches={8: replace(outcome, mean_depth=4.51), 32: replace(outcome, mean_depth=3.17)},
        times=QueryTimes(documents=100, milliseconds=812.4, full_depth_milliseconds=1624.8),
        layers=6,
        certificate=certificate,
        refusal="" if certificate else "full depth changes 31 of 540 queries, and 18 may change",
    )


def test_the_summary_of_a_ranking_counts_the_queries_that_changed(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workflow.convert("model", "queries.jsonl")
    promises = (Promise(of="changed_answers", at_most=5.0, rows=528),)
    certificate = Certificate(confidence=95.0, promises=promises, label_thresholds={})
    points = (
        ranked("onnxruntime-fp32", 3, certificate),
        ranked("openvino-bf16", 2, certificate),
        ranked("openvino-int8", 9, None),
    )
    result = replace(made, targets=(), rankings=points, traffic=None, accuracy=None)
    monkeypatch.setattr(workflow, "convert", lambda *_: result)
    lines = run("model", "texts.jsonl", "--top", 10).stdout.splitlines()
    table = [line.split() for line in lines if line.startswith(("openvino", "onnxruntime"))]
    numbers = ["2.94", "812.4", "2.0", "2", "of", "60"]
    assert ["openvino-bf16", "changed-5", "(default)", *numbers] in table
    header = next(n for n, line in enumerate(lines) if line.startswith("target and operating"))
    assert {len(line) for line in lines[header : header + 4]} == {80}
    output = " ".join(lines)
    for fact in (
        "4,000 queries, 3,000 of them distinct, and 1,500 train queries",
        "other top 10",
        "by their scores, 20.0 % of the documents of these queries leave before layer 1",
        "3.02 in batches of whole queries, 4.51 in batches of 8 and 3.17 in batches of 32",
        "ms for 100",
        "at most 5 % of new queries have another top 10, with 95 % confidence",
        "tested on 528 of 540 queries (all of them would allow no more changes); of those",
        "3 of 60 have one (at this confidence 1.04 to 13.92 %)",
        "openvino-int8 changed-5: No guarantee",
        "full depth changes 31 of 540 queries",
        "rank correlation of the exits with the reranker: 81, 94 %",
    ):
        assert fact in output
    assert "next: fpabee-run engines texts.jsonl" in lines
    in_int8_first = replace(points[1], quick_target="openvino-int8", batches={})
    result = replace(result, rankings=(points[0], in_int8_first))
    assert "a packed file" in output
    shown = run("model", "texts.jsonl", "--top", 10).stdout
    assert "a packed file" not in shown
    assert "70.0 % of them, which are in doubt" in " ".join(shown.split())
    (row,) = (line for line in shown.splitlines() if "% time" in line)
    assert row.split()[3:6] == ["50", "%", "time"]
    assert len(row) == 80
    result = replace(result, rankings=points)
    found = json.loads(run("model", "texts.jsonl", "--json").stdout)
    assert [point["held_out"]["changed"] for point in found["rankings"]] == [3, 2, 9]
    assert found["rankings"][0]["times"]["documents"] == 100


@pytest.mark.parametrize("kind", workflow._TASKS)
def test_what_is_converted_is_counted_and_shown_in_units_of_the_task(kind: ProblemType) -> None:
    job = workflow._TASKS[kind]
    task = unnamed_task(kind, 1)
    shown = KINDS[task.method]
    assert job.what == shown.unit == task.unit
    assert job.results == shown.results


def test_a_long_name_of_a_ranking_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "tensorrt-rtx-fp16-sm86-sm89-sm120"
    promises = (Promise(of="changed_answers", at_most=5.0, rows=528),)
    certificate = Certificate(confidence=95.0, promises=promises, label_thresholds={})
    KINDS["rank"].show([ranked(name, 3, certificate)], name)
    assert f"\n{name} changed-5 (default)\n" in capsys.readouterr().out
    KINDS["rank"].show([ranked(name, 3, None)], name)
    assert "(default)" not in capsys.readouterr().out, "full depth runs if no point is named"


def test_what_a_ranking_cannot_be_is_wrong_usage(calls: list[Any], reranker: Path) -> None:
    result = run(reranker, "texts.jsonl", "--problem-type", "regression")
    assert result.exit_code == 2
    assert run(reranker, "texts.jsonl", "--top", "0").exit_code == 2
    assert not calls


def test_train_texts_are_handed_on_and_must_be_there(calls: list[Any]) -> None:
    result = run("model", "texts.jsonl", "--train-texts", "more.jsonl")
    assert result.exit_code == 1
    assert "more.jsonl" in result.stderr
    assert not calls
    Path("more.jsonl").write_text('{"text": "sun"}\n')
    assert run("model", "texts.jsonl", "--train-texts", "more.jsonl").exit_code == 0
    assert calls[0][3].train_texts == Path("more.jsonl")


@pytest.mark.parametrize("place", ["full", "engines", "engines/one", "."])
def test_where_the_file_cannot_be_is_known_before_the_conversion(
    place: str, calls: list[Any]
) -> None:
    Path("full").mkdir()
    Path("full", "mine").touch()
    result = run("model", "texts.jsonl", "--single-file", place)
    assert result.exit_code == 1
    assert " -> " in result.stderr
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--missed 1", "--missed can be used only with --threshold"),
        ("--confidence 40", "confidence is 40 %"),
        ("--changed 1 --threshold b=0.7 --threshold b=0.5", "--threshold gives b twice"),
        ("--changed 0", "changed_answers is 0 %"),
    ],
)
def test_wrong_promises_are_wrong_usage(arguments: str, message: str) -> None:
    result = run("model", "texts.jsonl", *arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


NO_SPACE = "No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("write", "error"),
    [
        ("numpy.save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("safetensors.torch.save_file", SafetensorError(f"I/O error: {NO_SPACE}")),
        ("safetensors.numpy.save_file", SafetensorError(f"I/O error: {NO_SPACE}")),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", Exception(NO_SPACE)),
        ("numpy.savez", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_full_disk_keeps_the_finished_steps(
    write: str,
    error: Exception,
    telling: Mapping[str, Path],
    texts: Path,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    given = telling[SINGLE.value], texts, "-o", tmp_path / "out", "--changed", "10"
    with monkeypatch.context() as patch:
        patch.setattr(write, Mock(side_effect=error))
        result = run(*given, "--quiet")
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    if write == "numpy.save":  # of the first step
        assert not [*tmp_path.iterdir()]
        return
    assert "out.partial keeps the finished steps -> " in result.stderr
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "run the classifier" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
