"""Conversions of a tiny reranker: what they deal, teach, write, promise and refuse."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fpabee.calibration import Bound, calibrate
from fpabee.calibration.ranking import Queries
from fpabee.calibration.timing import time_queries
from fpabee.exporter import export
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.convert import Conversion, ConvertOptions, convert, ranking, states, workflow
from fpabee.exporter.convert.classification import Classification
from fpabee.exporter.convert.ranking import Ranking
from fpabee.exporter.convert.task import Passes
from fpabee.exporter.single_file import pack
from fpabee.exporter.training.options import TrainOptions
from fpabee.runtime import Activation, Budget, Engine, ExitRule, ReadOptions, TopK
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import ProblemType, Task
from fpabee.runtime.errors import InputError, RowError
from fpabee.runtime.files import Row
from fpabee.runtime.first_stage import features

from ...closeness import assert_exported
from ...programs import spy, write_lines
from .conftest import INT8, QUERIES, Converted, convert_and_note, make_reranker, quickly

TOP = 2
OPTIONS = ConvertOptions(bound=Bound(changed_answers=0.1), top=TOP)
TASK = Task(problem_type=ProblemType.RANKING, labels=("score",))


@pytest.fixture(scope="module")
def converted(reranker: Path, queries: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A conversion of the reranker. Read-only."""
    folder = tmp_path_factory.mktemp("converted") / "engines"
    return convert_and_note(reranker, queries, folder, OPTIONS)


def queries_of(converted: Converted) -> tuple[Queries, Queries]:
    """The queries that certified, and those that were reported on."""
    certifying, report = converted.calls["calibrate_ranking"].args[2:4]
    return certifying, report


def taught_of(converted: Converted) -> list[Row]:
    """The query and the document of each row that taught the heads."""
    (job,) = converted.calls["_too_few"].args
    return [job.rows[number] for number in converted.calls["train_heads"].args[2].rows]


