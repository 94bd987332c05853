"""One run gives the logits of the classifier, and what the heads of a model with exits see."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fpabee.calibration.progress import silent
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.convert.heads import _TAKEN
from fpabee.exporter.convert.states import _new_file, run_classifier
from fpabee.exporter.exit_config import Pooling
from fpabee.exporter.model import by_row, predict
from fpabee.exporter.training.examples import encoded_rows
from fpabee.runtime.files import Row

from ...closeness import assert_exported
from .conftest import KINDS, TEXTS

PADDING = {"input_ids": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_see_in_training_what_they_see_in_the_model(
    kind: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    classifier = Classifier(make(kind))
    tokenizer = AutoTokenizer.from_pretrained(classifier.folder)
    rows = encoded_rows([Row(text) for text in TEXTS[:40]], tokenizer, 32)
    taught = np.array([3, 39, 0, 17])
    logits, states = run_classifier(classifier, rows, PADDING, taught, tmp_path, silent)
    expected = predict(classifier.model, rows, PADDING, lambda output: output.logits)
    assert_exported(logits, expected)
    assert states.shape == (4, 2, 2, 32)
    for pooling, taken in _TAKEN.items():
        config = replace(classifier.exit_config((1, 2), pooling), hidden_layers=2, hidden_width=5)
        model = classifier.multi_exit(config).eval()
        every = predict(model, [rows[number] for number in taught], PADDING, by_row)
        inputs = torch.from_numpy(states)[:, :, taken].flatten(2)
        with torch.no_grad():
            found = [head.classify(inputs[:, n]) for n, head in enumerate(model.parts[2][:2])]
        assert_exported(torch.stack(found, 1), every[:, :2])
        assert_exported(every[:, 2], logits[taught])
    assert pooling is Pooling.BOTH


def test_a_finished_run_is_read(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(make("bert"))
    tokenizer = AutoTokenizer.from_pretrained(classifier.folder)
    rows = encoded_rows([Row(text) for text in TEXTS[:10]], tokenizer, 32)
    given = classifier, rows, PADDING, np.arange(5), tmp_path, silent
    logits, states = run_classifier(*given)
    monkeypatch.setattr(classifier, "model", None)
    for found, expected in zip(run_classifier(*given), (logits, states), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_without_space_for_the_states_is_an_error_and_they_are_deleted(
    reserves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match="No space left"), _new_file(tmp_path / "states.npy", (5, 9)):
        pytest.fail("nothing may be written to it")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_the_space_of_states_is_reserved_before_they_are_written(tmp_path: Path) -> None:
    with _new_file(tmp_path / "states.npy", (2**18,)):
        assert (tmp_path / "states.npy").stat().st_blocks * 512 >= 2**20
