"""Exit 0: a classifier of the n-grams of a row, which answers before layer 1.

It is a bag of n-grams as in fastText (Joulin et al., arXiv 1607.01759), over the tokens of the
model: the mean of learned vectors of the row's unigrams and bigrams, then a linear layer. It runs
on the host in numpy, whatever runs the segments, so a row that stops here never reaches a device.

Every token gives two n-grams: itself, and the bigram with the token after it, where the last token
is followed by an end mark. The first rows of the table belong to unigrams: the row of a token is
its id modulo the number of these rows. Bigrams are hashed into the rows after them. The two texts
of a pair have n-grams of their own: all n-grams of the second text are hashed, where 2^23 is added
to each id, and a token by itself is the pair of its id with and without this offset.

The hash can be computed in a graph as well: all numbers stay below 2^24, since OpenVINO computes
int64 with less precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact.folder import EnginesFolder
from .artifact.manifest import ExitZeroSpec
from .artifact.untrusted.arrays import read_arrays
from .encoding import EncodedRow
from .errors import EXPORT_AGAIN, ArtifactError

ARRAYS = ("table", "weights", "bias")
"""The arrays of the file, see `ExitZero`."""

# Added to the token ids of a second text; more than any vocabulary has.
SECOND = 1 << 23
# Stands for the token after the last one.
END = (1 << 24) - 1

Counts = NDArray[np.intp]
Tokens = NDArray[np.int64]


def ngrams(rows: Sequence[EncodedRow], unigrams: int, buckets: int) -> tuple[Counts, Counts]:
    """The n-grams of some rows, as numbers of rows of the table.

    Args:
        rows: at least one row.
        unigrams: how many rows of the table belong to unigrams.
        buckets: how many rows bigrams are hashed into; they come after the unigrams.

    Returns:
        `[2 * tokens]`, the n-grams of one row after another; and `[rows]`, how many each row has.
    """
    lengths = np.array([len(row) for row in rows], np.intp)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([row.input_ids for row in rows])
    numbers = np.empty((len(tokens), 2), np.intp)
    numbers[:, 0] = tokens % unigrams
    second = [
        np.arange(end - len(row) + row.pair_start, end)
        for row, end in zip(rows, ends.tolist(), strict=True)
        if row.pair_start is not None
    ]
    if second:
        at = np.concatenate(second)
        numbers[at, 0] = unigrams + bucket_of(tokens[at] + SECOND, tokens[at], buckets)
        tokens[at] += SECOND
    following = np.empty_like(tokens)
    following[:-1] = tokens[1:]
    following[ends - 1] = END
    numbers[:, 1] = unigrams + bucket_of(tokens, following, buckets)
    return numbers.reshape(-1), 2 * lengths


def bucket_of(first: Tokens, second: Tokens, buckets: int) -> Tokens:
    """A bucket for each pair of numbers below 2^24.

    Both remainders count, so that pairs with a number in common differ in up to 4,093 ways.
    """
    return (first % 4093 * 2039 + second % 4091 * 2029) % buckets


class ExitZero:
    """The classifier before layer 1.

    Args:
        unigrams: how many rows of the table belong to unigrams; `buckets` is how many belong to
            hashed n-grams.
        table: `[unigrams + buckets, width]` float16, the vectors of n-grams.
        weights: `[width, labels]` float32.
        bias: `[labels]` float32.

    Raises:
        ValueError: the arrays do not fit together, or hold numbers that are not finite.
    """

    def __init__(
        self,
        unigrams: int,
        table: NDArray[np.float16],
        weights: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> None:
        types_and_shapes = [(array.dtype.name, array.shape) for array in (table, weights, bias)]
        size = len(table)
        width = table.shape[-1]
        labels = len(bias)
        expected = ("float16", (size, width)), ("float32", (width, labels)), ("float32", (labels,))
        if types_and_shapes != list(expected):
            raise ValueError(
                f"its table, weights and bias are {types_and_shapes}, expected {list(expected)}"
            )
        # The largest logits that vectors of float16 can give.
        most = np.abs(weights, dtype=np.float64).sum(axis=0) * np.finfo(np.float16).max
        most += np.abs(bias, dtype=np.float64)
        if not (np.isfinite(table).all() and (most <= np.finfo(np.float32).max).all()):
            raise ValueError("it holds numbers that are not finite, or give logits that are not")
        self.unigrams = unigrams
        self.buckets = size - unigrams
        self.table = table
        self.weights = weights
        self.bias = bias

    @classmethod
    def load(cls, engines: EnginesFolder) -> ExitZero | None:
        """The exit 0 of an engines folder; None if the model has none.

        Raises:
            ArtifactError: its file is missing or damaged, or does not fit the model.
        """
        spec: ExitZeroSpec | None = engines.manifest.exit_0
        if spec is None:
            return None
        path = engines.file(spec.file, spec.sha256)
        try:
            exit_0 = cls(spec.unigrams, **read_arrays(path, ARRAYS))
            exit_0.check_sizes(spec.buckets, len(engines.manifest.task.labels))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} does not fit the model: {error}", EXPORT_AGAIN) from error
        return exit_0

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, as files hold them."""
        return {name: getattr(self, name) for name in ARRAYS}

    def check_sizes(self, buckets: int, labels: int) -> None:
        """Raise ValueError if it has another number of buckets, or is for other labels."""
        if self.buckets != buckets:
            raise ValueError(f"it has {self.buckets} buckets, expected {buckets}")
        if len(self.bias) != labels:
            raise ValueError(f"it gives {len(self.bias)} logits for {labels} labels")

    def __call__(self, rows: Sequence[EncodedRow]) -> NDArray[np.float32]:
        """Logits `[rows, labels]`: one gather and one mean for all rows.

        Args:
            rows: at least one row.
        """
        numbers, counts = ngrams(rows, self.unigrams, self.buckets)
        vectors = self.table.take(numbers, axis=0).astype(np.float32)
        sums = np.add.reduceat(vectors, np.cumsum(counts) - counts, axis=0)
        sums /= counts[:, None].astype(np.float32)
        # All logits are finite, as `__init__` has checked. On ARM with SME, products of OpenBLAS
        # leave the flags of an overflow all the same, and NumPy would warn of it.
        with np.errstate(all="ignore"):
            return np.asarray(sums @ self.weights + self.bias, np.float32)
