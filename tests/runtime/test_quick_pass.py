"""A quick pass in one target, and an exact pass in another one for the rows that are in doubt."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fpabee.commands.run import main
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    Certificate,
    Confidence,
    Engine,
    Entropy,
    ExitRule,
    FPabee,
    Pabee,
    Promise,
    RuleError,
    TopK,
    read_manifest,
    simulate,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends.host import HostBackend, HostExecution
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.metrics import Metrics

from ..closeness import assert_close
from ..conftest import QUICK, WORDS, add_quick_pass
from ..doubles.calls import before
from ..programs import invoke, write_lines

TEXTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(40)]
EXACT = "onnxruntime-fp32"
# The exits of the quick pass are 1 to 3, or from 0; exit 4 is the end of the exact pass.
RULES: list[ExitRule] = [
    Confidence(threshold=(0.9, 0.8, 0.75, 0.0)),
    Entropy(threshold=0.3),
    FPabee(threshold=0.05, patience=2),
    Pabee(patience=2),
]


@pytest.fixture
def two_passes(engine_copy: Callable[..., Path]) -> Callable[..., Path]:
    """Copies an engines folder, and gives it a point with a quick pass."""

    def make(rule: ExitRule = RULES[0], family: str = "bert", **options: Any) -> Path:
        exit_0 = options.pop("exit_0", False)
        folder = engine_copy(family, exit_0=exit_0)
        add_quick_pass(folder, rule, **options)
        return folder

    return make


def full_depth_logits(folder: Path, target: str) -> Any:
    with Engine.load(folder, target, rule=Budget(exit=3)) as engine:
        return engine.trace(TEXTS).logits


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_answers_are_those_of_the_pass_that_ends(
    rule: ExitRule, family: str, two_passes: Callable[..., Path]
) -> None:
    """Live runs, windows, streams and the scheduler have the exits of `simulate`."""
    folder = two_passes(rule, family)
    quick = full_depth_logits(folder, QUICK)
    exact = full_depth_logits(folder, EXACT)
    assert not np.allclose(quick, exact, atol=1e-3)
    with Engine.load(folder) as engine:
        trace = engine.trace(TEXTS)
        task = engine.manifest.task
        answers = engine.predict(TEXTS)
        streamed = [*engine.stream(TEXTS)]
        tally = engine.tally
        with Scheduler(engine) as scheduler:
            scheduled = [future.result() for future in scheduler.submit_all(TEXTS)]
    assert_close(trace.logits[:3], quick)
    assert_close(trace.logits[3], exact[-1])
    expected = simulate(
        trace.logits, rule, task.problem_type, label_thresholds=task.label_thresholds
    ).exits
    assert {3, 4} & {*expected.tolist()}
    assert (expected == 4).any()
    for each in (answers, streamed, scheduled):
        assert [answer.exit for answer in each] == expected.tolist()
        logits = np.array([answer.logits for answer in each])
        assert_close(logits, trace.logits[expected - 1, np.arange(len(TEXTS))])
    assert [answer.layer for answer in answers] == np.minimum(expected, 3).tolist()
    assert tally.exits == tuple(2 * np.bincount(expected, minlength=5)[1:])


def test_pairs_of_texts_take_both_passes(two_passes: Callable[..., Path]) -> None:
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    with Engine.load(two_passes()) as engine:
        trace = engine.trace(pairs)
        expected = simulate(trace.logits, RULES[0], engine.manifest.task.problem_type).exits
        answers = engine.predict(pairs)
        exact = engine.predict(pairs, full_depth=True)
        alone = engine.predict(TEXTS)
    assert [answer.exit for answer in answers] == expected.tolist()
    assert {1, 4} <= {*expected.tolist()}
    for n in np.flatnonzero(expected == 4):
        assert answers[n].labels == exact[n].labels
        assert_close(np.array(answers[n].logits), np.array(exact[n].logits))
    assert not np.allclose(
        [answer.logits for answer in answers], [answer.logits for answer in alone], atol=1e-3
    )


def test_exit_0_comes_first(two_passes: Callable[..., Path]) -> None:
    rule = Confidence(threshold=(0.9, 0.8, 0.75, 0.0), exit_0_threshold=0.7)
    folder = two_passes(rule, exit_0=True)
    with Engine.load(folder) as engine:
        trace = engine.trace(TEXTS)
        task = engine.manifest.task
        expected = simulate(trace.logits, rule, task.problem_type, first_exit=0).exits
        assert trace.logits.shape[0] == 5
        assert {0, 4} <= {*expected.tolist()}
        assert [answer.exit for answer in engine.predict(TEXTS)] == expected.tolist()
        with Scheduler(engine) as scheduler:
            scheduled = [future.result().exit for future in scheduler.submit_all(TEXTS)]
        assert scheduled == expected.tolist()


def test_rows_in_doubt_of_a_window_run_together(
    two_passes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []
    begin = HostBackend.open

    def counted(backend: Any) -> Any:
        execution = begin(backend)
        original = execution.begin

        def count(encoded: Any, bucket: Any) -> Any:
            groups.append((backend.name, len(encoded)))
            return original(encoded, bucket)

        monkeypatch.setattr(execution, "begin", count)
        return execution

    monkeypatch.setattr(HostBackend, "open", counted)
    folder = two_passes(Budget(exit=4))
    with Engine.load(folder) as engine:
        groups.clear()  # those of the check on a new kind of machine
        limits = engine.core.limits
        quick, exact = engine.core.in_use.legs
        small = dataclasses.replace(limits, group_tokens=40)
        legs = (dataclasses.replace(quick, limits=small), exact)
        engine.core.in_use = dataclasses.replace(engine.core.in_use, legs=legs)
        assert {answer.exit for answer in engine.predict(TEXTS)} == {4}
    sizes = [rows for name, rows in groups if name == QUICK]
    assert len(sizes) > 2
    assert [rows for name, rows in groups if name == EXACT] == [len(TEXTS)]


def test_full_depth_and_own_rules_run_in_the_exact_target_only(
    two_passes: Callable[..., Path],
) -> None:
    folder = two_passes()
    exact = full_depth_logits(folder, EXACT)
    with Engine.load(folder) as engine:
        answers = engine.predict(TEXTS, full_depth=True)
        early = engine.predict(TEXTS, rule=Budget(exit=2))
        with pytest.raises(RuleError, match="4 thresholds, but the model has 3"):
            engine.predict(TEXTS, rule=Confidence(threshold=(0.5, 0.5, 0.5, 0.0)))
        with pytest.raises(
            RuleError, match=f"is made for a pass in {QUICK}, then a pass in {EXACT}, and `rule`"
        ):
            engine.predict(TEXTS, rule=engine.rule)
    assert {answer.exit for answer in answers} == {3}
    assert_close(np.array([answer.logits for answer in answers]), exact[2])
    assert_close(np.array([answer.logits for answer in early]), exact[1])


def test_max_exit_ends_the_quick_pass(two_passes: Callable[..., Path]) -> None:
    folder = two_passes(Budget(exit=4))
    quick = full_depth_logits(folder, QUICK)
    with Engine.load(folder) as engine:
        for most in (1, 3):
            answers = engine.predict(TEXTS, max_exit=most)
            assert {answer.exit for answer in answers} == {most}
            assert_close(np.array([answer.logits for answer in answers]), quick[most - 1])


def test_without_time_for_the_exact_pass_the_quick_answer_is_given(
    two_passes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_passes(Budget(exit=4))
    quick = full_depth_logits(folder, QUICK)
    now = [0.0]
    with Engine.load(folder) as engine:
        engine.predict(TEXTS)  # loads
        monkeypatch.setattr(engine.core, "clock", lambda: now[0])
        for backend in engine.core.backends.values():

            def tick() -> None:
                now[0] += 0.005  # of both backends, so 10 ms for a segment

            monkeypatch.setattr(backend, "progressed", tick)
        # Three segments of the quick pass, and three of the exact pass take 60 ms.
        for deadline, exits, limited in ((55.0, 3, True), (75.0, 4, False)):
            answers = engine.predict(TEXTS[:4], deadline_ms=deadline)
            assert {answer.exit for answer in answers} == {exits}
            assert {answer.deadline_limited for answer in answers} == {limited}
            assert {answer.deadline_missed for answer in answers} == {False}
            if limited:
                # The call ends with one more tick.
                assert now[0] == pytest.approx(0.04), "no segment of the exact pass has run"
                assert_close(np.array([answer.logits for answer in answers]), quick[2, :4])
            now[0] = 0.0


def test_each_pass_has_the_seconds_of_its_own_segments(
    two_passes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    seconds = {QUICK: 0.005, EXACT: 0.02}
    before(
        monkeypatch,
        HostExecution,
        "enqueue",
        lambda execution, _: now.__setitem__(0, now[0] + seconds[execution._backend.name]),
    )
    with Engine.load(two_passes(Budget(exit=4))) as engine:
        monkeypatch.setattr(engine.core, "clock", lambda: now[0])
        rows = engine.core.encode(TEXTS[:4])
        window, quick, exact = (
            Group.of(np.arange(4), rows, engine.core.in_use, np.inf) for _ in range(3)
        )
        exact.legs = exact.legs[1:]
        soon: dict[int, Any] = {}
        with engine.core.chain() as chain:
            for decision in chain.run(window):
                each = chain.soon([quick]), chain.soon([exact]), chain.soon([quick, exact, exact])
                soon.setdefault(decision.exit, np.array(each) - now[0])
    # Nothing is known of the exact pass before its first segment has run.
    assert soon[3] == pytest.approx([0.005, 0.005, 0.015])
    assert soon[4] == pytest.approx([0.005, 0.02, 0.045])


@pytest.mark.parametrize("with_scores", [False, True])
def test_documents_that_are_returned_have_exact_scores(
    with_scores: bool,
    ranking_engines: Mapping[str, Path],
    first_stage_engines: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    source = first_stage_engines if with_scores else ranking_engines
    folder = Path(shutil.copytree(source["bert"], tmp_path / "engines"))
    exit_0_threshold = -1.5 if with_scores else None
    rule = TopK(top=3, threshold=(-0.3, -0.2, -0.1, 0.0), exit_0_threshold=exit_0_threshold)
    add_quick_pass(folder, rule)
    documents = TEXTS[:20]
    scores = np.linspace(3, -3, len(documents)).tolist() if with_scores else None
    with Engine.load(folder) as engine:
        core = engine.core
        rows = core.with_scores(core.encode([("rain", text) for text in documents]), scores)
        every = core.trace(rows, core.in_use.whole)
        exits = core.in_use.runner.exits_of(every.logits)
        best = engine.rank("rain", documents, scores=scores, all=True)
        at_full_depth = engine.rank("rain", documents, full_depth=True)

        async def scheduled() -> Any:
            with Scheduler(engine) as scheduler:
                return await asyncio.gather(
                    *(scheduler.rank("rain", documents, scores=scores, all=True) for _ in range(3))
                )

        results = [best, *asyncio.run(scheduled())]
    last = 4
    assert 3 <= (exits == last).sum() < len(documents)
    exact = {each.index: each.score for each in at_full_depth}
    for ranked in results:
        assert {each.index: each.exit for each in ranked} == dict(enumerate(exits.tolist()))
        for each in ranked:
            if each.exit == last:
                assert each.score == pytest.approx(exact[each.index], rel=1e-4)
    assert [each.exit for each in best[:3]] == [last] * 3


def test_watched_rows_of_the_quick_pass_run_the_exact_pass(
    two_passes: Callable[..., Path],
) -> None:
    folder = two_passes(Confidence(threshold=(0.9, 0.7, 0.4, 0.0)))
    engines = EnginesFolder.read(folder)
    target = engines.manifest.targets[EXACT]
    promise = Promise(of="changed_answers", at_most=90.0, rows=300)
    certificate = Certificate(confidence=95.0, promises=(promise,))
    point = msgspec.structs.replace(target.operating_points["quick"], certificate=certificate)
    changed = msgspec.structs.replace(target, operating_points={"quick": point})
    engines.with_target(EXACT, changed).write()
    exact = full_depth_logits(folder, EXACT)[2]
    with Engine.load(folder, watch=100.0) as engine:
        watch = engine.core.watch
        assert watch is not None
        answers = engine.predict(TEXTS)
        watched = engine.watched
        layers = [(1, 2, 3, 6)[answer.exit - 1] for answer in answers]
        assert watch._layers_for_answers == sum(layers)
        engine.predict(TEXTS, full_depth=True)
        assert watch._layers_for_answers == sum(layers) + 3 * len(TEXTS)
        again = engine.watched
        assert again is not None
        assert again.rows == len(TEXTS), "rows at full depth are not watched"
    assert watched is not None
    assert watched.rows > 0
    early = np.array([answer.logits for answer in answers]).argmax(axis=1)
    # None of those in doubt runs on; all others run all layers of the exact target.
    in_doubt = sum(answer.exit == 4 for answer in answers)
    assert watch._layers_for_watching == 3 * (watched.rows - in_doubt)
    assert watched.rows == len(TEXTS)
    assert watched.changed_answers <= int((early != exact.argmax(axis=1)).sum())
    assert any(answer.exit < 4 for answer in answers)
    assert any(answer.exit == 4 for answer in answers)


def test_times_are_those_of_both_passes(two_passes: Callable[..., Path]) -> None:
    with Engine.load(two_passes(exit_0=True)) as engine:
        assert len(engine.core.time_exits(2, 5)) == 5
        engine.warm_up()


def test_points_are_changed_while_the_engine_runs(two_passes: Callable[..., Path]) -> None:
    folder = two_passes(alone=Budget(exit=2))
    with Engine.load(folder, operating_point="alone") as engine:
        assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
        assert len(engine.tally.exits) == 3
        engine.use("quick")
        exits = [answer.exit for answer in engine.predict(TEXTS)]
        assert 4 in exits
        assert len(engine.tally.exits) == 4
        assert engine.tally.rows == 2 * len(TEXTS)
        engine.use("alone")
        assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
        assert len(engine.trace(TEXTS).logits) == 3


def test_what_was_built_again_after_the_load_does_not_run(two_passes: Callable[..., Path]) -> None:
    folder = two_passes(alone=Budget(exit=2))
    with Engine.load(folder, operating_point="alone") as engine:
        graph = read_manifest(folder).precisions["int8"]["segment_01"]
        shutil.copy(folder / read_manifest(folder).graphs["segment_01"].file, folder / graph.file)
        rebuilt(folder)
        engine.use("quick")
        with pytest.raises(ArtifactError, match=r"segment_01.onnx is damaged"):
            engine.predict(TEXTS)


def test_without_a_point_of_one_pass_the_default_rule_runs(
    two_passes: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = two_passes()
    missing(folder)
    with Engine.load(folder) as engine:
        assert engine.operating_point is None
        assert engine.predict(TEXTS)
    assert "the default rule of the folder runs instead of operating point quick" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "tensorrt-rtx"}, "expected a target of the same library"),
        ({}, "names no point without a quick pass, but 'alone'"),
    ],
)
def test_folders_whose_passes_do_not_fit_are_refused(
    change: dict[str, Any], says: str, two_passes: Callable[..., Path]
) -> None:
    folder = two_passes(alone=Budget(exit=2))
    content = json.loads((folder / "manifest.json").read_text())
    content["targets"][QUICK] |= change
    if not change:
        del content["targets"][EXACT]["operating_points"]["alone"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=says):
        read_manifest(folder)


def test_a_target_that_is_not_finite_is_named(
    two_passes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = HostExecution.enqueue

    def spoiled(execution: Any, hidden: Any) -> Any:
        outputs = enqueue(execution, hidden)
        return lambda: outputs() * np.nan

    with Engine.load(two_passes()) as engine:
        monkeypatch.setattr(HostExecution, "enqueue", spoiled)
        with pytest.raises(BackendError, match=f"target {QUICK} gives logits"):
            engine.predict(TEXTS)


def test_documents_in_doubt_run_together(
    ranking_engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although they reached the end of the quick pass in several groups, before it was decided."""
    folder = Path(shutil.copytree(ranking_engines["bert"], tmp_path / "engines"))
    add_quick_pass(folder, TopK(top=3, threshold=(-99.0, -99.0, 0.0, 0.0)))
    begun = []
    with Engine.load(folder) as engine:
        quick, exact = engine.core.in_use.legs
        limits = dataclasses.replace(quick.limits, group_tokens=60)
        small = dataclasses.replace(quick, limits=limits)
        engine.core.in_use = dataclasses.replace(engine.core.in_use, legs=(small, exact))
        begin = HostExecution.begin

        def noted(execution: Any, encoded: Any, bucket: Any) -> Any:
            begun.append(len(encoded))
            return begin(execution, encoded, bucket)

        monkeypatch.setattr(HostExecution, "begin", noted)
        engine.rank("rain", TEXTS)
    assert len(begun) > 3
    assert begun[-1] == 3, "those that are returned, in one group"


