"""fpabee-calibrate end to end, on tiny engines folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from fpabee.calibration import CalibrationOptions, Goal, calibrate
from fpabee.calibration import trace as trace_module
from fpabee.calibration.cli import main
from fpabee.runtime import Engine, InputError, read_manifest, simulate
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.rules.rules import ExitRule

WORDS = ("the", "good", "bad", "film", "plot", "music", "stop", "turn", "on", "light", "rain")
QUICK = ("--quiet", "--threads", "1")


def write_rows(folder: Path, path: Path, count: int = 120, seed: int = 0, **more: Any) -> Path:
    """Random texts, most of them labelled as the model has it at full depth."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(count)]
    with Engine.load(folder, threads=1) as engine:
        predictions = engine.predict(texts, full_depth=True)
        names = engine.labels
        multi = engine.multi_label
    lines = []
    for text, prediction in zip(texts, predictions, strict=True):
        labels = list(prediction.labels)
        if generator.random() < 0.15:
            labels = [generator.choice(names)]
        row = {"text": text, **({"labels": labels} if multi else {"label": labels[0]}), **more}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def folder(engine_copy: Callable[..., Path]) -> Path:
    """An engines folder of one's own."""
    return engine_copy("bert")


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """Labelled rows."""
    return write_rows(folder, tmp_path / "dev.jsonl")


def test_three_points_by_default_and_the_runtime_runs_them(folder: Path, data: Path) -> None:
    result = run(folder, "--data", data, *QUICK)
    assert result.exit_code == 0, result.output
    for name in ("safe", "balanced (default)", "fast"):
        assert name in result.stdout
    for kind in ("fpabee", "pabee", "entropy"):
        assert kind in result.stdout
    assert "points with the same rule may differ" in result.stdout, "judged by cross-fitting"
    target = read_manifest(folder).targets["onnxruntime-fp32"]
    assert list(target.operating_points) == ["safe", "balanced", "fast"]
    assert target.default_operating_point == "balanced"
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    for name, point in target.operating_points.items():
        assert (point.metric, point.rows) == ("accuracy", 120)
        assert point.held_out == "5-fold cross-fitting"
        assert set(point.measured_speedup) == {"1", "32"}
        assert sum(point.exits) == 120
        assert point.drop_interval[0] <= 100 * (point.full_depth_score - point.score)
        with Engine.load(folder, operating_point=name, threads=1) as engine:
            rule = ExitRule.from_dict(point.rule)
            assert engine.rule == rule
            trace = engine.trace(texts)
            exits = simulate(trace.logits, rule, engine.manifest.task.problem_type).exits
            assert [p.exit for p in engine.predict(texts)] == exits.tolist()