def scores_of(reranker: Path, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """The logits of a reranker, one pair at a time."""
    load: Any = AutoModelForSequenceClassification.from_pretrained
    model = load(reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    with torch.no_grad():
        every = [model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0] for pair in pairs]
    return torch.stack(every).numpy()


def test_a_reranker_whose_scores_hardly_differ_is_named(queries: Path) -> None:
    """Rounding alone changes the best documents of more queries than may change."""
    spread = np.random.default_rng(0).normal(size=(9 * 320, 1)).astype(np.float32)
    warnings = []
    for scale in (1e-5, 1.0):
        job = Ranking(queries, OPTIONS)
        job.check_possible(TASK, 3 + scale * spread[: len(job.rows)])
        warnings.append(" ".join(job.warnings))
    assert "the ranking is not stable to begin with: in " in warnings[0]
    assert "not stable" not in warnings[1]


def test_queries_are_dealt_with_all_their_documents(converted: Converted) -> None:
    parts = converted.result.parts
    assert sum(parts) == converted.result.texts == len(QUERIES)
    assert converted.result.rows == len(QUERIES) + len(QUERIES[::10])
    certifying, report = queries_of(converted)
    certified = {query.text for query in certifying.queries}
    reported = {query.text for query in report.queries}
    rows = taught_of(converted)
    taught = {row.text for row in rows}
    assert certified.isdisjoint(taught)
    assert reported.isdisjoint(taught | certified)
    assert [len(certified), len(reported)] == [*parts[2:]]
    assert len(taught) == parts[0] + parts[1]
    documents = {query["query"]: query["documents"] for query in QUERIES}
    for query in certifying.queries:
        assert list(query.documents) == documents[query.text]
    assert len(rows) == sum(len(documents[text]) for text in taught)


def test_heads_learn_the_logits_and_the_best_documents_count_more(
    converted: Converted, reranker: Path
) -> None:
    lesson = converted.calls["train_heads"].args[3]
    rows = taught_of(converted)[:40]
    expected = scores_of(reranker, [(row.text, row.text_pair or "") for row in rows])
    assert_exported(lesson.targets[:40] * lesson.deviation + lesson.mean, expected[:, None])
    first = [number for number, row in enumerate(rows) if row.text == rows[0].text]
    own = expected[first]
    near = np.isin(np.arange(len(own)), np.argsort(-own)[: 2 * TOP])
    assert lesson.weights[first].tolist() == np.where(near, 5.0, 1.0).tolist()
    assert not near.all()


def test_the_result_is_what_the_engine_does(converted: Converted, reranker: Path) -> None:
    (point,) = converted.result.rankings
    assert point.certificate is not None
    assert converted.result.targets == ()
    assert converted.result.traffic is None
    assert isinstance(point.rule, TopK)
    assert len(point.rule.threshold) == len(converted.result.exit_layers)  # type: ignore[arg-type]
    assert len(converted.result.chosen.errors) == len(converted.result.exit_layers) - 1
    assert point.chosen_on.mean_depth < 3
    manifest = read_manifest(converted.folder)
    assert manifest.exit_0 is None
    assert manifest.task == TASK
    assert ExitRule.from_dict(manifest.default_rule) == Budget(exit=manifest.exits[-1])
    changed = 0
    _, report = queries_of(converted)
    with Engine.load(converted.folder) as engine:
        assert engine.operating_point == point.name == "changed-10"
        for query in report.queries:
            found = engine.rank(query.text, query.documents)
            logits = scores_of(reranker, query.pairs)
            assert len(found) == min(TOP, len(query.documents))
            best = np.argsort(-logits, kind="stable")[:TOP]
            changed += {each.index for each in found} != {*best.tolist()}
            expected = 1 / (1 + np.exp(-logits[[each.index for each in found]]))
            assert_exported([each.score for each in found], expected)
    assert changed == point.held_out.changed_answers
    assert point.held_out.rows == len(report.queries)


@pytest.mark.usefixtures("with_int8")
def test_documents_run_in_int8_first_where_that_takes_less_time(
    converted: Converted,
    reranker: Path,
    queries: Path,
    convert_here: Callable[..., Conversion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranges of int8 come from the pairs of queries that train."""
    build = spy(monkeypatch, workflow, "build_targets")
    measured: dict[Passes, float] = {}
    measure = Ranking.saved

    def saved(self: Any, uncertified: Any, ways: Sequence[Passes], progress: Any) -> list[float]:
        shares = measure(self, uncertified, ways, progress)
        measured.update(zip(ways, shares, strict=True))
        return [float(bool(way.quick)) for way in ways]

    monkeypatch.setattr(Ranking, "saved", saved)
    result = convert_here(OPTIONS, file=queries, model=reranker)
    assert [*measured] == [Passes("onnxruntime-fp32"), Passes("onnxruntime-fp32", INT8)]
    assert all(share < 1 for share in measured.values())
    (point,) = result.rankings
    assert point.target == "onnxruntime-fp32"
    pairs = [pair for call in build.call_args_list for pair in call.args[2]]
    assert {query for query, _ in pairs} == {row.text for row in taught_of(converted)}
    assert point.certificate is not None
    assert point.quick_target == INT8
    assert point.batches == {}, "no packed file has a quick pass"
    written = read_manifest(result.folder).targets[point.target].operating_points
    alone = f"{point.name}-one-pass"
    assert [*written] == [alone, point.name]
    with Engine.load(result.folder) as engine:
        assert len(engine.core.in_use.legs) == 2
        for query in QUERIES[:5]:
            text, documents = query["query"], query["documents"]
            exact = {
                each.index: each.score
                for each in engine.rank(str(text), documents, full_depth=True)
            }
            for each in engine.rank(str(text), documents):
                assert_exported([each.score], [exact[each.index]])


def test_the_order_at_full_depth_is_that_of_sentence_transformers(
    converted: Converted, reranker: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.CrossEncoder(str(reranker), device="cpu")
    long = " ".join(["music and weather"] * 60)
    with Engine.load(converted.folder) as engine:
        for query in (QUERIES[0], QUERIES[3], {"query": "play", "documents": [long, "rain", ""]}):
            text, documents = query["query"], query["documents"]
            expected = model.rank(text, documents)
            found = engine.rank(str(text), documents, full_depth=True)
            assert [each.index for each in found] == [each["corpus_id"] for each in expected]
            assert_exported([each.score for each in found], [each["score"] for each in expected])


def test_a_model_dir_keeps_the_activation(tiny_models: Any, tmp_path: Path, quick: None) -> None:
    source = make_reranker(tiny_models["bert"], tmp_path / "reranker", identity=True)
    file = write(tmp_path, QUERIES)
    kept: list[Path] = []

    def progress(what: str, *_: int) -> None:
        if what.startswith("segment") and not kept:
            (steps,) = (tmp_path / "out.partial").iterdir()
            kept.append(Path(shutil.copytree(steps / "model", tmp_path / "model_dir")))

    convert(source, file, tmp_path / "out", OPTIONS, progress)
    model = load_checkpoint(kept[0])
    assert model.exit_config.problem_type is ProblemType.RANKING
    assert model.exit_config.labels == ("score",)
    manifest = export(kept[0], tmp_path / "again").manifest
    assert manifest.task.activation is Activation.IDENTITY
    assert ExitRule.from_dict(manifest.default_rule) == Budget(exit=manifest.exits[-1])
    query = QUERIES[0]
    with Engine.load(tmp_path / "out") as engine:
        (best, *_) = engine.rank(str(query["query"]), query["documents"], full_depth=True)
    logits = scores_of(source, [(str(query["query"]), each) for each in query["documents"]])
    assert_exported([best.score], [logits.max()])


def test_train_queries_train_and_those_that_certify_are_left_out(
    reranker: Path, tmp_path: Path
) -> None:
    texts, others = QUERIES[:150], QUERIES[140:]
    train_texts = write_lines(tmp_path / "others.jsonl", others)
    job = Ranking(write(tmp_path, texts), replace(OPTIONS, train_texts=train_texts))
    train, choose, certify, report = job.texts.sizes
    assert train + choose == len(QUERIES) - 150
    assert certify + report == 150
    assert job.texts.removed == 10


def write(tmp_path: Path, rows: Sequence[object]) -> Path:
    return write_lines(tmp_path / "queries.jsonl", rows)


def test_queries_without_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    empty = [{"query": f"nothing {n}", "documents": []} for n in range(3)]
    job = Ranking(write(tmp_path, [*QUERIES, *empty]), OPTIONS)
    assert len(job.texts.units) == len(QUERIES)
    assert job.warnings == ["3 queries have no documents"]


def test_many_queries_that_cannot_change_are_said(tmp_path: Path) -> None:
    short = [{**query, "documents": query["documents"][:TOP]} for query in QUERIES[:100]]
    job = Ranking(write(tmp_path, [*short, *QUERIES[100:]]), OPTIONS)
    (warning,) = job.warnings
    fixed = sum(len(job.texts.units[n].documents) <= TOP for n in job.texts.calibrate)
    assert f"{fixed} of {len(job.texts.calibrate)} queries that certify" in warning


Give = Callable[[Path], tuple[Path, ConvertOptions]]


def options(**changes: Any) -> Give:
    return lambda tmp_path: (write(tmp_path, QUERIES), replace(OPTIONS, **changes))


def rows(*given: object) -> Give:
    return lambda tmp_path: (write(tmp_path, given), OPTIONS)


MISSED = Bound(missed=0.1, thresholds={"score": 0.5})
FEW = r"1\d\d of 320 distinct queries certify, and 299 are the least; about 800 distinct queries"
REFUSED: dict[str, tuple[Give, str]] = {
    "missed texts": (options(bound=MISSED), "not about rankings -> bound `changed_answers`"),
    "a group": (options(group_column="id"), "belong together.* -> leave out `group_column`"),
    "a column": (options(reading=ReadOptions(text_column="q")), "fields query, documents and sc"),
    "a large top": (options(top=8), "no more than 8 documents.* -> give a smaller `top`"),
    "few queries": (options(bound=Bound(changed_answers=0.01)), FEW),
    "no documents at all": (rows({"query": "a", "documents": []}), "there are no queries"),
    "equal queries": (rows(*QUERIES[:1] * 9), "all 9 queries are equal"),
    "texts": (rows({"text": "play music"}), 'no string field "query"'),
    "no list": (rows({"query": "a", "documents": "b"}), "no list of texts in 'documents'"),
    "no scores": (rows({"query": "a", "documents": ["b"], "scores": []}), "0 values in 'scores'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_promised_is_refused_before_the_model_is_loaded(
    case: str, reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, message = REFUSED[case]
    monkeypatch.setattr(workflow, "Classifier", lambda *_: 1 / 0)
    texts, wanted = give(tmp_path)
    with pytest.raises((InputError, RowError), match=message) as caught:
        convert(reranker, texts, tmp_path / "engines", wanted)
    assert caught.value.hint
    assert not (tmp_path / "engines").exists()


def test_each_task_has_its_own_bound_and_its_own_options(
    queries: Path, texts: Path, telling: Any, tmp_path: Path
) -> None:
    usual = ConvertOptions()
    assert Ranking(queries, replace(usual, top=TOP)).bound == Bound(changed_answers=0.05)
    assert Classification(texts, usual).bound == Bound(changed_answers=0.01)
    with pytest.raises(InputError, match="`top` is given, but the model classifies"):
        convert(telling["single_label_classification"], texts, tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="top is 0 -> give a whole number from 1"):
        ConvertOptions(top=0)


def test_a_converted_reranker_is_packed_with_its_rule(converted: Converted, tmp_path: Path) -> None:
    packed = pack(converted.folder, tmp_path / "one", "onnxruntime-fp32")
    assert packed.operating_point == "changed-10"
    assert isinstance(packed.rule, TopK)
    assert packed.rule.top == TOP


@pytest.fixture(scope="module")
def scored(
    converted: Converted, reranker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Conversion:
    """The same conversion with scores, which say something of the logits. Read-only."""
    place = tmp_path_factory.mktemp("scored")
    drawn = np.random.default_rng(0)
    pairs = [(query["query"], each) for query in QUERIES for each in query["documents"]]
    with Engine.load(converted.folder) as engine:
        logits = engine.trace(pairs).logits[-1, :, 0]  # type: ignore[arg-type]
    scores = iter((20 + 3 * logits + drawn.normal(scale=0.3, size=len(logits))).tolist())
    rows = [{**query, "scores": [next(scores) for _ in query["documents"]]} for query in QUERIES]
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        return convert(reranker, write(place, rows), place / "engines", OPTIONS)


def test_scores_of_a_search_become_exit_0(
    scored: Conversion, converted: Converted, tmp_path: Path
) -> None:
    (point,) = scored.rankings
    (without,) = converted.result.rankings
    assert point.certificate is not None
    assert isinstance(point.rule, TopK)
    assert point.rule.exit_0_threshold is not None
    assert point.chosen_on.exits[0] > 0
    assert point.chosen_on.mean_depth < without.chosen_on.mean_depth
    assert {len(each.exits) for each in (point.chosen_on, *point.batches.values())} == {
        len(scored.exit_layers)
    }
    assert {each.exits[0] for each in point.batches.values()} == {0}
    manifest = read_manifest(scored.folder)
    assert manifest.first_stage is not None
    assert manifest.exit_layers == scored.exit_layers
    assert scored.exit_layers[0] == 0
    # What scores predict is about the logits.
    documents = [str(each) for each in QUERIES[0]["documents"]]
    with Engine.load(scored.folder) as engine:
        assert engine.check().passed
        logits = engine.trace([(str(QUERIES[0]["query"]), each) for each in documents]).logits
        scores = (20 + 3 * logits[-1, :, 0]).tolist()
        assert engine.core.first_stage is not None
        predicted = engine.core.first_stage.predict(scores)
        assert np.corrcoef(predicted, logits[-1, :, 0])[0, 1] > 0.9
        found = engine.rank(str(QUERIES[0]["query"]), documents, scores=scores, all=True)
        assert 0 in {each.exit for each in found}


def test_a_file_has_the_promise_but_not_the_scores(scored: Conversion, tmp_path: Path) -> None:
    packed = pack(scored.folder, tmp_path / "one", "onnxruntime-fp32")
    assert packed.operating_point == "changed-10"
    assert isinstance(packed.rule, TopK)
    assert packed.rule.exit_0_threshold is None
    assert packed.exits == range(1, len(scored.exit_layers))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "which this file does not take" in card


def test_queries_that_do_not_fit_are_left_out(
    reranker: Path,
    convert_here: Callable[..., Conversion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the disk holds the states of some queries only, the others have no logits."""
    monkeypatch.setattr(states, "_MOST_BYTES", 400_000)
    heads = spy(monkeypatch, workflow, "train_heads")
    drawn = np.random.default_rng(0)
    rows = [
        {**query, "scores": drawn.normal(size=len(query["documents"])).tolist()}
        for query in QUERIES
    ]
    result = convert_here(OPTIONS, file=write(tmp_path, rows), model=reranker)
    (point,) = result.rankings
    assert isinstance(point.rule, TopK)
    assert point.certificate is not None
    first_stage = read_manifest(tmp_path / "engines").first_stage
    assert first_stage is not None
    assert np.isfinite([*first_stage.weights, first_stage.bias]).all()
    seen = sum(len(call.args[2].rows) for call in heads.call_args_list)
    assert 0 < seen < sum(len(query["documents"]) for query in QUERIES) / 2
    fitting = re.search(r"exits learned from (\d+) of the (\d+) queries", result.warnings[0])
    assert fitting is not None
    train, choose, *_ = result.parts
    assert 0 < int(fitting[1]) < int(fitting[2]) == train + choose


@given(st.integers(0, 2**32 - 1))
def test_a_better_score_never_predicts_less(seed: int) -> None:
    """Of the solutions that rise with the score, it is the one with the least error."""
    drawn = np.random.default_rng(seed)
    scores = drawn.normal(size=30)
    known = features(scores.tolist())
    targets = drawn.normal(size=30) + drawn.normal() * scores
    weights = drawn.uniform(0.1, 5.0, 30)
    of_features, bias = ranking._rising(known, targets, weights)
    predicted = known @ np.array(of_features) + bias
    assert (np.diff(predicted[np.argsort(scores)]) >= -1e-9).all()
    signs = np.array([1.0, 1.0, -1.0])
    library = LinearRegression(positive=True).fit(known * signs, targets, weights)
    np.testing.assert_allclose(predicted, library.predict(known * signs), atol=1e-6)


def test_scores_of_some_queries_only_are_passed_over(tmp_path: Path) -> None:
    some = [{**query, "scores": [1.0] * len(query["documents"])} for query in QUERIES[:7]]
    job = Ranking(write(tmp_path, [*some, *QUERIES[7:]]), OPTIONS)
    (warning,) = job.warnings
    assert "only 7 of 320 queries have scores" in warning
    assert not job.has_scores
    every = [{**query, "scores": [1.0] * len(query["documents"])} for query in QUERIES]
    assert Ranking(write(tmp_path, every), OPTIONS).has_scores


def test_what_is_not_for_rerankers_refuses_them(converted: Converted) -> None:
    with pytest.raises(InputError, match="is a reranker"):
        calibrate(converted.folder, [])
    with pytest.raises(InputError, match="rerankers cannot be trained here"):
        TrainOptions("train", "dev", "model", problem_type=ProblemType.RANKING)


def test_queries_that_are_too_large_to_rank_are_not_timed(
    converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = queries_of(converted)
    queries = report.queries
    sizes = sorted(len(query.documents) for query in queries)
    with Engine.load(converted.folder) as engine:
        fits = engine.core.is_query_possible
        most = sizes[len(sizes) // 2]
        monkeypatch.setattr(engine.core, "is_query_possible", lambda rows: len(rows) <= most)
        assert time_queries(engine, queries, engine.rule).documents == most
        monkeypatch.setattr(engine.core, "is_query_possible", fits)
        monkeypatch.setattr("fpabee.runtime.core._QUERY_BYTES", 1)
        with pytest.raises(InputError, match="give fewer documents"):
            time_queries(engine, queries, engine.rule)
