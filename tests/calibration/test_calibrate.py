"""fpabee-calibrate end to end, on tiny engines folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from rich.cells import cell_len

from fpabee.calibration import (
    Bound,
    Calibration,
    CalibrationOptions,
    Goal,
    Report,
    calibrate,
)
from fpabee.calibration.exact import useful_rows
from fpabee.calibration.report import plots
from fpabee.calibration.report.words import promise_in_words
from fpabee.calibration.result import make_default
from fpabee.calibration.scoring import METRICS, Scorer
from fpabee.calibration.timing import Speed
from fpabee.commands.calibrate import main
from fpabee.runtime import Budget, Confidence, Engine, Entropy, read_manifest, simulate
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.artifact.manifest import TRAINED_ON_NAME, ProblemType
from fpabee.runtime.artifact.trained_on import have_trained, write_trained_on
from fpabee.runtime.encoding import Text
from fpabee.runtime.errors import ArtifactError, InputError
from fpabee.runtime.files import Row
from fpabee.runtime.rules.rules import ExitRule

from ..bad_input.cases import contents, corrected
from ..doubles.openvino import add_openvino
from ..programs import invoke, spy
from .conftest import label_rows, write

TARGET = "onnxruntime-fp32"


def run(folder: Path, *options: Any) -> Result:
    return invoke(main, folder, "--quiet", "--threads", 1, *options)


def said(folder: Path, *options: Any) -> str:
    """Standard output of a run that succeeds, in one line."""
    result = run(folder, *options)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture
def folder(engine_copy: Callable[..., Path], measured: None) -> Path:
    """An engines folder of one's own, whose times are fixed."""
    return engine_copy("bert")


@pytest.fixture
def rows(folder: Path) -> list[Row]:
    """Labelled rows."""
    return label_rows(folder)


@pytest.fixture
def data(rows: list[Row], tmp_path: Path) -> Path:
    """A file with these rows."""
    return write(rows, tmp_path / "dev.jsonl")


# With so many changes allowed, few rows certify something.
SURE = CalibrationOptions({"sure": Bound(changed_answers=0.4)}, "sure", threads=1)


def assert_runs(folder: Path, point: str, rule: ExitRule, rows: Sequence[Row]) -> None:
    """The runtime runs the rule of an operating point as it was simulated."""
    texts = [row.content for row in rows]
    with Engine.load(folder, operating_point=point, threads=1) as engine:
        assert engine.rule == rule
        trace = engine.trace(texts)
        exits = simulate(trace.logits, rule, engine.manifest.task.problem_type).exits
        assert [p.exit for p in engine.predict(texts)] == exits.tolist()


def logits_at_full_depth(folder: Path, rows: Sequence[Row]) -> NDArray[np.float32]:
    """The logits `[rows, labels]` of the last exit."""
    with Engine.load(folder, threads=1, rule=Budget(exit=3)) as engine:
        trace = engine.trace([row.content for row in rows])
    return np.asarray(trace.logits[-1])


def test_a_kind_without_metrics_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METRICS, ProblemType.SINGLE_LABEL)
    with pytest.raises(InputError, match="classifiers cannot be calibrated -> give a model for m"):
        calibrate(folder, [])


