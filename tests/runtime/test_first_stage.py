"""What scores of a search say about documents before layer 1, and which scores are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime import EncodedRow, InputError
from fpabee.runtime.artifact.manifest import FirstStageSpec
from fpabee.runtime.first_stage import FirstStage, checked_scores, features

LARGEST = float(np.finfo(np.float32).max)
STAGE = FirstStage(FirstStageSpec(weights=(0.5, 0.25, -0.125), bias=0.1))
scores = st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=20)


def test_features_are_distances_from_the_best_and_from_the_mean_and_the_rank() -> None:
    known = features([3.0, 5.0, 3.0, 1.0])
    expected = [
        [-2.0, 0.0, np.log(2)],
        [0.0, np.sqrt(2), 0.0],
        [-2.0, 0.0, np.log(2)],
        [-4.0, -np.sqrt(2), np.log(4)],
    ]
    np.testing.assert_allclose(known, expected, atol=1e-12)


@pytest.mark.parametrize("equal", [[7.5], [0.1] * 9, [LARGEST] * 3])
def test_equal_scores_say_nothing(equal: list[float]) -> None:
    assert STAGE.predict(equal).tolist() == [np.float32(0.1)] * len(equal)


@given(scores)
def test_predictions_are_finite_and_follow_the_scores(some: list[float]) -> None:
    predicted = STAGE.predict(some)
    assert np.isfinite(predicted).all()
    order = np.argsort(some, kind="stable")
    assert (np.diff(predicted[order]) >= 0).all()


def test_the_largest_weights_and_scores_give_finite_logits() -> None:
    spec = FirstStageSpec(weights=(1e30, -1e30, 1e30), bias=-1e30)
    predicted = FirstStage(spec).predict([-LARGEST, 0.0, LARGEST])
    with np.errstate(all="raise"):
        assert np.isfinite(1 / (1 + np.exp(-predicted.astype(np.float64)))).all()


def test_rows_carry_what_their_scores_predict() -> None:
    ids = np.arange(3)
    rows = [EncodedRow(ids, ids, truncated=False), EncodedRow(ids, ids, truncated=True)]
    attached = STAGE.attach(rows, [1.0, 2.0])
    assert STAGE(attached)[:, 0].tolist() == STAGE.predict([1.0, 2.0]).tolist()
    assert [row.truncated for row in attached] == [False, True]
    assert STAGE(rows).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("good", [(1, 2.5), [1e38, -1e38], np.array([1.0, 2.0], np.float32)])
def test_numbers_of_any_kind_are_scores(good: Any) -> None:
    assert checked_scores(good, 2) == tuple(map(float, good))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([1.0], "1 values"),
        ([1.0, 2.0, 3.0], "3 values"),
        (1.0, "no list"),
        ("12", "no list"),
        (None, "no list"),
        ([1.0, float("nan")], "score nan"),
        ([1.0, float("inf")], "score inf"),
        ([1.0, 1e39], r"score 1e\+39"),
        ([1.0, 10**400], "score 1000"),
        ([1.0, True], "score True"),
        ([1.0, "2"], "score '2'"),
        ([1.0, None], "score None"),
        (np.ones((2, 1)), "score array"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_scores_are_refused(bad: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        checked_scores(bad, 2)
    assert "2 documents" in caught.value.hint
