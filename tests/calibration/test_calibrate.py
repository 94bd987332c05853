"""fpabee-calibrate end to end, on tiny engines folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from fpabee.calibration import CalibrationOptions, CostModel, Goal, calibrate
from fpabee.calibration import trace as trace_module
from fpabee.calibration.cli import main
from fpabee.runtime import Budget, Engine, read_manifest, simulate
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.rules.base import ExitRule

WORDS = ("the", "good", "bad", "film", "plot", "music", "stop", "turn", "on", "light", "rain")


def write_rows(folder: Path, path: Path, count: int = 120, seed: int = 0) -> Path:
    """Random texts, most of them labelled as the model labels them at full depth."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(count)]
    with Engine.load(folder, threads=1) as engine:
        predictions = engine.predict(texts, full_depth=True)
        names, multi_label = engine.labels, engine.multi_label
    lines = []
    for text, prediction in zip(texts, predictions, strict=True):
        labels = list(prediction.labels)
        if generator.random() < 0.15:
            labels = [generator.choice(names)]
        label = {"labels": labels} if multi_label else {"label": labels[0]}
        lines.append(json.dumps({"text": text, **label}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder: Path, data: Path, *options: Any) -> Result:
    arguments = [folder, "--data", data, "--quiet", "--threads", 1, *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said(folder: Path, data: Path, *options: Any) -> str:
    """Standard output of a run that succeeds, in one line."""
    result = run(folder, data, *options)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture
def folder(engine_copy: Callable[..., Path]) -> Path:
    """An engines folder of one's own."""
    return engine_copy("bert")


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """Labelled rows."""
    return write_rows(folder, tmp_path / "dev.jsonl")


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment takes a second per row, so that no choice depends on measured times."""

    def costs(engine: Engine, lengths: Any, batch: int) -> CostModel:
        return CostModel(batch, (1,), ((1.0,),) * len(engine.manifest.segments))

    # The package's name `calibrate` is the function.
    module = import_module("fpabee.calibration.calibrate")
    monkeypatch.setattr(module, "measure_costs", costs)
    monkeypatch.setattr(module, "measure_speedup", lambda *arguments: 1.5)


def test_three_points_by_default_and_the_runtime_runs_them(folder: Path, data: Path) -> None:
    """The only test here that measures times."""
    output = said(folder, data)
    for text in ("safe", "balanced (default)", "fast", "fpabee", "pabee", "entropy"):
        assert text in output
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


@pytest.mark.usefixtures("fixed_times")
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
def test_a_goal_makes_one_point(
    folder: Path, data: Path, goal: tuple[Any, ...], name: str, words: str
) -> None:
    content = json.loads(said(folder, data, *goal, "--json"))
    assert [(point["name"], point["wish"]) for point in content["points"]] == [(name, words)]
    point = read_manifest(folder).targets["onnxruntime-fp32"].operating_points[name]
    assert str(point.goal) == words or point.goal is None
    assert (point.certificate is not None) == name.startswith("risk")
    if point.certificate:
        assert (point.certificate.risk, point.certificate.rows) == (40.0, 72)


@pytest.mark.usefixtures("fixed_times")
def test_only_what_is_certified_is_said_with_its_confidence(folder: Path, data: Path) -> None:
    output = said(folder, data, "--risk", 40, "--risk-of", "disagreement", "--unlabelled")
    assert "risk-40: disagreement at most 40 points with 95 % confidence, tested" in output
    assert output.count("95 % confidence") == 1
    assert "drop at most 40 points by estimate, not certified" in output


@pytest.mark.usefixtures("fixed_times")
@pytest.mark.parametrize(("drop", "is_said"), [(0, True), (100, False)])
def test_a_point_at_full_depth_says_why(
    folder: Path, data: Path, drop: float, is_said: bool
) -> None:
    output = said(folder, data, "--max-drop", drop, "--rule", "budget", "--unlabelled")
    assert (f"drop-{drop}: 120 rows are too few" in output) is is_said


@pytest.mark.usefixtures("fixed_times")
def test_points_are_reported_on_the_test_file(folder: Path, data: Path, tmp_path: Path) -> None:
    test = write_rows(folder, tmp_path / "test.jsonl", count=70, seed=1)
    result = calibrate(folder, data, CalibrationOptions(test=test, threads=1))
    assert result.held_out == "test.jsonl"
    for point in result.points:
        assert (point.held_out.rows, point.chosen_on.rows) == (70, 120)
        assert point.optimism == pytest.approx(point.held_out.drop - point.chosen_on.drop)
    stored = read_manifest(folder).targets[result.target].operating_points["fast"]
    assert (stored.held_out, stored.rows) == ("test.jsonl", 70)


@pytest.mark.usefixtures("fixed_times")
def test_columns_may_have_other_names(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lines = ["gold,sentence,text", *(f"{row['label']},{row['text']},other" for row in rows)]
    table = tmp_path / "dev.txt"
    table.write_text("\n".join(lines) + "\n")
    names = ("--text-column", "sentence", "--label-column", "gold", "--input-format", "csv")
    common = ("--max-drop", 3, "--rule", "entropy", "--json")
    plain, named = (
        json.loads(said(folder, *more, *common))["points"][0]["chosen_on"]["full_depth_score"]
        for more in ([data], [table, *names])
    )
    assert plain == named < 1


@pytest.mark.usefixtures("fixed_times")
def test_a_trace_is_used_again_while_it_fits(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CalibrationOptions(goals={"x": Goal(max_drop=1.0)}, default="x", threads=1)
    first = calibrate(folder, data, options)
    (kept,) = (folder / "calibration").glob("trace-onnxruntime-fp32-*.npz")
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
    # Other texts need another trace.
    lines = data.read_text().splitlines()
    data.write_text("\n".join(reversed(lines)) + "\n")
    calibrate(folder, data, options)
    assert calls == [1]
    kept.write_bytes(b"damaged")
    data.write_text("\n".join(lines) + "\n")
    calibrate(folder, data, options)
    assert calls == [1, 1]


@pytest.mark.usefixtures("fixed_times")
def test_unlabelled_rows_are_compared_with_full_depth(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "texts.txt"
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    bare.write_text("\n".join(texts) + "\n")
    result = run(folder, bare)
    assert result.exit_code == 1
    assert "line 1 has no label" in result.stderr
    assert "--unlabelled" in result.stderr
    for point in calibrate(folder, bare, CalibrationOptions(unlabelled=True, threads=1)).points:
        assert point.held_out.metric == "agreement"
        assert point.held_out.full_depth_score == 1.0


@pytest.mark.usefixtures("fixed_times")
def test_tuned_label_thresholds_are_stored_and_other_targets_lose_their_points(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    folder = engine_copy("mpnet")
    manifest = read_manifest(folder)
    here = manifest.default_target
    targets = {**manifest.targets, "other": manifest.targets[here]}
    write_manifest(folder, msgspec.structs.replace(manifest, targets=targets))
    set_points(folder, target="other", default="fast", fast=Budget(exit=1))
    data = write_rows(folder, tmp_path / "dev.jsonl", count=200)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for row in lines:  # a label that is predicted too seldom at full depth
        row["labels"] = sorted({*row["labels"], "food"})
    data.write_text("\n".join(json.dumps(row) for row in lines) + "\n")
    content = json.loads(said(folder, data, "--tune-label-thresholds", "--json"))
    manifest = read_manifest(folder)
    assert manifest.task.label_thresholds == tuple(content["cuts"]["cuts"])
    assert manifest.task.label_thresholds[manifest.task.labels.index("food")] < 0.5
    assert manifest.targets["other"].operating_points == {}
    assert list(manifest.targets[here].operating_points) == ["safe", "balanced", "fast"]


@pytest.mark.usefixtures("fixed_times")
def test_only_the_rules_that_are_named_are_chosen(folder: Path, data: Path) -> None:
    content = json.loads(said(folder, data, "--rule", "fpabee", "--measure", "kd", "--json"))
    assert {point["rule"]["name"] for point in content["points"]} <= {"fpabee", "budget"}
    assert {"pabee", "entropy"} <= {comparison["kind"] for comparison in content["contenders"]}
    measures = {point["rule"].get("measure", "kd") for point in content["points"]}
    assert measures == {"kd"}


@pytest.mark.usefixtures("fixed_times")
def test_a_trace_can_be_kept_elsewhere(folder: Path, data: Path, tmp_path: Path) -> None:
    (folder / "calibration").write_text("in the way")
    said(folder, data, "--output", tmp_path / "out")
    assert list((tmp_path / "out").glob("trace-*.npz"))


@pytest.mark.usefixtures("fixed_times")
def test_a_report_that_fails_leaves_the_calibration(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "report" / "report.html").mkdir(parents=True)
    result = run(folder, data, "--report", tmp_path / "report")
    assert result.exit_code == 1
    assert "cannot write the report" in result.stderr
    assert "balanced (default)" in result.stdout
    assert read_manifest(folder).targets["onnxruntime-fp32"].operating_points
    assert run(folder, data, "--no-texts").exit_code == 2
