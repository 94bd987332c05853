"""Routes: a rule together with the exits that it was made for, and what runs them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import (
    BackendError,
    Budget,
    CheckError,
    Confidence,
    Engine,
    Entropy,
    FPabee,
    RuleError,
    TopK,
    read_manifest,
)
from fpabee.runtime.artifact.exits import exits_of
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.host import HostBackend
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.core import check_target
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.metrics import Metrics
from fpabee.runtime.targets import open_backend

from ...conftest import QUICK, WORDS, add_quick_pass
from ..running import until
from ..test_engine_check import swap_logits

TEXTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(40)]
EXACT = "onnxruntime-fp32"
RULE = Confidence(threshold=(0.9, 0.8, 0.75, 0.0))
ALONE = Budget(exit=2)


@pytest.fixture
def folder(engine_copy: Callable[..., Path]) -> Path:
    """A folder with a point in one pass, and one with a quick pass."""
    folder = engine_copy("bert")
    add_quick_pass(folder, RULE, alone=ALONE)
    return folder


def group_of(engine: Engine) -> Group:
    rows = engine.core.encode(TEXTS)
    return Group.of(np.arange(len(rows)), rows, engine.core.in_use, np.inf)


def test_a_route_has_the_exits_of_its_legs(folder: Path) -> None:
    with Engine.load(folder) as engine:
        core = engine.core
        route = core.in_use
        manifest = engine.manifest
        assert (route.point, route.rule) == ("quick", RULE)
        assert route.exits == exits_of(manifest, QUICK)
        assert core.full_depth.exits == exits_of(manifest)
        assert [leg.backend.name for leg in route.legs] == [QUICK, EXACT]
        assert [leg.backend.name for leg in core.full_depth.legs] == [EXACT]
        whole = route.whole
        assert (whole.exits, whole.legs, whole.point) == (route.exits, route.legs, None)
        assert whole.rule == Budget(exit=4)
        own = core.route(rule=FPabee(threshold=0.2))
        assert (own.exits, own.legs) == (core.full_depth.exits, core.full_depth.legs)
        assert core.route() is route
        assert core.route("quick") is route
        alone = core.route("alone")
        assert core.route("alone") is alone
        assert core.in_use is route, "asking for another one does not swap"
        assert core.route(full_depth=True) is core.full_depth


def test_rows_of_calls_with_the_same_last_exit_share_a_route(folder: Path) -> None:
    with Engine.load(folder) as engine:
        core = engine.core
        capped = core.route(max_exit=2)
        assert core.route(max_exit=2) is capped
        assert core.route(max_exit=3) is not capped
        assert (capped.rule.max_exit, capped.point) == (2, None)
        assert capped.exits == core.in_use.exits
        for bad in (5, -1, 2.5, "2", True, [2]):
            for _ in range(2):
                with pytest.raises(RuleError):
                    core.route(max_exit=bad)  # type: ignore[arg-type]
        engine.use("alone")
        assert core.route(max_exit=2) is not capped


def test_a_rule_of_a_caller_is_one_for_the_exact_pass(engine_copy: Callable[..., Path]) -> None:
    """Also if it equals that of the point, which has a quick pass."""
    folder = engine_copy("bert")
    rule = Entropy(threshold=0.3)
    add_quick_pass(folder, rule)
    with Engine.load(folder, EXACT, rule=rule) as engine:
        expected = [(answer.exit, answer.logits) for answer in engine.predict(TEXTS)]
    with Engine.load(folder) as engine:
        assert engine.rule == rule
        found = engine.predict(TEXTS, rule=engine.rule)
        assert [(answer.exit, answer.logits) for answer in found] == expected
        assert max(answer.exit for answer in engine.predict(TEXTS)) == 4
        assert engine.trace(TEXTS, rule=engine.rule).logits.shape[0] == 3
        assert engine.trace(TEXTS).logits.shape[0] == 4


def test_a_rule_of_other_exits_says_which_passes_it_was_made_for(folder: Path) -> None:
    with Engine.load(folder) as engine:
        for call in (engine.predict, engine.trace):
            with pytest.raises(RuleError) as error:
                call(TEXTS, rule=engine.rule)
            assert "has 4 thresholds, but the model has 3 exits" in error.value.message
            assert (
                f"is made for a pass in {QUICK}, then a pass in {EXACT}, and `rule` takes rules "
                f"for a pass in {EXACT}"
            ) in error.value.message
            assert "leave out `rule`" in error.value.hint
        engine.use("alone")
        with pytest.raises(RuleError, match=f"is made for a pass in {QUICK}, then"):
            engine.predict(TEXTS, rule=RULE)
        with pytest.raises(RuleError) as error:
            engine.predict(TEXTS, rule=Budget(exit=9))
        assert "made for" not in error.value.message


def test_points_are_swapped_while_calls_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call has the answers of one of the points, whatever is in use when it ends."""
    with Engine.load(folder) as engine:
        quick = [answer.exit for answer in engine.predict(TEXTS)]
    assert 4 in quick
    allowed = {tuple(quick), (2,) * len(TEXTS)}
    monkeypatch.setattr(HostBackend, "most_executions", 1)
    seen: set[tuple[int, ...]] = set()
    errors: list[Exception] = []
    stop = threading.Event()
    with Engine.load(folder, operating_point="alone") as engine, Scheduler(engine) as scheduler:

        def call(ask: Callable[[], list[Any]]) -> None:
            try:
                while not stop.is_set():
                    seen.add(tuple(answer.exit for answer in ask()))
            except Exception as error:  # noqa: BLE001 - it is reported below
                errors.append(error)

        def schedule() -> list[Any]:
            return [future.result(60) for future in scheduler.submit_all(TEXTS)]

        asks = [lambda: engine.predict(TEXTS), lambda: engine.predict(TEXTS), schedule]
        threads = [threading.Thread(target=call, args=(ask,)) for ask in asks]
        for thread in threads:
            thread.start()
        for number in range(30):
            engine.use(("quick", "alone")[number % 2])
            rows = engine.tally.rows
            until(lambda rows=rows: errors or engine.tally.rows > rows)  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
        tallies = engine.core.tallies
        of_quick = tallies.of(engine.core.route("quick").exits)
        of_alone = tallies.of(engine.core.route("alone").exits)
        total = engine.tally
    assert not errors
    assert seen == allowed
    assert of_alone.exits == (0, of_alone.rows, 0)
    shares = np.bincount(quick, minlength=5)[1:] / len(TEXTS)
    np.testing.assert_allclose(of_quick.shares, shares)
    assert total.rows == of_quick.rows + of_alone.rows


