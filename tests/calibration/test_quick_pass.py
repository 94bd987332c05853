"""Certificates of points with a quick pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fpabee.calibration import (
    Bound,
    CalibrationOptions,
    Goal,
    calibrate,
    threshold_for_depth,
    write_report,
)
from fpabee.calibration.report.words import passes_in_words
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.settings import settings_lists
from fpabee.calibration.timing import relative_costs
from fpabee.calibration.trace import engines_of, trace_rows
from fpabee.runtime import (
    Budget,
    Confidence,
    Engine,
    Entropy,
    InputError,
    QuickCosts,
    read_manifest,
    simulate,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.artifact.quick import logits_sha256, quick_of
from fpabee.runtime.files import Row

from ..conftest import QUICK, WORDS, add_quick_pass

EXACT = "onnxruntime-fp32"
ROWS = [Row(" ".join(WORDS[n % 31 : n % 31 + 1 + n % 9]) + f" {n}") for n in range(300)]
BOUND = Bound(changed_answers=0.2, confidence=0.9)


@pytest.fixture
def folder(engine_copy: Callable[..., Path]) -> Path:
    """An engines folder with a faster target, but without points."""
    folder = engine_copy("bert", exit_0=True)
    add_quick_pass(folder, Budget(exit=4))
    engines = EnginesFolder.read(folder)
    target = engines.manifest.targets[EXACT]
    bare = msgspec.structs.replace(target, operating_points={}, default_operating_point="")
    engines.with_target(EXACT, bare).write()
    return folder


def options(**settings: object) -> CalibrationOptions:
    goals = {"changed-20": BOUND}
    return CalibrationOptions(goals=goals, quick_target=QUICK, threads=1, **settings)  # type: ignore[arg-type]


def test_what_is_certified_is_what_a_live_run_does(folder: Path) -> None:
    result = calibrate(folder, ROWS, options())
    (point,) = result.points
    assert point.certificate is not None
    assert point.quick_target == QUICK
    manifest = read_manifest(folder)
    written = manifest.targets[EXACT].operating_points["changed-20"]
    quick = quick_of(written)
    assert quick is not None
    assert quick.sha256 == logits_sha256(manifest, QUICK)
    assert quick.alone == ""
    assert manifest.schema_version == "1.1"
    with Engine.load(folder) as engine:
        answers = engine.predict([row.content for row in ROWS])
        exact = engine.predict([row.content for row in ROWS], full_depth=True)
    stops = np.array([answer.exit for answer in answers])
    assert written.exits == point.chosen_on.exits == tuple(np.bincount(stops, minlength=5))
    changed = sum(some.labels != other.labels for some, other in zip(answers, exact, strict=True))
    assert point.chosen_on.changed_answers == changed
    layers = np.array([0, 1, 2, 3, 6])
    assert written.mean_depth == pytest.approx(layers[stops].mean())
    assert quick.p99_share is not None
    assert quick.p99_share > 0
    in_doubt = (stops == 4).mean()
    assert point.quick_costs == QuickCosts(1 / point.measured["32"], in_doubt, quick.p99_share)


def test_the_report_says_what_two_passes_cost(folder: Path, tmp_path: Path) -> None:
    result = calibrate(folder, ROWS, options())
    (point,) = result.points
    costs = point.quick_costs
    assert costs is not None
    assert costs.time_share is not None
    write_report(result, tmp_path / "report.html")
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "3 layers, exits after 0, 1, 2, 3" in page
    assert f"{100 * costs.time_share:.0f} % of the time</td>" in page
    assert passes_in_words(costs, QUICK, EXACT, "texts") in page
    assert result.layers == (0, 1, 2, 3, 6)


def test_the_point_with_one_pass_is_named(folder: Path) -> None:
    goals = {"changed-20-one-pass": BOUND}
    calibrate(folder, ROWS, CalibrationOptions(goals=goals, threads=1))
    calibrate(folder, ROWS, options())
    written = read_manifest(folder).targets[EXACT].operating_points
    quick = quick_of(written["changed-20"])
    assert quick is not None
    assert quick.alone == "changed-20-one-pass"
    assert quick_of(written["changed-20-one-pass"]) is None


def test_full_depth_needs_no_quick_pass(folder: Path) -> None:
    """Where nothing is certified, nothing is written: a quick pass would only take time."""
    bound = Bound(changed_answers=0.0001)
    result = calibrate(
        folder, ROWS, CalibrationOptions(goals={"never": bound}, quick_target=QUICK, threads=1)
    )
    (point,) = result.points
    assert point.rule == Budget(exit=4)
    assert point.quick_target == result.default == ""
    assert read_manifest(folder).targets[EXACT].operating_points == {}


def test_a_quick_pass_needs_another_target(folder: Path) -> None:
    same = CalibrationOptions(goals={"changed-20": BOUND}, target=QUICK, quick_target=QUICK)
    with pytest.raises(InputError, match=f"would run in {QUICK}, as the exact pass does"):
        calibrate(folder, ROWS, same)


def test_all_points_of_a_target_have_the_same_quick_pass(folder: Path) -> None:
    calibrate(folder, ROWS, options())
    engines = EnginesFolder.read(folder)
    other = engines.manifest.targets[QUICK]
    engines.with_target("onnxruntime-other", other).write()
    asked = CalibrationOptions(goals={"more": BOUND}, quick_target="onnxruntime-other")
    with pytest.raises(InputError, match=f"have a quick pass in {QUICK}, not in onnxruntime-other"):
        calibrate(folder, ROWS, asked)
    assert [*read_manifest(folder).targets[EXACT].operating_points] == ["changed-20"]


def test_no_bolder_point_takes_the_place_of_one_that_was_refused(folder: Path) -> None:
    goals = {"careful": Bound(changed_answers=0.0001), "changed-20": BOUND}
    asked = CalibrationOptions(goals=goals, default="careful", quick_target=QUICK, threads=1)
    result = calibrate(folder, ROWS, asked)
    target = read_manifest(folder).targets[EXACT]
    assert [*target.operating_points] == ["changed-20"]
    assert target.default_operating_point == result.default == ""


def test_a_depth_is_that_of_one_pass(folder: Path) -> None:
    calibrate(folder, ROWS, options())
    texts = [row.content for row in ROWS]
    rule = Entropy(threshold=0.0)
    with Engine.load(folder) as engine:
        task = engine.manifest.task.problem_type
        layers = engine.manifest.exit_layers
        trace = engine.trace(texts)
        with pytest.raises(InputError, match="logits are of 5 exits, and `exit_layers` has 4"):
            threshold_for_depth(trace.logits, rule, task, layers, 1.5, first_exit=0)
    with Engine.load(folder, rule=rule) as engine:
        logits = engine.trace(texts).logits
        chosen = threshold_for_depth(logits, rule, task, layers, 1.5, first_exit=0)
    with Engine.load(folder) as engine:
        depths = [answer.layer for answer in engine.predict(texts, rule=chosen)]
    assert np.mean(depths) == pytest.approx(1.5, abs=0.15)


def test_a_quick_pass_needs_a_guarantee() -> None:
    with pytest.raises(InputError, match="'fast' is a goal on average"):
        CalibrationOptions(goals={"fast": Goal(max_drop=2.0)}, quick_target=QUICK)


def test_settings_are_strict_early_and_bold_at_the_end_of_the_quick_pass() -> None:
    logits = np.zeros((5, 3, 2), np.float32)
    rows = LabelledLogits(
        logits,
        np.ones(3, np.intp),
        None,
        ProblemType.SINGLE_LABEL,
        first_exit=0,
        has_quick_pass=True,
    )
    (_, settings) = settings_lists(rows, exit_0_powers=(2.0,))
    doubt = 0.1
    closest = min(settings, key=lambda rule: abs(rule.stop_thresholds[1] - doubt**1.5))
    assert isinstance(closest, Confidence)
    thresholds = 1 - np.array(closest.threshold)
    reached = thresholds[1] ** (1 / 1.5)
    assert thresholds[:3] == pytest.approx([reached**2, reached**1.5, reached**0.4], rel=1e-3)
    assert closest.exit_0_threshold == pytest.approx(1 - reached**2, rel=1e-3)


def test_a_trace_has_the_quick_pass_first(folder: Path, tmp_path: Path) -> None:
    with engines_of(folder, EXACT, QUICK, 1) as (engine, quick):
        assert quick is not None
        rows = trace_rows(engine, ROWS[:20], tmp_path, labels=False, quick=quick)
        texts = [row.content for row in ROWS[:20]]
        live = engine.core.trace(engine.core.encode(texts), engine.core.in_use)
        assert rows.has_quick_pass
        np.testing.assert_allclose(rows.logits, live.logits, rtol=1e-4, atol=1e-4)
        rule = Confidence(threshold=(0.9, 0.8, 0.7, 0.0))
        expected = simulate(rows.logits, rule, ProblemType.SINGLE_LABEL, first_exit=0).exits
        encoded = engine.core.encode(texts)
        assert (
            engine.core.run(encoded, engine.core.in_use.by(rule)).exits.tolist()
            == expected.tolist()
        )


def test_costs_are_shares_of_full_depth_in_the_exact_target(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: Mapping[int, list[float]] = {5: [0.1, 1.0, 1.0, 1.0, 5.9], 4: [0.1, 2.0, 2.0, 1.9]}
    monkeypatch.setattr(
        "fpabee.runtime.core.Core.time_exits",
        lambda core, rows, tokens: [rows * each for each in seconds[len(core.exits)]],
    )
    lengths = np.full(10, 4)
    with (
        engines_of(folder, EXACT, QUICK, 1) as (both, _),
        engines_of(folder, EXACT, "", 1) as (alone, _),
    ):
        for first in (both, alone):
            costs = relative_costs([first, both, alone], lengths, 32)[1:]
            assert costs[0] == pytest.approx(np.array([0.1, 1.1, 2.1, 3.1, 9.0]) / 5.9)
            assert costs[1] == pytest.approx(np.array([0.1, 2.1, 4.1, 6.0]) / 5.9)