@pytest.mark.parametrize(
    ("goal", "name", "words"),
    [
        (("--max-drop", 3), "drop-3", "drop at most 3 points"),
        (("--speedup", 1.5, "--name", "quick"), "quick", "at least 1.5 times as fast"),
        (
            ("--risk", 40, "--risk-of", "disagreement"),
            "risk-40",
            "disagreement at most 40 points with 95 % confidence",
        ),
    ],
)
def test_a_wish_makes_one_point(
    folder: Path, data: Path, goal: tuple[Any, ...], name: str, words: str
) -> None:
    result = run(folder, "--data", data, *goal, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [(point["name"], point["wish"]) for point in content["points"]] == [(name, words)]
    point = read_manifest(folder).targets["onnxruntime-fp32"].operating_points[name]
    assert str(point.goal) == words or point.goal is None
    assert (point.certificate is not None) == name.startswith("risk")
    if point.certificate:
        assert (point.certificate.risk, point.certificate.rows) == (40.0, 72)


def test_only_what_is_certified_is_said_with_its_confidence(folder: Path, data: Path) -> None:
    bound = ("--risk", 40, "--risk-of", "disagreement", "--unlabelled")
    result = run(folder, "--data", data, *bound, *QUICK)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "risk-40: disagreement at most 40 points with 95 % confidence, tested" in said
    assert said.count("95 % confidence") == 1
    assert "best setting of each rule, drop at most 40 points by estimate, not certified:" in said


@pytest.mark.parametrize(("drop", "is_said"), [(0, True), (100, False)])
def test_a_point_that_is_full_depth_says_why(
    folder: Path, data: Path, drop: float, is_said: bool
) -> None:
    result = run(
        folder, "--data", data, "--max-drop", drop, "--rule", "budget", "--unlabelled", *QUICK
    )
    assert result.exit_code == 0, result.output
    said = f"drop-{drop}: 120 rows are too few to confirm that any faster setting"
    assert (said in " ".join(result.stdout.split())) is is_said


def test_points_are_reported_on_the_test_file(folder: Path, data: Path, tmp_path: Path) -> None:
    test = write_rows(folder, tmp_path / "test.jsonl", count=70, seed=1)
    result = calibrate(folder, data, CalibrationOptions(test=test, threads=1))
    assert result.held_out == "test.jsonl"
    for point in result.points:
        assert (point.held_out.rows, point.chosen_on.rows) == (70, 120)
        assert point.optimism == pytest.approx(point.held_out.drop - point.chosen_on.drop)
    stored = read_manifest(folder).targets[result.target].operating_points["fast"]
    assert (stored.held_out, stored.rows) == ("test.jsonl", 70)


def test_columns_may_have_other_names(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lines = ["gold,sentence,text", *(f"{row['label']},{row['text']},other" for row in rows)]
    table = tmp_path / "dev.txt"
    table.write_text("\n".join(lines) + "\n")
    names = ("--text-column", "sentence", "--label-column", "gold", "--input-format", "csv")
    common = ("--max-drop", 3, "--rule", "entropy", "--json", *QUICK)
    plain = json.loads(run(folder, "--data", data, *common).stdout)
    named = json.loads(run(folder, "--data", table, *names, *common).stdout)
    ours, theirs = (result["points"][0]["chosen_on"] for result in (named, plain))
    assert ours["full_depth_score"] == theirs["full_depth_score"] < 1


def test_a_trace_is_used_again_while_it_fits(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CalibrationOptions(goals={"x": Goal(max_drop=1.0)}, default="x", threads=1)
    first = calibrate(folder, data, options)
    kept = list((folder / "calibration").glob("trace-onnxruntime-fp32-*.npz"))
    assert len(kept) == 1
    run_again = trace_module._run
    calls = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return run_again(*arguments)

    monkeypatch.setattr(trace_module, "_run", count)
    again = calibrate(folder, data, options)
    assert calls == []
    np.testing.assert_array_equal(again.rows.logits, first.rows.logits)
    assert again.points[0].rule == first.points[0].rule
    # Other labels are no other trace; other texts are.
    lines = data.read_text().splitlines()
    data.write_text("\n".join(reversed(lines)) + "\n")
    calibrate(folder, data, options)
    assert calls == [1]
    kept[0].write_bytes(b"damaged")
    data.write_text("\n".join(lines) + "\n")
    calibrate(folder, data, options)
    assert calls == [1, 1]


def test_unlabelled_rows_are_held_against_full_depth(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "texts.txt"
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    bare.write_text("\n".join(texts) + "\n")
    refused(run(folder, "--data", bare, *QUICK), "line 1 has no label", "--unlabelled")
    result = calibrate(folder, bare, CalibrationOptions(unlabelled=True, threads=1))
    for point in result.points:
        assert point.held_out.metric == "agreement"
        assert point.held_out.full_depth_score == 1.0


def test_tuned_cuts_are_stored_and_points_of_other_targets_go(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    folder = engine_copy("mpnet")
    manifest = read_manifest(folder)
    here = manifest.default_target
    targets = {**manifest.targets, "other": manifest.targets[here]}
    write_manifest(folder, msgspec.structs.replace(manifest, targets=targets))
    set_points(folder, target="other", default="fast", fast=ExitRule.from_dict(_BUDGET))
    data = tmp_path / "dev.jsonl"
    write_rows(folder, data, count=200)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for row in lines:  # a label that full depth is too shy with
        row["labels"] = sorted({*row["labels"], "food"})
    data.write_text("\n".join(json.dumps(row) for row in lines) + "\n")
    result = run(folder, "--data", data, "--tune-label-thresholds", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    manifest = read_manifest(folder)
    assert manifest.task.label_thresholds == tuple(content["cuts"]["cuts"])
    assert manifest.task.label_thresholds[manifest.task.labels.index("food")] < 0.5
    assert manifest.targets["other"].operating_points == {}
    assert list(manifest.targets[here].operating_points) == ["safe", "balanced", "fast"]


_BUDGET = {"name": "budget", "exit": 1}


def test_only_the_rules_that_are_named_are_chosen(folder: Path, data: Path) -> None:
    result = run(folder, "--data", data, "--rule", "fpabee", "--measure", "kd", *QUICK, "--json")
    content = json.loads(result.stdout)
    assert {point["rule"]["name"] for point in content["points"]} <= {"fpabee", "budget"}
    assert {"pabee", "entropy"} <= {comparison["kind"] for comparison in content["contenders"]}
    measures = {point["rule"].get("measure", "kd") for point in content["points"]}
    assert measures == {"kd"}


def test_logits_that_are_no_numbers_are_refused(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Engine.trace

    def broken(self: Engine, *arguments: Any, **more: Any) -> Any:
        found = trace(self, *arguments, **more)
        found.logits[1, 7] = np.nan
        return found

    monkeypatch.setattr(Engine, "trace", broken)
    with pytest.raises(InputError, match=r"not numbers for .*, line 8.*fpabee-inspect"):
        calibrate(folder, data, CalibrationOptions(threads=1))
    assert not (folder / "calibration").exists()


def test_a_trace_can_be_kept_elsewhere(folder: Path, data: Path, tmp_path: Path) -> None:
    (folder / "calibration").write_text("in the way")
    result = run(folder, "--data", data, "--output", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out").glob("trace-*.npz"))


def test_a_report_is_written_last_and_costs_no_calibration(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "report" / "report.html").mkdir(parents=True)
    result = run(folder, "--data", data, "--report", tmp_path / "report", *QUICK)
    assert result.exit_code == 1
    assert "cannot write the report" in result.stderr
    assert "balanced (default)" in result.stdout
    assert read_manifest(folder).targets["onnxruntime-fp32"].operating_points
    assert run(folder, "--data", data, "--no-texts", *QUICK).exit_code == 2