def test_calls_never_wait_for_each_other_in_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that began before the quick pass was opened, and one that began afterwards."""
    monkeypatch.setattr(HostBackend, "most_executions", 1)
    monkeypatch.setattr("fpabee.runtime.backends.base._PATIENCE_SECONDS", 5.0)
    answers: list[Any] = []
    with Engine.load(folder, operating_point="alone") as engine:
        with engine.core.chain() as chain:
            chain.borrow(group_of(engine))  # the exact pass
            engine.use("quick")
            other = threading.Thread(target=lambda: answers.extend(engine.predict(TEXTS)))
            other.start()
            until(lambda: engine.core.backend.is_awaited)
            # The other call has borrowed nothing, so the quick pass is free for this one.
            exits = {decision.exit for decision in chain.run(group_of(engine))}
        other.join()
    assert exits == {1, 2, 3, 4}
    assert len(answers) == len(TEXTS)


def test_what_runs_the_exact_pass_is_borrowed_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = []
    check_out = HostBackend.check_out

    def noted(backend: HostBackend) -> Any:
        lent.append(backend.name)
        return check_out(backend)

    with Engine.load(folder) as engine:
        monkeypatch.setattr(HostBackend, "check_out", noted)
        engine.predict(TEXTS)
        assert lent == [EXACT, QUICK]
        for alone in ({"full_depth": True}, {"rule": ALONE}):
            lent.clear()
            engine.predict(TEXTS, **alone)
            assert lent == [EXACT], "there is no other pass"


def test_a_point_that_cannot_be_opened_leaves_the_old_one_in_use(folder: Path) -> None:
    with Engine.load(folder, operating_point="alone") as engine:
        route = engine.core.in_use
        graphs = read_manifest(folder).precisions["int8"]
        (folder / graphs["segment_01"].file).unlink()
        with pytest.raises(RuleError, match=r"no promise here.*; point 'alone' stays in use ->"):
            engine.use("quick")
        with pytest.raises(RuleError, match=r"has: alone, quick; point 'alone' stays in use ->"):
            engine.use("slow")
        assert engine.core.in_use is route
        assert [*engine.core.backends] == [EXACT]
        assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
        assert len(engine.tally.exits) == 3


def test_exits_of_different_passes_are_counted_apart(folder: Path) -> None:
    with Engine.load(folder) as engine:
        expected = [answer.exit for answer in engine.predict(TEXTS)]
        metrics = Metrics(engine)
        point = engine.manifest.targets[EXACT].operating_points["quick"]
        counts = tuple(np.bincount(expected, minlength=5)[1:].tolist())
        drift = engine.tally.drift(point.exits)
        assert f"fpabee_drift {drift!r}".encode() in metrics.text()
        engine.predict(TEXTS, full_depth=True)
        assert f"fpabee_drift {drift!r}".encode() in metrics.text(), "no row of this point"
        core = engine.core
        assert core.tallies.of(core.in_use.exits).exits == counts
        assert core.tallies.of(core.full_depth.exits).exits == (0, 0, len(TEXTS))
        total = list(counts)
        total[2] += len(TEXTS)
        assert engine.tally.exits == tuple(total)
        assert engine.reset_tally().exits == tuple(total)
        assert engine.tally.exits == (0,) * 4


def test_groups_of_different_routes_are_not_joined(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostBackend, "joins", True)
    with Engine.load(folder) as engine:
        expected = {most: engine.predict(TEXTS, max_exit=most) for most in (1, 2, 3)}
        usual = engine.predict(TEXTS)
        with Scheduler(engine) as scheduler:
            futures = {
                most: [scheduler.submit(text, max_exit=most) for text in TEXTS]
                for most in (1, 2, 3, None)
            }
            found = {
                most: [each.result(60).exit for each in some] for most, some in futures.items()
            }
    assert found.pop(None) == [answer.exit for answer in usual]
    assert found == {
        most: [answer.exit for answer in answers] for most, answers in expected.items()
    }


def test_a_backend_is_checked_without_an_engine(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy("bert", exit_0=True)
    engines = EnginesFolder.read(folder)
    with Engine.load(folder) as engine:
        expected = str(engine.check())

        def refuse(*_: object) -> None:
            raise AssertionError("an engine is made")

        monkeypatch.setattr(Engine, "__init__", refuse)
        agreement = check_target(engines, engine.core.backend, engine.rule)
        assert agreement.passed
        assert str(agreement) == expected
        _, logits = read_reference(engines)
        swap_logits(folder, -logits)
        with pytest.raises(CheckError, match=f"target {EXACT} is not the model"):
            check_target(EnginesFolder.read(folder), engine.core.backend)
    closed = open_backend(engines, EXACT)
    closed.close()
    with pytest.raises(BackendError, match="closed"):
        check_target(engines, closed)


def test_documents_of_a_query_keep_their_route(
    ranking_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    """A query that began before the swap ends on its own route."""
    folder = Path(shutil.copytree(ranking_engines["bert"], tmp_path / "engines"))
    rule = TopK(top=3, threshold=(-0.3, -0.2, -0.1, 0.0))
    add_quick_pass(folder, rule, alone=TopK(top=3, threshold=(-0.3, -0.2, 0.0)))
    with Engine.load(folder, operating_point="alone") as engine:
        rows = engine.core.encode([("rain", text) for text in TEXTS[:20]])
        route = engine.core.route()
        before = engine.core.rank(rows, route, with_left=True)
        engine.use("quick")
        assert engine.core.rank(rows, route, with_left=True) == before
        assert max(each.exit for each in engine.rank("rain", TEXTS[:20])) == 4
