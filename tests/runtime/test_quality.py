"""Metrics are those of scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fpabee.runtime.quality import evaluate

answers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
flags = st.lists(st.integers(0, 1), min_size=3, max_size=3)
sets = st.lists(st.tuples(flags, flags), min_size=1, max_size=20)


@given(answers)
def test_single_label_scores(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = np.array(pairs).T
    scores = evaluate(predicted, expected, labels=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of rows with one label only
        wanted = {
            "accuracy": accuracy_score(expected, predicted),
            "macro_f1": f1_score(expected, predicted, average="macro", zero_division=0),
            "matthews": matthews_corrcoef(expected, predicted),
        }
    assert scores == pytest.approx(wanted, abs=1e-12)


@given(sets)
def test_multi_label_scores(pairs: list[tuple[list[int], list[int]]]) -> None:
    predicted = np.array([pair[0] for pair in pairs])
    expected = np.array([pair[1] for pair in pairs])
    assert evaluate(predicted, expected, labels=3) == pytest.approx(
        {
            "exact_match": accuracy_score(expected, predicted),
            "micro_f1": f1_score(expected, predicted, average="micro", zero_division=0),
            "macro_f1": f1_score(expected, predicted, average="macro", zero_division=0),
        },
        abs=1e-12,
    )