def test_a_scheduler_goes_on_while_the_point_is_changed(two_passes: Callable[..., Path]) -> None:
    folder = two_passes(alone=Budget(exit=2))
    with Engine.load(folder, operating_point="alone") as engine, engine.core.chain() as chain:
        rows = engine.core.encode(TEXTS)
        chain.borrow(Group.of(np.arange(len(rows)), rows, engine.core.in_use, np.inf))
        engine.use("quick")
        group = Group.of(np.arange(len(rows)), rows, engine.core.in_use, np.inf)
        exits = {decision.exit for decision in chain.run(group)}
    assert exits == {1, 2, 3, 4}


@pytest.mark.parametrize("option", [("--full-depth",), ("--rule", "budget exit=2")])
def test_a_run_in_the_exact_target_only_counts_no_quick_pass(
    option: tuple[str, ...], two_passes: Callable[..., Path], tmp_path: Path
) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    output = ("-o", tmp_path / "out.jsonl", "--json")
    result = invoke(main, two_passes(), texts, *option, *output)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stderr)
    depth = 2 if "--rule" in option else 3
    assert {each["exit"]: each["rows"] for each in summary["exits"]} == {
        number: len(TEXTS) * (number == depth) for number in (1, 2, 3)
    }
    assert (summary["mean_depth"], summary["saving"]) == (depth, 1 - depth / 3)
    assert "quick_target" not in summary


