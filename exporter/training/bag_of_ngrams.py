"""Train exit 0, a bag of n-grams, on labels and on the last exit of a trained model.

The classifier is that of fastText (Joulin et al., arXiv 1607.01759). Its n-grams come from
`runtime.exit_0`, so that training and runtime see the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...calibration.progress import Progress
from ...runtime.artifact.manifest import ProblemType
from ...runtime.encoding import EncodedRow
from ...runtime.errors import ModelError
from ...runtime.exit_0 import ExitZero, ngrams
from ..exit_0_files import unigrams_of
from ..model import MultiExitModel, predict
from .examples import Examples
from .trainer import as_probabilities, label_loss, one_thread, probabilities

_WIDTH = 64
_BUCKETS = 65536
_LR = 2e-3
_BATCH = 32
# Few rows need many passes, and some thousand rows about ten. The second limit keeps large data to
# a minute or two.
_MOST_EPOCHS = 100
_MOST_ROWS = 1_000_000
_PATIENCE = 3
# Up to this many labels, the table holds logits instead of vectors, which makes it smaller.
_MOST_FOLDED = 64
# Standard deviation of the vectors before training.
_SPREAD = 0.05


@dataclass(frozen=True)
class Bags:
    """Rows as exit 0 sees them, and what it should give for them.

    Attributes:
        numbers: for each row, the numbers of its vectors.
        targets: probabilities `[rows, labels]`.
    """

    numbers: Sequence[Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, order: Tensor) -> Iterator[Bags]:
        """The rows in an order, in batches."""
        for rows in torch.split(order, _BATCH):
            yield Bags([self.numbers[row] for row in rows.tolist()], self.targets[rows])


class Vocabulary:
    """The n-grams that occur in rows; all others share the last vector, which stays zero.

    Args:
        rows: tokenized rows.
        unigrams: how many rows of the table of exit 0 belong to unigrams.
    """

    def __init__(self, rows: Sequence[EncodedRow], unigrams: int) -> None:
        self.unigrams = unigrams
        self.known = np.unique(ngrams(rows, unigrams, _BUCKETS)[0])
        self._place = np.full(unigrams + _BUCKETS, len(self.known))
        self._place[self.known] = np.arange(len(self.known))

    def bags(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, ...]:
        """The numbers of the vectors of each row."""
        numbers, counts = ngrams(rows, self.unigrams, _BUCKETS)
        return torch.split(torch.from_numpy(self._place[numbers]), counts.tolist())


class BagOfNgrams(nn.Module):
    """Exit 0 in PyTorch.

    Args:
        vocabulary: the n-grams that have a vector.
        labels: how many logits it gives.
    """

    def __init__(self, vocabulary: Vocabulary, labels: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        # Sparse: a batch changes the vectors of its own n-grams only.
        self.vectors = nn.EmbeddingBag(len(vocabulary.known) + 1, _WIDTH, mode="mean", sparse=True)
        nn.init.normal_(self.vectors.weight, std=_SPREAD)
        nn.init.zeros_(self.vectors.weight[-1])
        self.classifier = nn.Linear(_WIDTH, labels)

    def forward(self, bags: Sequence[Tensor]) -> Tensor:
        """Logits `[rows, labels]`.

        Args:
            bags: the numbers of the vectors of each row, see `Vocabulary.bags`.
        """
        starts = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        logits: Tensor = self.classifier(self.vectors(torch.cat(list(bags)), starts))
        return logits

    @torch.no_grad()
    def weights(self) -> ExitZero:
        """The weights as they are stored; raises ValueError if they are not finite."""
        table = self.vectors.weight[:-1]
        weights = self.classifier.weight.T
        labels = self.classifier.out_features
        if labels <= _MOST_FOLDED:
            # The mean of products is the product of the mean.
            table = table @ weights
            weights = torch.eye(labels)
        known = self.vocabulary.known
        unigrams = self.vocabulary.unigrams
        full = np.zeros((unigrams + _BUCKETS, table.shape[1]), np.float16)
        full[known] = table.numpy()
        bias = self.classifier.bias.numpy().copy()
        return ExitZero(unigrams, full, np.ascontiguousarray(weights.numpy()), bias)


def train_exit_0(
    model: MultiExitModel,
    train: Examples,
    dev: Examples,
    padding: Mapping[str, float],
    seed: int,
    progress: Progress,
) -> ExitZero:
    """Train exit 0 half on the labels and half on the last exit of a trained model.

    Args:
        model: the trained model.
        train: the rows to train on.
        dev: the rows that say when to stop.
        padding: see `model_inputs`.
        seed: of all random choices.
        progress: called with (what, done, total).

    Raises:
        ModelError: the training diverged.
    """
    config = model.exit_config
    step = "answers of the last exit, to train exit 0"
    last = predict(
        model, train.rows, padding, lambda logits: logits[-1], progress=progress, what=step
    )
    taught = probabilities(torch.from_numpy(last), config.problem_type)
    labels = as_probabilities(torch.from_numpy(train.targets), len(config.labels))
    mixed = Examples(train.rows, ((labels + taught) / 2).numpy())
    return learn(mixed, dev, model, seed, progress)


@one_thread()
def learn(
    train: Examples, dev: Examples, model: MultiExitModel, seed: int, progress: Progress
) -> ExitZero:
    """Train exit 0 on the targets of rows.

    Args:
        train: the rows to train on.
        dev: the rows that say when to stop.
        model: whose task and vocabulary it gets.
        seed: of all random choices.
        progress: called with (what, done, total).

    Raises:
        ModelError: the training diverged.
    """
    torch.manual_seed(seed)
    config = model.exit_config
    vocabulary = Vocabulary(train.rows, unigrams_of(int(model.backbone.config.vocab_size)))
    bag = BagOfNgrams(vocabulary, len(config.labels))

    def bags(examples: Examples) -> Bags:
        targets = as_probabilities(torch.from_numpy(examples.targets), len(config.labels))
        return Bags(vocabulary.bags(examples.rows), targets.float())

    try:
        return _fit(bag, bags(train), bags(dev), config.problem_type, progress)
    except ValueError as error:
        raise ModelError(
            f"the training of exit 0 diverged: {error}", "use `exit_0` to train without it"
        ) from error


def _fit(
    bag: BagOfNgrams, train: Bags, dev: Bags, problem_type: ProblemType, progress: Progress
) -> ExitZero:
    """Train until the loss on the dev rows has stopped falling.

    Args:
        bag: what is trained.
        train: the rows to train on.
        dev: the rows that say when to stop.
        problem_type: the task.
        progress: called with (loss on dev, passes over the rows done, the most passes).

    Returns:
        The weights after the pass with the smallest loss on dev.
    """
    optimizers = [
        torch.optim.SparseAdam(list(bag.vectors.parameters()), lr=_LR),
        torch.optim.Adam(bag.classifier.parameters(), lr=_LR),
    ]
    epochs = max(1, min(_MOST_EPOCHS, _MOST_ROWS // len(train)))
    losses: list[float] = []
    best = bag.state_dict()
    for epoch in range(epochs):
        for batch in train.batches(torch.randperm(len(train))):
            bag.zero_grad()
            torch.autograd.backward(label_loss(bag(batch.numbers), batch.targets, problem_type))
            for optimizer in optimizers:
                optimizer.step()
        with torch.no_grad():
            total = sum(
                len(batch) * float(label_loss(bag(batch.numbers), batch.targets, problem_type))
                for batch in dev.batches(torch.arange(len(dev)))
            )
        losses.append(total / len(dev))
        progress(f"exit 0, dev loss {losses[-1]:.3f}", epoch + 1, epochs)
        if losses[-1] <= min(losses):
            best = copy.deepcopy(bag.state_dict())
        elif len(losses) - np.argmin(losses) > _PATIENCE:
            break
    bag.load_state_dict(best)
    return bag.weights()
