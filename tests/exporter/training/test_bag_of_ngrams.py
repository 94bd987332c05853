"""Training of exit 0: what it learns, how it is stored, and the models that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fpabee.calibration.progress import silent
from fpabee.exporter.exit_config import MultiExitConfig
from fpabee.exporter.training import TrainOptions, bag_of_ngrams
from fpabee.exporter.training.bag_of_ngrams import BagOfNgrams, Vocabulary, train_exit_0
from fpabee.exporter.training.examples import Examples, encoded_rows
from fpabee.exporter.training.trainer import label_loss
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import InputError, ModelError
from fpabee.runtime.exit_0 import ExitZero
from fpabee.runtime.files import Row

GOLDEN = Path(__file__).parents[2] / "golden"
SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL

Options = Callable[..., TrainOptions]
WriteRows = Callable[..., str]


class Stub(nn.Module):
    """Stands for a trained model whose last exit always gives the same logits."""

    def __init__(self, problem_type: ProblemType, logits: Sequence[float]) -> None:
        super().__init__()
        labels = tuple(map(str, range(len(logits))))
        self.exit_config = MultiExitConfig((1,), labels, problem_type)
        self.backbone = SimpleNamespace(config=SimpleNamespace(vocab_size=200))
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits.expand(1, len(input_ids), -1)


def learn(rows: Sequence[Row], labels: Any, teacher: Stub) -> tuple[ExitZero, Any]:
    """Exit 0 trained on some rows, which are also its dev rows, and its logits for them."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "pabee_bert")
    encoded = encoded_rows(rows, tokenizer, 16)
    part = Examples(encoded, np.array(labels))
    model = cast(Any, teacher)
    found = train_exit_0(model, part, part, {"input_ids": 0}, 3, silent)
    return found, found(encoded)


def softmax(logits: Any) -> Any:
    return torch.from_numpy(logits).softmax(-1).numpy()


def test_it_learns_half_from_the_labels_and_half_from_the_last_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And keeps the two texts of a pair apart."""
    monkeypatch.setattr(bag_of_ngrams, "_MOST_EPOCHS", 100)
    rows = [Row("good", "bad"), Row("bad", "good")] * 100
    _, logits = learn(rows, [0, 1] * 100, Stub(SINGLE, [-20.0, -20.0, 20.0]))
    np.testing.assert_allclose(softmax(logits)[:2], [[0.5, 0, 0.5], [0, 0.5, 0.5]], atol=0.1)
    _, logits = learn(rows, [[1, 0], [0, 0]] * 100, Stub(MULTI, [20.0, 20.0]))
    found = torch.from_numpy(logits).sigmoid().numpy()
    np.testing.assert_allclose(found[:2], [[1, 0.5], [0.5, 0.5]], atol=0.1)


def test_training_uses_one_thread_and_gives_the_others_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[int] = set()
    threads = torch.get_num_threads()

    def noting(*given: Any) -> Tensor:
        seen.add(torch.get_num_threads())
        return label_loss(*given)

    monkeypatch.setattr(bag_of_ngrams, "label_loss", noting)
    torch.set_num_threads(3)
    try:
        learn([Row("good"), Row("bad")] * 5, [0, 1] * 5, Stub(SINGLE, [0.0, 0.0]))
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("labels", [3, 70])
def test_numpy_gives_the_logits_of_torch(labels: int) -> None:
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "pabee_bert")
    words = ("good", "bad", "film", "plot")
    rows = [Row(f"{a} {b} film"[: 3 + i]) for i, a in enumerate(words * 4) for b in words]
    rows += [Row("good", "bad film"), Row("", ""), Row("")]
    encoded = encoded_rows(rows, tokenizer, 16)
    vocabulary = Vocabulary(encoded[:-20], 200)
    bag = BagOfNgrams(vocabulary, labels)
    nn.init.normal_(bag.vectors.weight[:-1])
    with torch.no_grad():
        expected = bag(vocabulary.bags(encoded)).numpy()
    stored = bag.weights()
    assert stored.table.shape == (200 + 65536, 3 if labels == 3 else 64), "it holds logits if few"
    assert stored.table.dtype == np.float16
    found = stored(encoded)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.98


def test_a_row_without_tokens_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=words)
    assert len(encoded_rows([Row("a a")], tokenizer, 8)[0]) == 2
    with pytest.raises(InputError, match=r"line 7 has no tokens: the tokenizer adds no special"):
        encoded_rows([Row("a"), Row("  ", where="line 7")], tokenizer, 8)


def test_a_training_that_diverges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_of_ngrams, "_LR", float("inf"))
    with pytest.raises(
        ModelError, match=r"exit 0 diverged: .* -> use `exit_0` to train without it"
    ):
        learn([Row("good"), Row("bad")], [0, 1], Stub(SINGLE, [0.0, 0.0]))