def test_the_folder_says_that_it_needs_the_new_version(two_passes: Callable[..., Path]) -> None:
    folder = two_passes(alone=Budget(exit=3))
    path = folder / "manifest.json"
    assert json.loads(path.read_text())["schema_version"] == "1.1"
    engines = EnginesFolder.read(folder)
    target = engines.manifest.targets[EXACT]
    alone = {"alone": target.operating_points["alone"]}
    without = msgspec.structs.replace(
        target, operating_points=alone, default_operating_point="alone"
    )
    engines.with_target(EXACT, without).write()
    written = json.loads(path.read_text())
    assert written["schema_version"] == "1.0"
    assert "quick" not in path.read_text()


def rebuilt(folder: Path) -> str:
    engines = EnginesFolder.read(folder)
    target = engines.manifest.targets[QUICK]
    versions = {**target.versions, "onnxruntime": "0.1"}
    engines.with_target(QUICK, msgspec.structs.replace(target, versions=versions)).write()
    return f"its quick pass runs in target {QUICK}, which was built again since the point"


def missing(folder: Path) -> str:
    engines = EnginesFolder.read(folder)
    engines.keep_targets(lambda name, _: name != QUICK).write()
    return f"its quick pass runs in target {QUICK}, which the folder does not have"


def lost(folder: Path) -> str:
    graphs = read_manifest(folder).precisions["int8"]
    (folder / graphs["segment_01"].file).unlink()
    return f"{folder}/onnx/int8/segment_01.onnx is missing"


