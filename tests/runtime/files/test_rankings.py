"""Rankings of queries: `fpabee-run` with a reranker, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fpabee.runtime import Engine, Ranked

from ..running import Run, check_refused, write_lines
from ..test_ranking import QUERY, documents
from .test_output_schema import VALIDATOR
from .test_resume import fail_at

SETS = [documents(40), documents(1, 1), [], documents(12, 2), ["", "the sun", "the sun"]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"query": QUERY, "documents": some, "id": n} for n, some in enumerate(SETS)]
    rows[0] |= {"scores": [0.5] * 40, "labels": [{"a": 1}], "text_pair": 3, "index": 9, "error": 1}
    return write_lines(tmp_path / "queries.jsonl", *rows)


def results(ranking: list[Ranked]) -> list[dict[str, Any]]:
    return [
        {"index": each.index, "score": round(each.score, 6), "exit": each.exit} for each in ranking
    ]


def test_records(run: Run, ranker: Path, source: Path) -> None:
    found = run(ranker, source, "--quiet")
    assert (found.code, found.err) == (0, "")
    with Engine.load(ranker) as engine:
        for number, (record, some) in enumerate(zip(found.records, SETS, strict=True)):
            VALIDATOR.validate(record)
            ranking = engine.rank(QUERY, some, all=True)
            passed = {"labels": [{"a": 1}], "text_pair": 3} if number == 0 else {}
            assert record == {"index": number, "id": number, "results": results(ranking), **passed}
    first = found.records[0]["results"]
    assert len({each["exit"] for each in first}) > 1
    assert [each["exit"] for each in first[:3]] == [3, 3, 3]


def test_a_classifier_takes_no_queries(run: Run, bert: Path, source: Path) -> None:
    check_refused(run(bert, source, "--quiet"), "line 1 is a query with documents", "reranker")


def test_scores_of_the_search_are_used(run: Run, scored_ranker: Path, source: Path) -> None:
    scores = [float(n % 7) for n in range(40)]
    some = {"query": QUERY, "documents": SETS[0]}
    queries = write_lines(source.with_name("scored.jsonl"), some | {"scores": scores}, some)
    found = run(scored_ranker, queries)
    with Engine.load(scored_ranker) as engine:
        for record, known in zip(found.records, (scores, None), strict=True):
            VALIDATOR.validate(record)
            ranking = engine.rank(QUERY, SETS[0], scores=known, all=True)
            assert record["results"] == results(ranking)
    with_scores, without = (
        {each["exit"] for each in record["results"]} for record in found.records
    )
    assert (0 in with_scores, 0 in without) == (True, False)


def test_options(run: Run, ranker: Path, source: Path, tmp_path: Path) -> None:
    usual = run(ranker, source, "--quiet").records
    whole = run(ranker, source, "--full-depth", "--with-text", "--quiet").records
    assert {each["exit"] for record in whole for each in record["results"]} == {3}
    assert [record["query"] for record in whole] == [QUERY] * len(SETS)
    for record, all_layers in zip(usual, whole, strict=True):
        scores = {each["index"]: each["score"] for each in all_layers["results"]}
        for each in record["results"]:
            if each["exit"] == 3:
                assert each["score"] == pytest.approx(scores[each["index"]], abs=1e-5)
    short = run(ranker, source, "--max-length", "8").records
    truncated = [each.get("truncated", False) for each in short[0]["results"]]
    assert any(truncated)
    assert not all(truncated)
    named = write_lines(tmp_path / "named.jsonl", {"question": QUERY, "documents": SETS[0]})
    found = run(ranker, named, "--column", "text=question", "--quiet")
    assert found.records[0]["results"] == usual[0]["results"]
    piped = run(ranker, "-", "--quiet", stdin=source.read_bytes())
    assert piped.records == usual


def test_summary(run: Run, ranker: Path, source: Path) -> None:
    found = run(ranker, source)
    count = sum(map(len, SETS))
    assert f"{len(SETS)} queries with {count} documents in" in found.err
    assert "documents/s) on onnxruntime-fp32, operating point changed-5: rule top-k" in found.err
    assert "exit  layer  documents  share" in found.err
    assert "1 empty" in found.err
    told = json.loads(run(ranker, source, "--json").err)
    assert told.pop("seconds") > 0
    assert told.pop("documents_per_second") > 0
    exits = [each["exit"] for record in found.records for each in record["results"]]
    assert told["exits"] == [
        {"exit": number, "layer": number, "documents": exits.count(number)} for number in (1, 2, 3)
    ]
    assert told["mean_depth"] == pytest.approx(sum(exits) / count)
    assert (told["queries"], told["documents"], told["empty"]) == (len(SETS), count, 1)
    assert "rows" not in told


def test_a_resumed_run_gives_the_same_rankings_and_the_same_summary(
    run: Run, ranker: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = source.with_name("out.jsonl")
    whole = json.loads(run(ranker, source, "--output", output, "--json").err)
    expected = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        assert "3 finished rows" in run(ranker, source, "--output", output).err
    changed = run(ranker, source, "--output", output, "--resume", "--full-depth")
    check_refused(changed, "full depth")
    resumed = json.loads(run(ranker, source, "--output", output, "--resume", "--json").err)
    assert output.read_bytes() == expected
    assert (resumed["queries_before"], whole["queries_before"]) == (3, 0)
    for name in ("queries", "documents", "exits", "mean_depth", "empty", "truncated"):
        assert resumed[name] == whole[name]


def test_skipped_queries_are_records_of_their_errors(
    run: Run, ranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.runtime.core._QUERY_BYTES", 2**16)
    good = {"query": QUERY, "documents": documents(5)}
    bad = [{"query": QUERY}, good | {"scores": [1]}, good | {"documents": ["the sun"] * 500}]
    source = write_lines(tmp_path / "in.jsonl", good, *bad, good)
    found = run(ranker, source, "--on-error", "skip")
    assert found.code == 0
    assert [sorted(record) for record in found.records] == [
        ["index", "results"],
        *[["error", "index"]] * 3,
        ["index", "results"],
    ]
    for number, record in enumerate(found.records):
        VALIDATOR.validate(record)
        assert "error" not in record or f"line {number + 1}" in record["error"]
    assert "3 queries could not be used" in found.err
    assert "500 documents" in found.records[3]["error"]


def test_the_schema_knows_rankings() -> None:
    good = {"index": 0, "results": [{"index": 3, "score": -2.5, "exit": 1, "truncated": True}]}
    VALIDATOR.validate(good | {"query": "a", "id": 5})
    for bad in ({"index": 0, "exit": 3}, {"index": 0, "score": 1.0}, {"index": 0}):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate({"index": 0, "results": [bad]})
