"""One run gives the logits of the classifier, and what the heads of a model with exits see."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer

from fpabee.calibration.progress import silent
from fpabee.exporter.convert import states as states_module
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.convert.states import Taught, _at_once, _batches, _new_file, run_classifier
from fpabee.exporter.exit_config import Pooling
from fpabee.exporter.model import by_row, predict
from fpabee.exporter.training.examples import encoded_rows
from fpabee.runtime.check import REQUIREMENTS
from fpabee.runtime.encoding import EncodedRow
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import Row

from ...closeness import assert_close, assert_exported
from .conftest import KINDS, TEXTS

PADDING = {"input_ids": 0}


def encoded(ids: NDArray[np.int64]) -> EncodedRow:
    return EncodedRow(ids, np.zeros_like(ids), truncated=False)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_see_in_training_what_they_see_in_the_model(
    kind: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    classifier = Classifier(make(kind))
    tokenizer = AutoTokenizer.from_pretrained(classifier.folder)
    rows = encoded_rows([Row(text) for text in TEXTS[:40]], tokenizer, 32)
    taught = np.array([3, 39, 0, 17])
    logits, states = run_classifier(classifier, rows, PADDING, Taught(taught, 2), tmp_path, silent)
    expected = predict(classifier.model, rows, PADDING, lambda output: output.logits)
    assert_exported(logits, expected)
    assert states.rows.tolist() == taught.tolist()
    assert states.lengths.tolist() == [len(rows[number]) for number in taught]
    assert states.tokens.shape == (states.lengths.sum(), 2, 32)
    tokens, weights = states.batch(np.arange(4))
    for pooling, queries in ((Pooling.BOTH, 0), (Pooling.FIRST, 0), (Pooling.ATTENTION, 3)):
        config = replace(
            classifier.exit_config((1, 2), pooling),
            hidden_layers=2,
            hidden_width=5,
            queries=queries,
        )
        model = classifier.multi_exit(config).eval()
        every = predict(model, [rows[number] for number in taught], PADDING, by_row)
        for number, head in enumerate(model.parts[2][:2]):
            head.norm = nn.Identity()  # the states are normalised already
            with torch.no_grad():
                found = head(tokens[number], weights)
            assert_close(found, every[:, number], REQUIREMENTS["fp16"].tie)
        assert_exported(every[:, 2], logits[taught])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs one part at a time")
def test_parts_run_at_once_with_fewer_threads_each() -> None:
    before = torch.get_num_threads()
    meeting = threading.Barrier(3, timeout=20)
    asked = []

    def run(numbers: NDArray[np.intp]) -> NDArray[np.float32]:
        meeting.wait()  # of all workers
        asked.append(torch.get_num_threads())
        return numbers.astype(np.float32)

    torch.set_num_threads(9)
    try:
        parts = np.split(np.arange(24), 12)
        outputs = list(_at_once(run, parts))
        assert torch.get_num_threads() == 9
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(outputs, parts)
    assert asked == [3] * 12


def test_batches_have_each_row_once_and_few_tokens() -> None:
    lengths = np.random.default_rng(0).permutation([*range(1, 301), 5000])
    numbers = np.arange(1, 301)
    batches = _batches(numbers, lengths)
    assert sorted(np.concatenate(batches)) == numbers.tolist()
    assert max(map(len, batches)) == 32
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 4096


def test_an_error_of_a_part_is_raised_and_the_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(_at_once(lambda numbers: np.zeros(1 // int(numbers[0]), np.float32), [np.array([0])]))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("most_tokens", "kept", "lengths"),
    [(1000, [0, 1, 2, 3], [40, 3, 33, 36]), (108, [0, 1, 2, 3], [36, 3, 33, 36]),
     (99, [0, 1, 2, 3], [32, 3, 32, 32]), (70, [0, 2], [32, 32])],
)  # fmt: skip
def test_states_are_bounded(
    most_tokens: int,
    kept: list[int],
    lengths: list[int],
    classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_lengths = np.array([40, 5, 3, 33, 36])
    rows = [encoded(np.arange(4, 4 + length)) for length in all_lengths]
    taught = np.array([0, 2, 3, 4])
    monkeypatch.setattr(states_module, "_MOST_BYTES", most_tokens * 2 * 2 * 32)
    _, states = run_classifier(classifier, rows, PADDING, Taught(taught, 2), tmp_path, silent)
    assert states.rows.tolist() == taught[kept].tolist()
    assert states.lengths.tolist() == lengths
    ids = torch.from_numpy(rows[0].input_ids)[None]
    with torch.no_grad():
        hidden = classifier.model(ids, output_hidden_states=True).hidden_states
    place = np.arange(lengths[0]) * 40 // lengths[0]
    found = states.tokens[: lengths[0], 1].astype(np.float32)
    np.testing.assert_allclose(found, hidden[2][0, place], rtol=1e-3, atol=1e-3)


def test_a_unit_takes_part_with_all_its_rows_and_others_are_not_run(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [encoded(np.arange(4, 4 + length)) for length in (9, 8, 7, 6, 5, 4, 3, 2)]
    monkeypatch.setattr(states_module, "_MOST_BYTES", 25 * 2 * 2 * 32)
    taught = Taught(
        np.array([5, 4, 3, 2, 1, 7]), 5, units=np.array([0, 0, 0, 1, 1, 2]), needed=np.array([6])
    )
    logits, states = run_classifier(classifier, rows, PADDING, taught, tmp_path, silent)
    assert states.rows.tolist() == [5, 4, 3, 7]
    assert np.flatnonzero(np.isfinite(logits[:, 0])).tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("documents", "tokens", "most"), [(100, 512, 32), (100, 60, 32), (10, 512, 45)]
)
def test_queries_of_a_large_reranker_fit_in_part(documents: int, tokens: int, most: int) -> None:
    """24 layers of 1024 and long documents: some queries train, and some choose."""
    of_token = 2 * 23 * 1024
    lengths = np.full(300 * documents, tokens)
    units = np.repeat(np.arange(300), documents)
    trained = 240 * documents
    most_tokens = 4 * 2**30 // of_token
    found, kept = states_module._fitting(lengths, units, trained, most_tokens, 512)
    assert found == most
    assert len(kept) * found <= most_tokens
    queries = np.unique(units[kept])
    assert len(kept) == documents * len(queries)
    train = (queries < 240).sum()
    assert train > 3 * (queries >= 240).sum() > 0
    assert train + (queries >= 240).sum() >= 20


def test_states_of_one_query_that_do_not_fit() -> None:
    lengths = np.full(20, 512)
    units = np.repeat([0, 1], 10)
    with pytest.raises(InputError, match="give fewer documents to each query"):
        states_module._fitting(lengths, units, 10, 500, 512)


def test_a_state_beyond_fp16_is_cut_off(classifier: Classifier, tmp_path: Path) -> None:
    with torch.no_grad():
        classifier.model.bert.encoder.layer[0].output.LayerNorm.bias[0] = -1e6
    rows = [encoded(np.array([4, 5, 6]))]
    _, states = run_classifier(classifier, rows, PADDING, Taught(np.arange(1), 1), tmp_path, silent)
    assert (states.tokens[:, 0, 0] == -65504).all()


def test_a_finished_run_is_read(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier.folder)
    rows = encoded_rows([Row(text) for text in TEXTS[:10]], tokenizer, 32)
    given = classifier, rows, PADDING, Taught(np.arange(5), 3), tmp_path, silent
    logits, states = run_classifier(*given)
    monkeypatch.setattr(classifier.model, "forward", None)
    again, states_again = run_classifier(*given)
    np.testing.assert_array_equal(again, logits)
    for field in ("rows", "starts", "tokens"):
        np.testing.assert_array_equal(getattr(states_again, field), getattr(states, field))


def test_a_finished_run_of_other_rows_is_not_read(classifier: Classifier, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier.folder)
    rows = encoded_rows([Row(text) for text in TEXTS[:11]], tokenizer, 32)
    for some in (rows[:10], rows[1:]):
        logits, _ = run_classifier(
            classifier, some, PADDING, Taught(np.arange(5), 3), tmp_path, silent
        )
        expected = predict(classifier.model, some, PADDING, lambda output: output.logits)
        assert_exported(logits, expected)


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_without_space_for_the_states_is_an_error_and_they_are_deleted(
    reserves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full), raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50}))
    with pytest.raises(OSError, match="No space left"), _new_file(tmp_path / "states.npy", (5, 9)):
        pytest.fail("nothing may be written to it")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_the_space_of_states_is_reserved_before_they_are_written(tmp_path: Path) -> None:
    with _new_file(tmp_path / "states.npy", (2**19,)):
        assert (tmp_path / "states.npy").stat().st_blocks * 512 >= 2**20
