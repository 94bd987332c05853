"""The comparison of rerankers: what trains them, in which order graphs see it, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rerankers
from conversions import ROUNDS
from numpy.typing import NDArray
from rerankers import BASELINE, REFERENCE, pairs, table, times

from fpabee.runtime import Query


def query(text: str, documents: Sequence[str], right: int | None) -> Query:
    return Query(text, tuple(documents), None, {"right": right}, "a row")


def test_each_right_document_comes_with_others_of_its_query_in_batches_of_similar_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rerankers, "BATCH", 5)
    lengths = range(10, 110, 5)
    queries = [query(f"query {n}", [f"{n} " * length for length in lengths], n) for n in range(20)]
    queries.append(query("nothing is right", ["a"] * len(lengths), None))

    def length(row: dict[str, Any]) -> int:
        return len(row["document"].split())

    rows = pairs(queries, length)
    for number, each in enumerate(queries[:20]):
        mine = [row for row in rows if row["query"] == each.text]
        assert len({row["document"] for row in mine}) == 1 + rerankers.NEGATIVES
        assert [row["document"] for row in mine if row["label"]] == [each.documents[number]]
    assert len(rows) == 20 * (1 + rerankers.NEGATIVES)
    batches = [sorted(map(length, rows[start : start + 5])) for start in range(0, 100, 5)]
    assert sum(batch[-1] - batch[0] for batch in batches) < 100 < sum(map(max, batches))


def test_a_graph_sees_documents_by_length_and_ranks_them_by_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def runner(*_: object) -> Any:
        def predict(texts: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
            seen.append([document for _, document in texts])
            return np.array([[float(document[-1])] for _, document in texts], np.float32)

        return predict

    monkeypatch.setattr(rerankers, "graph_runner", runner)
    rank = rerankers.graph_ranker(Path("model"), Path("file"), openvino=True)
    asked = query("query", ["long 1", "3", "mid 9", "7", "long 3"], None)
    assert rank(asked) == [2, 3, 1, 4, 0]
    assert seen == [["3", "7", "mid 9", "long 1", "long 3"]]


def test_the_table_says_what_was_found() -> None:
    best = {
        REFERENCE: [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 1, 2]],
        BASELINE: [[2, 0, 1, 3], [4, 5, 7, 6], [8, 9, 1, 2]],
    }
    rounds = {
        BASELINE: {
            "median": [3.0, 3.0, 9.0],
            "p99": [5.0, 6.0, 7.0],
            "documents_per_s": [10.0, 20.0, 30.0],
        }
    }
    lines = list(table(best, rounds, [2, 5, None]))
    # The right documents are the third, the second and none; then the first and the second.
    assert f"| `{REFERENCE}` | {(1 / 3 + 1 / 2) / 3:.3f} | 100.0% |  |  |  |  |  |" in lines
    assert f"| `{BASELINE}` | 0.500 | 66.7% | 3 | 6 | 20 | 1.00 | 1.00 |" in lines


def test_systems_take_turns() -> None:
    calls: list[str] = []

    def ranker(name: str) -> rerankers.Ranker:
        def rank(query: Query) -> list[int]:
            calls.append(name)
            return []

        return rank

    rounds = times({name: ranker(name) for name in "ab"}, [query("q", ["d"], 0)] * 2)
    assert "".join(calls) == "aabb" * (ROUNDS + 1)
    assert {len(numbers) for of in rounds.values() for numbers in of.values()} == {ROUNDS}