def test_the_steps_of_a_calibration_that_take_long_have_a_count(
    folder: Path, rows: list[Row]
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    calibrate(
        folder,
        rows,
        CalibrationOptions(goals={"fast": Goal(max_drop=2.0)}),
        lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert seen["time fast"] == [(0, 2), (1, 2)]
    assert seen["trace"][-1] == (120, 120)


def test_a_point_of_a_speedup_is_never_slower_than_all_layers(
    folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates of costs may be wrong: bolder settings are tried."""
    seen: list[ExitRule] = []
    needed = 1.6

    def measured(engine: Engine, rows: Any, rule: ExitRule, layers: Any, batch: int) -> Speed:
        seen.append(rule)
        estimate = engine.manifest.exit_layers[-1] / layers.mean()
        return Speed(float(estimate / needed) if batch == 1 else 1.25, 1.0)

    monkeypatch.setattr(import_module("fpabee.calibration.calibrate"), "measure_speedup", measured)
    goal = Goal(speedup=1.1)
    (point,) = calibrate(folder, rows, CalibrationOptions(goals={"fast": goal})).points
    assert point.goal == goal
    assert min(point.measured.values()) >= 1
    assert len({str(rule) for rule in seen}) > 1
    before = contents(folder)
    needed = 100.0
    with pytest.raises(InputError, match=r"measure 0\.\d\d times as fast as all layers"):
        calibrate(folder, rows, CalibrationOptions(goals={"fast": goal}))
    assert contents(folder) == before


def test_three_points_by_default_and_the_runtime_runs_them(
    engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    """The only test here that measures times."""
    folder = engine_copy("bert")
    rows = label_rows(folder)
    data = write(rows, tmp_path / "dev.jsonl")
    output = said(folder, "--data", data)
    points = read_manifest(folder).targets[TARGET].operating_points
    assert list(points) == ["safe", "balanced", "fast"]
    assert read_manifest(folder).targets[TARGET].default_operating_point == "balanced"
    assert f"next: fpabee-run {folder} {data} --target {TARGET}" in output
    assert "balanced (default): " in output
    assert "best setting of each kind" not in output
    assert re.search(
        "No guarantee: .* all layers, .* 120 texts are too few.* 0.5 points .* 598 .* 3,900", output
    )
    for name, point in points.items():
        assert output.count(f" {name} ") == 1 + (name == "balanced"), "once in the table"
        assert (point.metric, set(point.measured_speedup)) == ("accuracy", {"1", "32"})
        assert (point.rows, sum(point.exits)) == (120, 120)
        assert point.held_out == "5-fold cross-validation"
        assert point.drop_interval[0] <= 100 * (point.full_depth_score - point.score)
        assert_runs(folder, name, ExitRule.from_dict(point.rule), rows)


def test_the_table_fits_80_columns_also_in_a_file(
    folder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goals = ("--changed", 40, "--missed", 45, "--threshold", "music=0.7")
    for options in ((), goals):
        result = run(folder, "--data", data, *options)
        lines = result.stdout.splitlines()
        start = lines.index("") + 1
        table = lines[start : lines.index("", start)]
        assert max(map(cell_len, table)) <= 80
        sentences = " ".join(result.stdout.split())
        assert ("neither the model nor its exits" in sentences) == bool(options)
        assert table[-1].split().count("1.2") == 2, "single texts and the file"
    assert table[1].split()[-2:] == ["layers", "flags"]
    assert table[-1].startswith("onnxruntime-fp32 changed-40-missed-45  ")
    assert re.search(r", and \d+ answers, which nothing bounds", sentences)
    assert [record.message for record in caplog.records] == [
        "at most 40 % changed answers: 6 texts are the least, and 40 give a good chance",
        "at most 45 % missed: 6 flagged texts are the least, and 40 give a good chance",
    ]


@pytest.mark.parametrize(
    ("goal", "name", "words"),
    [
        (("--max-drop", 3), "drop-3", "drop at most 3 points"),
        (("--speedup", 1.5), "speedup-1.5", "at least 1.5 times as fast"),
        (("--risk", 40), "risk-40", "a drop of at most 40 points, with 95 % confidence"),
        (
            ("--changed", 40, "--confidence", 90),
            "changed-40",
            "at most 40 % changed answers, with 90 % confidence",
        ),
        (
            ("--changed", 30, "--false-alarms", 35, "--threshold", "music=0.6"),
            "changed-30-false-alarms-35",
            "at most 30 % changed answers and at most 35 % false alarms of 'music', with 95 % "
            "confidence",
        ),
    ],
)
def test_a_goal_makes_one_point(
    folder: Path, rows: list[Row], data: Path, goal: tuple[Any, ...], name: str, words: str
) -> None:
    content = json.loads(said(folder, "--data", data, *goal, "--json"))
    assert [(point["name"], point["goal"]) for point in content["points"]] == [(name, words)]
    point = read_manifest(folder).targets[TARGET].operating_points[name]
    assert (point.held_out, point.rows) == ("5-fold cross-validation", 120)
    assert point.hardware.endswith(" threads")
    if "confidence" not in words:
        assert (str(point.goal), point.certificate) == (words, None)
        return
    assert point.certificate is not None
    assert str(point.certificate) == words
    first = point.certificate.promises[0]
    level = 1 - point.certificate.confidence / 100
    assert first.rows == useful_rows(120, first.at_most / 100, level)
    promise = content["points"][0]["promise"]
    tested = " and ".join(str(each.rows) for each in point.certificate.promises)
    assert promise.startswith(f"on new texts {words}, tested on {tested} of 120 texts")
    is_about_all = all(each.label is None for each in point.certificate.promises)
    why = f"tested on {tested} of 120 texts (all of them would allow no more changes); "
    assert (why in promise) == (is_about_all and first.rows < 120)
    rule = ExitRule.from_dict(point.rule)
    assert isinstance(rule, Confidence)
    if "false" in name:
        assert point.certificate.label_thresholds == {"music": 0.6}
        assert sorted(rule.label_thresholds) == [0.6, 1.0, 1.0, 1.0]
        assert read_manifest(folder).task.labels[rule.label_thresholds.index(0.6)] == "music"
        assert_runs(folder, name, rule, rows)


def test_what_too_few_rows_cannot_guarantee_runs_at_full_depth(
    folder: Path, rows: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Decisions need no labels, and what is needed is said before anything runs."""
    bare = tmp_path / "my texts.txt"
    bare.write_text("\n".join(row.text for row in rows) + "\n")
    summary = said(folder, "--data", bare, "--changed", 1)
    (needs,) = (record.message for record in caplog.records)
    assert re.search("1 % changed answers: 299 texts .* 1,960 ", needs)
    assert "No guarantee: " in summary
    assert f"120 texts are too few; {needs}" in summary
    target = read_manifest(folder).targets[TARGET]
    assert target.default_operating_point == "changed-1"
    point = target.operating_points["changed-1"]
    assert (ExitRule.from_dict(point.rule), point.certificate) == (Budget(exit=3), None)


@pytest.mark.parametrize(
    ("drop", "interval", "says"),
    [
        (
            0.4,
            (-0.5, 1.3),
            "0.40 points lost (95 %: 0.50 gained to 1.30 lost)",
        ),
        # The half of the interval is 1.7 points, and a goal of 1 needs 1.7^2 times as many rows.
        (1.2, (-0.5, 2.9), "about 450 rows would tell more"),
    ],
)
def test_a_goal_that_was_missed_says_how_many_rows_would_help(
    calibrated: Callable[..., Calibration], drop: float, interval: Any, says: str
) -> None:
    result = calibrated()
    held = replace(result.points[1].held_out, drop=drop, interval=interval)
    point = replace(
        result.points[1], rule=Entropy(threshold=0.1), goal=Goal(max_drop=1.0), held_out=held
    )
    assert says in promise_in_words(point, result)


@pytest.mark.usefixtures("measured")
def test_what_exit_0_answers_is_said(
    exit_0_engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "_svg", lambda figure: b"<svg/>")  # drawing takes seconds
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    rows = label_rows(folder)
    options = ("--data", write(rows, tmp_path / "dev.jsonl"), "--max-drop", 20)
    table = said(folder, *options, "--report", tmp_path / "report.html")
    with Engine.load(folder, threads=1) as engine:
        texts = [row.content for row in rows]
        early = engine.predict(texts)
        full = engine.predict(texts, full_depth=True)
        assert engine.operating_point == "drop-20"
    pairs = [(a, b) for a, b in zip(early, full, strict=True) if a.exit == 0]
    changed = sum(a.labels != b.labels for a, b in pairs)
    assert 0 < changed < len(pairs)
    words = f"{100 * len(pairs) / len(rows):.0f} % of rows"
    (held_out,) = re.findall(
        f"exit 0 answers at drop-20: {words}; ([0-9]+ of [0-9]+) such answers changed", table
    )
    words += f"; {held_out} such answers changed"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert words in page


def test_another_point_becomes_the_default(folder: Path, data: Path) -> None:
    said(folder, "--data", data)
    before = read_manifest(folder)
    assert f"fast is now the default operating point of {TARGET}" in said(
        folder, "--set-default", "fast"
    )
    changed = msgspec.structs.replace(before.targets[TARGET], default_operating_point="fast")
    assert read_manifest(folder).targets[TARGET] == changed
    assert not read_manifest(folder).default_is_fixed
    assert run(folder, "--set-default", "safe", "--metric", "macro_f1").exit_code == 2
    words = f"the default operating point of {TARGET} was fast, and is now balanced"
    assert f"warning: {words}" in said(folder, "--data", data)


def test_a_target_that_is_made_the_default_stays_it(
    folder: Path, set_points: Callable[..., None]
) -> None:
    set_points(folder, "copy", fast=Budget(exit=1))
    said(folder, "--set-default", "fast", "--target", "copy")
    manifest = read_manifest(folder)
    assert (manifest.default_target, manifest.default_is_fixed) == ("copy", True)
    assert manifest.targets["copy"].default_operating_point == "fast"
    assert "no target 'none'" in run(folder, "--set-default", "fast", "--target", "none").stderr
    assert read_manifest(folder) == manifest


def test_points_are_reported_on_the_test_file(
    folder: Path, rows: list[Row], data: Path, tmp_path: Path
) -> None:
    new = [row for row in label_rows(folder, seed=1) if row.text not in {r.text for r in rows}]
    test = write([*new[:70], *rows[:3]], tmp_path / "test.jsonl")
    result = calibrate(folder, data, CalibrationOptions(test=test, threads=1))
    (warning,) = result.warnings
    assert warning.startswith("3 of 73 test texts are also among the rows that choose")
    assert "line 71" in warning
    assert f"warning: {warning}" in said(folder, "--data", data, "--test", test)
    assert result.held_out == "test.jsonl"
    for point in result.points:
        assert (point.held_out.rows, point.chosen_on.rows) == (73, 120)
    stored = read_manifest(folder).targets[TARGET].operating_points["fast"]
    assert (stored.held_out, stored.rows) == ("test.jsonl", 73)


def test_a_label_that_is_lost_is_named(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(scorer: Scorer, exits: NDArray[np.int64], labels: Sequence[str]) -> str:
        stored = read_manifest(folder)
        return f"{list(labels) == list(stored.task.labels)}, {exits.mean():.2f}"

    monkeypatch.setattr(Scorer, "lost_label", lost)
    result = calibrate(folder, data, CalibrationOptions(threads=1))
    balanced = next(point for point in result.points if point.name == "balanced")
    counts = balanced.chosen_on.exits
    mean = np.average(np.arange(len(counts)) + 1, weights=counts)
    (warning,) = result.warnings
    assert warning.startswith(f"at balanced, True, {mean:.2f}; a promise about missed texts")


def test_only_the_rules_that_are_named_are_chosen(calibrated: Callable[..., Calibration]) -> None:
    rules = ("energy", "pcee")
    result = calibrated(rules=rules, goals={"close": Goal(max_drop=5.0)})
    assert result.points[0].rule.name in (*rules, "budget")


def test_a_report_that_fails_leaves_the_calibration(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.html").mkdir()
    result = run(folder, "--data", data, "--report", tmp_path / "report.html")
    assert result.exit_code == 1
    assert "cannot write the report" in result.stderr
    assert "balanced (default)" in result.stdout
    assert read_manifest(folder).targets[TARGET].operating_points


def test_all_targets_are_calibrated_in_one_run(folder: Path, data: Path) -> None:
    add_openvino(folder, "fp32")
    # A target of another machine is left out.
    targets = dict(read_manifest(folder).targets)
    targets["cuda"] = msgspec.structs.replace(targets[TARGET], device="cuda")
    EnginesFolder.read(folder).with_manifest(targets=targets).write()
    found = json.loads(said(folder, "--data", data, "--all-targets", "--json"))
    assert [result["target"] for result in found] == [TARGET, "openvino-fp32"]
    targets = read_manifest(folder).targets
    for name in (TARGET, "openvino-fp32"):
        assert targets[name].default_operating_point == "balanced"
    assert not targets["cuda"].operating_points
    assert run(folder, "--data", data, "--all-targets", "--target", TARGET).exit_code == 2


def test_all_targets_share_standard_input_and_an_error_loses_none_that_is_done(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_openvino(folder, "fp32")
    wanted = ("--data", "-", "--all-targets", "--json")
    rows = data.read_text()
    done = invoke(main, folder, *wanted, input=rows)
    assert [result["target"] for result in json.loads(done.stdout)] == [TARGET, "openvino-fp32"]

    def failing(
        engines: Path, rows: Any, options: CalibrationOptions, *others: Any, **more: Any
    ) -> Any:
        if options.target != TARGET:
            raise InputError("broken", "mend it")
        return calibrate(engines, rows, options, *others, **more)

    monkeypatch.setattr("fpabee.commands.calibrate.calibrate", failing)
    failed = invoke(main, folder, *wanted, input=rows)
    assert failed.exit_code == 1
    assert [result["target"] for result in json.loads(failed.stdout)] == [TARGET]


def test_rows_that_repeat_others_are_counted_with_a_warning(folder: Path, rows: list[Row]) -> None:
    assert not calibrate(folder, rows[:60], SURE).warnings
    (warning,) = calibrate(folder, [*rows[:60], *rows[:9]], SURE).warnings
    assert warning.startswith("9 of 69 rows repeat others")


def test_a_bound_on_flags_says_how_many_answers_change_and_is_no_default(
    folder: Path, rows: list[Row]
) -> None:
    bound = Bound(missed=0.45, thresholds={"music": 0.6})
    report = Report(rows, "these rows")
    options = CalibrationOptions({"flags": bound}, threads=1)
    before = read_manifest(folder).targets[TARGET].default_operating_point
    result = calibrate(folder, rows, options, report=report)
    (warning,) = result.warnings[-1:]
    assert warning.startswith("flags is not the default operating point")
    assert read_manifest(folder).targets[TARGET].default_operating_point == before
    with Engine.load(folder, threads=1, operating_point="flags") as engine:
        texts = [row.content for row in rows]
        pairs = zip(engine.predict(texts), engine.predict(texts, full_depth=True), strict=True)
        changed = sum(early.labels != late.labels for early, late in pairs)
    (point,) = result.points
    assert point.held_out.relabelled == changed > 0
    assert f", and {changed} answers, which nothing bounds" in promise_in_words(point, result)


def test_bounds_of_answers_beside_one_of_flags_become_the_default(
    folder: Path, rows: list[Row]
) -> None:
    flags = Bound(missed=0.45, thresholds={"music": 0.6})
    both: dict[str, Goal | Bound] = {"average": Goal(max_drop=50), "flags": flags}
    result = calibrate(folder, rows, CalibrationOptions(both, "average", threads=1))
    assert result.default == "average"
    words = [promise_in_words(point, result) for point in result.points]
    assert ["which nothing bounds" in each for each in words] == [False, True]
    drop = Bound(drop=0.4, missed=0.45, thresholds={"music": 0.6})
    result = calibrate(folder, rows, CalibrationOptions({"drop": drop}, threads=1))
    assert read_manifest(folder).targets[TARGET].default_operating_point == "drop"
    make_default(folder, "flags")
    result = calibrate(folder, rows, CalibrationOptions({"flags": flags}, threads=1))
    assert read_manifest(folder).targets[TARGET].default_operating_point == "flags"
    assert not any("default" in warning for warning in result.warnings)


def add_trained_on(folder: Path, texts: Sequence[Text]) -> None:
    """Let the exits of a folder have learned from some texts."""
    write_trained_on(folder, texts)
    engines = EnginesFolder.read(folder)
    digest = sha256_of(folder / TRAINED_ON_NAME)
    engines.with_manifest(files={**engines.manifest.files, TRAINED_ON_NAME: digest}).write()


def test_texts_that_trained_the_exits_certify_nothing(folder: Path, rows: list[Row]) -> None:
    distinct = list({row.content: row for row in rows}.values())
    alone = calibrate(folder, distinct[-60:], SURE)
    add_trained_on(folder, [row.content for row in distinct[:-60]])
    result = calibrate(folder, distinct, SURE)
    assert f"{len(distinct) - 60} of {len(distinct)} rows are left out" in result.warnings[0]
    (expected,) = alone.points
    (point,) = result.points
    assert (point.rule, point.certificate) == (expected.rule, expected.certificate)
    assert point.chosen_on.rows == 60
    add_trained_on(folder, [row.content for row in distinct[:-49]])
    with pytest.raises(InputError, match="49 other texts are left"):
        calibrate(folder, distinct, SURE)


def test_a_damaged_list_of_trained_texts_is_refused(folder: Path) -> None:
    add_trained_on(folder, ["a", ("a", "b")])
    engines = EnginesFolder.read(folder)
    texts: list[Text] = ["b", ("a", "b"), "a", ("b", "a")]
    assert have_trained(engines, texts).tolist() == [False, True, True, False]
    corrected(TRAINED_ON_NAME, lambda at: at.write_bytes(b"PK nothing"))(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        have_trained(EnginesFolder.read(folder), texts)


def test_a_point_with_a_guarantee_is_not_lost_in_silence(
    folder: Path, rows: list[Row], data: Path, tmp_path: Path
) -> None:
    few = write(rows[:55], tmp_path / "few.jsonl")
    asked = ("--changed", 5)
    said(folder, "--data", data, *asked)
    before = read_manifest(folder).targets[TARGET]
    assert before.operating_points["changed-5"].certificate is not None
    result = run(folder, "--data", few, *asked)
    assert result.exit_code == 1
    assert "changed-5 stays as it was" in result.stderr
    assert "--force" in result.stderr
    assert "No guarantee: " in " ".join(result.stdout.split()), "nothing that was computed is lost"
    assert read_manifest(folder).targets[TARGET] == before
    said(folder, "--data", few, *asked, "--force")
    point = read_manifest(folder).targets[TARGET].operating_points["changed-5"]
    assert point.certificate is None


@pytest.mark.parametrize("flagged", [0, 1])
def test_a_promise_about_hardly_any_text_is_refused(
    folder: Path, rows: list[Row], flagged: int
) -> None:
    """Nothing, or nothing in a part of the rows, is flagged."""
    label = read_manifest(folder).task.labels[0]
    logits = logits_at_full_depth(folder, rows[:60]).astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    first = np.sort((odds / odds.sum(axis=1, keepdims=True))[:, 0])
    threshold = float(first[-1 - flagged] + np.append(first, 1.0)[len(first) - flagged]) / 2
    bound = Bound(missed=0.05, thresholds={label: threshold})
    (point,) = calibrate(folder, rows[:60], CalibrationOptions({"sure": bound}, "sure")).points
    assert point.certificate is None
    assert f"{flagged} texts are too few" in point.refusal


def test_a_point_that_promises_nothing_about_another_classifier_is_no_default(
    folder: Path, rows: list[Row]
) -> None:
    logits = logits_at_full_depth(folder, rows)
    goals: dict[str, Goal | Bound] = {
        "average": Goal(max_drop=1.0),
        "sure": Bound(changed_answers=0.4),
    }
    options = CalibrationOptions(goals, "average", metric="agreement", threads=1)
    result = calibrate(folder, rows, options, reference=logits)
    target = read_manifest(folder).targets[TARGET]
    assert list(target.operating_points) == ["sure"]
    assert target.default_operating_point == result.default == "sure"
    never = CalibrationOptions({"never": Bound(changed_answers=0.0001)}, threads=1)
    result = calibrate(folder, rows, never, reference=logits)
    target = read_manifest(folder).targets[TARGET]
    assert list(target.operating_points) == ["sure"]
    assert target.default_operating_point == result.default == "sure"
    assert not any("is now never" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("goal", "has_reference", "measures"),
    [
        (Bound(changed_answers=0.4), True, False),
        (Bound(changed_answers=0.4), False, True),  # its report draws a curve
        (Goal(max_drop=1.0), True, True),
    ],
)
def test_segments_are_timed_only_where_costs_choose_or_are_drawn(
    goal: Goal | Bound,
    has_reference: bool,
    measures: bool,
    folder: Path,
    rows: list[Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("fpabee.calibration.calibrate")
    timed = spy(monkeypatch, module, "measure_costs")
    options = CalibrationOptions({"sure": goal}, "sure", metric="agreement", threads=1)
    reference = logits_at_full_depth(folder, rows) if has_reference else None
    calibrate(folder, rows, options, reference=reference)
    assert timed.called == measures


def test_rows_that_cannot_be_calibrated_or_reported_on_are_refused(
    folder: Path, rows: list[Row], data: Path
) -> None:
    report = Report(rows, "others")
    with pytest.raises(InputError, match="no rows"):
        calibrate(folder, [], report=report)
    with pytest.raises(InputError, match="two sets of rows"):
        calibrate(folder, data, CalibrationOptions(test=data), report=report)
