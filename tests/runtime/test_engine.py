"""The engine: batching, order, padding and threads do not change an answer."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fpabee
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    Confidence,
    Energy,
    Engine,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    FpabeeError,
    InputError,
    Measure,
    Pabee,
    Pcee,
    Prediction,
    RuleError,
    Simulation,
    Trace,
    encoding,
    read_manifest,
    simulate,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import buffers, host
from fpabee.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fpabee.runtime.encoding import Text

from ..closeness import (
    assert_close,
    assert_exits,
    assert_probabilities,
    exits_may_differ,
    labels_may_differ,
)

FAMILIES = ("bert", "albert", "mpnet")
RULES: tuple[ExitRule, ...] = (
    *(FPabee(threshold=1.2, measure=measure) for measure in Measure),
    FPabee(threshold=3.0, patience=2),
    Pabee(patience=1),
    Pabee(patience=1, min_exit=3),
    Entropy(threshold=1.1),
    Entropy(threshold=2.5, max_exit=2),
    Confidence(threshold=0.55),
    Energy(threshold=0.2),
    Pcee(threshold=0.8, patience=2),
    Epee(threshold=0.7, patience=1),
    Budget(exit=2),
)
RULES_WITH_EXIT_0: tuple[ExitRule, ...] = (
    *(msgspec.structs.replace(rule, exit_0_threshold=0.6) for rule in RULES),
    FPabee(threshold=1.2),
    Pabee(patience=1),
    Pabee(patience=2, exit_0_threshold=0.9, min_exit=1),
    Budget(exit=0),
    Entropy(threshold=1.1, max_exit=0),
)

Rows = list[Text]


def _texts() -> Rows:
    words = ("the", "a", "it", "not", "good", "bad", "film", "plot", "music", "play", "rain")
    choose = random.Random(3)
    texts: Rows = [" ".join(choose.choices(words, k=choose.randint(1, 28))) for _ in range(40)]
    texts += [(str(texts[n]), str(texts[n + 1])) for n in range(8)]
    return [*texts, "", ("", ""), ("the", ""), "é 東京 😀", "the film " * 100]


TEXTS = _texts()


class Case:
    """An engine of one family, and the logits of every text when it runs alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine.load(folder)
        self.task = self.engine.manifest.task
        self.first_exit = self.engine.manifest.exits[0]
        self.rules = RULES if self.first_exit == 1 else RULES_WITH_EXIT_0
        self.alone = np.concatenate([self.engine.trace([text]).logits for text in TEXTS], axis=1)

    def simulate(self, logits: Any, rule: ExitRule) -> Simulation:
        return simulate(logits, rule, self.task.problem_type, first_exit=self.first_exit)

    def near(self, rule: ExitRule) -> NDArray[np.bool_]:
        """Texts whose exit may differ."""
        return exits_may_differ(self.alone, rule, self.task, self.first_exit)


@pytest.fixture(scope="module", params=[*FAMILIES, "bert with exit 0", "mpnet with exit 0"])
def case(
    request: pytest.FixtureRequest,
    engines: Mapping[str, Path],
    exit_0_engines: Mapping[str, Path],
) -> Iterator[Case]:
    family, *more = request.param.split(maxsplit=1)
    case = Case((exit_0_engines if more else engines)[family])
    yield case
    case.engine.close()