@pytest.mark.parametrize("spoil", [rebuilt, missing, lost])
def test_a_quick_pass_without_its_promise_never_runs(
    spoil: Callable[[Path], str],
    two_passes: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = two_passes(alone=Budget(exit=2))
    problem = spoil(folder)
    for target, point in ((EXACT, None), (None, "quick")):
        with pytest.raises(RuleError, match="has no promise here") as error:
            Engine.load(folder, target, point)
        assert problem in str(error.value)
        assert "without a quick pass (alone)" in str(error.value)
    with Engine.load(folder) as engine:
        assert engine.operating_point == "alone"
        assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
        with pytest.raises(RuleError, match="has no promise here"):
            engine.use("quick")
    assert f"alone runs instead of operating point quick: {problem}" in caplog.text


def test_a_damaged_exact_target_fails_only_rows_in_doubt(
    two_passes: Callable[..., Path],
) -> None:
    folder = two_passes()
    with Engine.load(folder) as engine:
        expected = [answer.exit for answer in engine.predict(TEXTS)]
    (folder / read_manifest(folder).graphs["segment_02"].file).write_bytes(b"damaged")
    with Engine.load(folder, check=False) as engine, Scheduler(engine) as scheduler:
        futures = scheduler.submit_all(TEXTS)
        errors = [future.exception() for future in futures]
    assert [error is not None for error in errors] == [exit == 4 for exit in expected]


def test_runs_and_metrics_count_both_passes(
    two_passes: Callable[..., Path], tmp_path: Path
) -> None:
    folder = two_passes(alone=Budget(exit=2))
    lines = [{"text": text} for text in TEXTS]
    texts = write_lines(tmp_path / "texts.jsonl", lines)
    with Engine.load(folder) as engine:
        expected = [answer.exit for answer in engine.predict(TEXTS)]
        metrics = Metrics(engine)
        assert b"fpabee_drift" in metrics.text()
        engine.use("alone")
        assert b"fpabee_drift" in metrics.text(), "a point with fewer exits than the engine"
        assert b'fpabee_rows_total{exit="4"} 0.0' in metrics.text()
    result = invoke(main, folder, texts, "-o", tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["exit"] for record in records] == expected
    assert {record["layer"] for record in records if record["exit"] == 4} == {3}
    summary = json.loads(result.stderr)
    counts = np.bincount(expected, minlength=5)[1:]
    assert [each["rows"] for each in summary["exits"]] == counts.tolist()
    layers = counts @ np.array([1, 2, 3, 6]) / len(TEXTS)
    assert summary["mean_depth"] == pytest.approx(layers)
    assert summary["saving"] is None
    assert summary["quick_target"] == QUICK
    assert summary["doubt_share"] == counts[-1] / len(TEXTS)
    shown = invoke(main, folder, texts, "-o", tmp_path / "again.jsonl").stderr
    assert f"first in {QUICK}; {counts[-1] / len(TEXTS):.1%} were in doubt and ran" in shown
    table = [line.split()[:4] for line in shown.splitlines()]
    assert ["3", "3", f"{counts[2]}", f"{counts[2] / len(TEXTS):.1%}"] in table
    assert ["4", "3", "(exact", "pass)"] in table