@pytest.fixture(scope="module")
def bert(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"]) as engine:
        yield engine


@contextmanager
def tuned(
    folder: Path,
    *,
    group_tokens: int = 1024,
    max_batch: int = 256,
    window_tokens: int = 1,
    chunk: int = 256,
    joins: bool = False,
) -> Iterator[Engine]:
    """An engine with other sizes of groups and windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_GROUP_TOKENS", group_tokens)
        patch.setattr(host, "_MAX_BATCH", max_batch)
        width = 8 * read_manifest(folder).model.hidden_size
        patch.setattr("fpabee.runtime.core._WINDOW_BYTES", window_tokens * width)
        patch.setattr(encoding, "_CHUNK_TEXTS", chunk)
        patch.setattr(host.HostBackend, "joins", joins)
        with Engine.load(folder) as engine:
            yield engine


def reached(trace: Trace) -> NDArray[np.bool_]:
    """Exits that rows reached, `[exits, rows]`."""
    return trace.first_exit + np.arange(len(trace.logits))[:, None] <= trace.exits


def check(case: Case, trace: Trace, numbers: list[int], rule: ExitRule) -> int:
    """Compare a live run with each row alone; returns how many exits differ, all near ties."""
    ran = reached(trace)
    assert_close(trace.logits, np.where(ran[..., None], case.alone[:, numbers], np.nan))
    expected = case.simulate(case.alone, rule)
    near = case.near(rule)[numbers]
    differ = trace.exits != expected.exits[numbers]
    assert not (differ & ~near).any()
    ties = labels_may_differ(case.alone, case.task)
    ties = ties[expected.exits - case.first_exit, range(len(TEXTS))]
    alike = ~differ & ~ties[numbers]
    np.testing.assert_array_equal(trace.predictions[alike], expected.predictions[numbers][alike])
    return int(differ.sum())


@settings(deadline=None, max_examples=40)
@given(
    numbers=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=60),
    data=st.data(),
    group_tokens=st.sampled_from([1, 40, 150, 1024]),
    max_batch=st.sampled_from([1, 3, 256]),
    window_tokens=st.sampled_from([1, 300, 10**6]),
    chunk=st.sampled_from([1, 7, 256]),
    joins=st.booleans(),
)
def test_a_row_gets_the_same_answer_as_alone(
    case: Case, numbers: list[int], data: st.DataObject, joins: bool, **sizes: int
) -> None:
    rule = data.draw(st.sampled_from(case.rules))
    with tuned(case.folder, joins=joins, **sizes) as engine:
        trace = engine.trace([TEXTS[number] for number in numbers], rule=rule)
        check(case, trace, numbers, rule)
        simulated = case.simulate(trace.logits, rule)
        np.testing.assert_array_equal(simulated.exits, trace.exits)
        np.testing.assert_array_equal(simulated.predictions, trace.predictions)


def test_the_rules_of_these_tests_use_every_exit(case: Case) -> None:
    exits = [case.simulate(case.alone, rule).exits for rule in case.rules]
    assert set(np.concatenate(exits).tolist()) == {case.first_exit, 1, 2, 3}
    mixed = [len(set(row.tolist())) > 1 for row in exits]
    assert sum(mixed) >= 5
    assert max(case.near(rule).sum() for rule in case.rules) <= 2, "rows near a threshold are few"


def test_full_depth_runs_every_layer(case: Case) -> None:
    trace = case.engine.trace(TEXTS)
    assert trace.logits.dtype == np.float32
    assert_close(trace.logits, case.alone)
    assert (trace.exits == 3).all()
    assert trace.lengths.tolist() == [len(row) for row in case.engine.core.encode(TEXTS)]
    full = case.engine.predict(TEXTS, full_depth=True)
    assert {(prediction.exit, prediction.layer) for prediction in full} == {(3, 3)}
    assert [prediction.truncated for prediction in full] == [False] * (len(TEXTS) - 1) + [True]


def test_predictions_match_the_trace(case: Case) -> None:
    rule = Confidence(threshold=0.55)
    predictions = case.engine.predict(TEXTS, rule=rule)
    assert_exits([p.exit for p in predictions], case.alone, rule, case.task, case.first_exit)
    for row, prediction in enumerate(predictions):
        assert_close(prediction.logits, case.alone[prediction.exit - case.first_exit, row])
        z = np.array(prediction.logits)
        if case.engine.multi_label:
            p = 1 / (1 + np.exp(-z))
            chosen = [n for n, value in enumerate(z) if value > 0]
        else:
            p = np.exp(z) / np.exp(z).sum()
            chosen = [int(z.argmax())]
        assert prediction.labels == tuple(case.engine.labels[n] for n in chosen)
        assert prediction.probabilities == pytest.approx(p.tolist(), abs=1e-9)
        assert prediction.scores == tuple(prediction.probabilities[n] for n in chosen)
        assert prediction.layer == prediction.exit


def test_no_texts_give_no_predictions(case: Case) -> None:
    engine = case.engine
    assert engine.predict([]) == []
    assert list(engine.stream(iter(()))) == []
    for trace in (engine.trace([]), engine.trace([], rule=Pabee(patience=1))):
        labels = len(engine.labels)
        assert trace.logits.shape == (len(engine.manifest.exits), 0, labels)
        assert trace.exits.shape == trace.lengths.shape == (0,)
        assert trace.predictions.shape == ((0, labels) if engine.multi_label else (0,))


def test_four_threads_agree_with_one(case: Case) -> None:
    rule = Entropy(threshold=1.1)
    lists = [random.Random(seed).sample(TEXTS, 30) for seed in range(4)]
    with tuned(case.folder, group_tokens=100) as engine:
        start = threading.Barrier(4)

        def work(texts: Rows) -> list[Prediction]:
            start.wait()
            return [p for _ in range(3) for p in engine.predict(texts, rule=rule)]

        # Segments are loaded by whichever thread comes first.
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, lists))
    near = {TEXTS[n] for n in np.flatnonzero(case.near(rule))}
    for texts, found in zip(lists, together, strict=True):
        alone = case.engine.predict(texts, rule=rule)
        for text, one, other in zip(texts * 3, alone * 3, found, strict=True):
            if text not in near:
                assert (other.labels, other.exit) == (one.labels, one.exit)
                assert_probabilities(other.probabilities, one)


@pytest.mark.parametrize("joins", [False, True])
def test_streams_read_no_further_than_a_window_ahead(
    engines: Mapping[str, Path], joins: bool
) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for number in range(300):
            read += 1
            yield "the film " * (number % 5)

    sizes = {"group_tokens": 50, "window_tokens": 100, "chunk": 4}
    with tuned(engines["bert"], joins=joins, **sizes) as engine:
        ahead = []
        for given_back, _ in enumerate(engine.stream(texts())):
            ahead.append(read - given_back)
    assert len(ahead) == read == 300
    # A window of 100 tokens holds at most 50 rows of 2; the chunk of 4 texts may be read.
    assert max(ahead) <= 54
    assert ahead[0] < 50


def test_rows_count_as_much_memory_as_they_take(engines: Mapping[str, Path]) -> None:
    """All rows of a group share a position bias, which is small for short rows."""
    for family, heads in (("bert", 0), ("mpnet", 4)):
        with Engine.load(engines[family]) as engine:
            manifest = engine.manifest
            limits = engine.core.limits
        for tokens in (1, 8, 32):
            rows = limits.group_tokens // tokens
            row = tokens * manifest.model.hidden_size  # in fp32
            bias = heads * tokens**2
            hidden = 8 * (row * rows + bias) // rows
            assert buffers.row_bytes(manifest, limits, tokens) == hidden + 16 * tokens


def test_an_engine_shows_its_folder_its_target_and_its_point(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder = engine_copy()
    with Engine.load(folder) as engine:
        assert repr(engine) == f"<Engine '{folder}', onnxruntime-fp32, no operating point>"
    set_points(folder, fast=FPabee(threshold=0.3))
    with Engine.load(folder, operating_point="fast") as engine:
        assert repr(engine) == f"<Engine '{folder}', onnxruntime-fp32, fast>"


def test_a_folder_whose_length_leaves_no_room_is_to_be_exported_again(
    engine_copy: Callable[..., Path],
) -> None:
    """A `max_length` given to the load could not be more."""
    engines = EnginesFolder.read(engine_copy())
    tokenizer = msgspec.structs.replace(engines.manifest.tokenizer, max_length=1)
    engines.with_manifest(tokenizer=tokenizer).write()
    for max_length in (None, 64):
        with pytest.raises(ArtifactError, match=r"export .* again: give `max_length` of at least"):
            Engine.load(engines.path, max_length=max_length)


def test_a_closed_engine_says_so(engines: Mapping[str, Path]) -> None:
    with Engine.load(engines["bert"]) as engine:
        assert engine.predict(["the"])
    for call in (engine.predict, engine.trace):
        with pytest.raises(BackendError, match=r"this engine is closed.*Engine\.load"):
            call(["the"])
    engine.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 1},
        {"rule": Budget(exit=9)},
    ],
)
def test_a_failed_load_frees_what_it_opened(
    settings: dict[str, Any], engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(OnnxRuntimeBackend, "close", lambda backend: closed.append(backend.name))
    with pytest.raises(FpabeeError):
        Engine.load(engines["bert"], **settings)
    assert closed == ["onnxruntime-fp32"]


def test_one_string_instead_of_texts_is_refused(bert: Engine) -> None:
    for call in (bert.predict, bert.trace):
        with pytest.raises(InputError, match=r"one string.*\[text\]"):
            call("turn on the light")


def test_memory_of_free_buffers_is_bounded(engines: Mapping[str, Path]) -> None:
    texts = ["the " * n for n in range(1, 40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.HostBackend, "free_bytes", 100_000)
        with Engine.load(engines["bert"]) as engine:
            found = [engine.trace([text]).logits for text in texts]
            execution: Any = engine.core.backend.check_out()
            engine.core.backend.give_back(execution)
            unused = execution._unused
            free = [each for part in unused.values() for each in part]
            assert 0 < execution._unused_bytes <= 100_000
            assert execution._unused_bytes == sum(each.nbytes for each in free)
            oldest, *_, newest = (bucket for bucket, part in unused.items() if part)
            assert newest.sequence == 41
            for tokens in (oldest.sequence, oldest.sequence - 2):  # the second was dropped before
                engine.trace([texts[tokens - 3]])
            assert unused[oldest], "it was used more recently than others"
    with Engine.load(engines["bert"]) as engine:
        usual = engine.trace(texts).logits
    assert_close(np.concatenate(found, axis=1), usual)


def test_segments_are_loaded_when_the_first_row_runs(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy("bert")
    path = folder / read_manifest(folder).graphs["segment_03"].file
    content = path.read_bytes()
    path.write_bytes(b"damaged")
    with Engine.load(folder) as engine:
        with pytest.raises(ArtifactError, match=r"segment_03\.onnx is damaged"):
            engine.predict(TEXTS, rule=Budget(exit=1))
        path.write_bytes(content)
        engine.predict(TEXTS)
        session = weakref.ref(engine.core.backend.graph("segment_01"))
    gc.collect()
    assert session() is None, "closing frees the session"
    path.write_bytes(b"damaged")
    with (
        Engine.load(folder) as engine,
        pytest.raises(ArtifactError, match=r"segment_03\.onnx is damaged"),
    ):
        engine.warm_up(tokens=1)


def test_a_rule_that_does_not_fit_is_refused_at_once(
    bert: Engine, engines: Mapping[str, Path]
) -> None:
    named: Any = "fpabee"
    for rule, says in (
        (Budget(exit=4), "exit is 4, but the exits of the model are 1 to 3"),
        (named, r"the rule is 'fpabee', a str -> .*FPabee\(threshold="),
    ):
        for call in (
            lambda rule: Engine.load(engines["bert"], rule=rule),
            lambda rule: bert.predict(["the"], rule=rule, max_exit=2),
            lambda rule: bert.trace(["the"], rule=rule),
        ):
            with pytest.raises(RuleError, match=says):
                call(rule)


def test_the_rule_of_a_call_replaces_that_of_the_engine_and_of_the_folder(
    bert: Engine, engines: Mapping[str, Path]
) -> None:
    assert bert.rule == ExitRule.from_dict(bert.manifest.default_rule)
    with Engine.load(engines["bert"], rule=Budget(exit=2)) as engine:
        assert engine.rule == Budget(exit=2)
        assert [p.exit for p in engine.predict(["the"])] == [2]
        assert [p.exit for p in engine.predict(["the"], rule=Budget(exit=1))] == [1]
        assert [p.exit for p in engine.predict(["the"], full_depth=True)] == [3]


def test_operating_points(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder = engine_copy("bert")
    with pytest.raises(RuleError, match="operating point 'fast' and a rule are given"):
        Engine.load(folder, operating_point="fast", rule=Budget(exit=1))
    with pytest.raises(RuleError, match="has no operating point 'fast'; it has: none yet"):
        Engine.load(folder, operating_point="fast")
    set_points(folder, default="safe", fast=Budget(exit=1), safe=Budget(exit=3))
    with Engine.load(folder) as engine:
        assert engine.operating_point == "safe"
        assert [p.exit for p in engine.predict(["the"])] == [3]
        engine.use("fast")
        assert (engine.operating_point, engine.rule) == ("fast", Budget(exit=1))
        assert [p.exit for p in engine.predict(["the"])] == [1]
        with pytest.raises(
            RuleError, match=r"'slow'; it has: fast, safe; point 'fast' stays in use -> name one"
        ):
            engine.use("slow")
        with pytest.raises(RuleError, match="has no operating point ''"):
            engine.use("")
        assert engine.operating_point == "fast"
    with Engine.load(folder, rule=Budget(exit=2)) as engine:
        assert (engine.operating_point, engine.rule) == (None, Budget(exit=2))


def test_a_stored_rule_that_cannot_be_used_is_named(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy(fast=Budget(exit=99))
    with pytest.raises(RuleError, match=r"point 'fast' of target onnxruntime-fp32 .* exit is 99"):
        Engine.load(folder, operating_point="fast")


def test_a_point_of_another_target_is_refused(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy(target="other", default="fast", fast=Budget(exit=1))
    manifest = read_manifest(folder)
    here = manifest.default_target
    with pytest.raises(
        RuleError, match=f"target {here} has no .* 'fast', but other has; it has: n"
    ):
        Engine.load(folder, operating_point="fast")
    with Engine.load(folder) as engine:
        assert engine.operating_point is None
        assert engine.rule == ExitRule.from_dict(manifest.default_rule)


def test_label_thresholds_of_the_manifest_are_applied(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy("mpnet")
    manifest = read_manifest(folder)
    label_thresholds = (0.0, 1.0, 0.5, 0.2, 0.8)
    task = msgspec.structs.replace(manifest.task, label_thresholds=label_thresholds)
    EnginesFolder(folder, manifest).with_manifest(task=task).write()
    rule = Pabee(patience=1)
    with Engine.load(folder, rule=rule) as engine:
        predictions = engine.predict(TEXTS)
        trace = engine.trace(TEXTS, rule=rule)
    for prediction in predictions:
        above = np.array(prediction.probabilities) > label_thresholds
        assert prediction.labels == tuple(np.array(task.labels)[above].tolist())
    simulated = simulate(trace.logits, rule, task.problem_type, label_thresholds)
    np.testing.assert_array_equal(simulated.exits, trace.exits)
    np.testing.assert_array_equal(simulated.predictions, trace.predictions)
    plain = simulate(trace.logits, rule, task.problem_type)
    assert (plain.predictions != simulated.predictions).any()


def test_predicting_needs_no_torch_transformers_or_onnx(engines: Mapping[str, Path]) -> None:
    code = (
        "import sys\n"
        "from fpabee.runtime import Engine\n"
        "with Engine.load(sys.argv[1]) as engine:\n"
        "    assert len(engine.predict(['the', ('a', 'film')])) == 2\n"
        "    assert engine.trace(['the']).logits.shape == (3, 1, 4)\n"
        "print(*sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(engines["bert"])],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["onnxruntime"]


def test_one_text_has_one_answer(engines: Mapping[str, Path]) -> None:
    with fpabee.Engine.load(engines["bert"]) as engine:
        assert isinstance(engine, Engine)
        for text in ("play music", ("play", "music")):
            assert engine(text) == engine.predict([text])[0]
        with pytest.raises(InputError, match="text 0 has the type int"):
            engine(3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'engine_of'"):
        fpabee.engine_of  # noqa: B018
