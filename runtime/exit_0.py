"""Exit 0: a classifier of the n-grams of a row, which answers before layer 1.

It is a bag of n-grams as in fastText (Joulin et al., arXiv 1607.01759), over the tokens of the
model: the mean of learned vectors of the row's unigrams and bigrams, then a linear layer. It runs
on the host in numpy, whatever runs the segments, so a row that stops here never reaches a device.

Every token gives two n-grams: itself, and the bigram with the token after it, where the last token
is followed by an end mark. The first rows of the table belong to unigrams: the row of a token is
its id modulo the number of these rows. Bigrams are hashed into the rows after them. The two texts
of a pair have n-grams of their own: all n-grams of the second text are hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact.folder import verified
from .artifact.manifest import ExitZeroSpec, Manifest
from .artifact.untrusted.arrays import read_arrays
from .encoding import EncodedRow
from .errors import EXPORT_AGAIN, ArtifactError

ARRAYS = ("table", "weights", "bias")
"""The arrays of the file, see `ExitZero`."""

# They stand for the token after the last one, and for the missing half of a hashed unigram.
_END, _ALONE = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)
# Added to the token ids of a second text; more than any vocabulary has.
_SECOND = np.uint32(1 << 24)
# Odd numbers that mix the bits of two tokens (multiplicative hashing, Knuth 1973, vol. 3, 6.4).
_MIX_FIRST, _MIX_BOTH = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)

Counts = NDArray[np.intp]


def ngrams(rows: Sequence[EncodedRow], unigrams: int, buckets: int) -> tuple[Counts, Counts]:
    """The n-grams of some rows, as numbers of rows of the table.

    Args:
        rows: at least one row.
        unigrams: how many rows of the table belong to unigrams.
        buckets: how many rows bigrams are hashed into, a power of two; they come after the
            unigrams.

    Returns:
        `[2 * tokens]`, the n-grams of one row after another; and `[rows]`, how many each row has.
    """
    lengths = np.array([len(row) for row in rows], np.intp)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([row.input_ids for row in rows]).astype(np.uint32)
    found = np.empty((len(tokens), 2), np.intp)
    found[:, 0] = tokens % np.uint32(unigrams)
    second = [
        np.arange(end - len(row) + row.pair_start, end)
        for row, end in zip(rows, ends.tolist(), strict=True)
        if row.pair_start is not None
    ]
    if second:
        at = np.concatenate(second)
        tokens[at] += _SECOND
        found[at, 0] = unigrams + _bucket(tokens[at], _ALONE, buckets)
    following = np.empty_like(tokens)
    following[:-1] = tokens[1:]
    following[ends - 1] = _END
    found[:, 1] = _bucket(tokens, following, buckets)
    found[:, 1] += unigrams
    return found.reshape(-1), 2 * lengths


def _bucket(
    first: NDArray[np.uint32], second: NDArray[np.uint32] | np.uint32, buckets: int
) -> NDArray[np.uint32]:
    """A bucket for each pair of tokens: the upper bits of a product, which depend on all bits."""
    mixed = first * _MIX_FIRST
    mixed ^= second
    mixed *= _MIX_BOTH
    # In two steps, because a shift by all 32 bits, for a single bucket, is undefined.
    mixed >>= np.uint32(1)
    mixed >>= np.uint32(32 - buckets.bit_length())
    return mixed


class ExitZero:
    """The classifier before layer 1.

    Args:
        unigrams: how many rows of the table belong to unigrams; `buckets` is how many belong to
            hashed n-grams.
        table: `[unigrams + buckets, width]` float16, the vectors of n-grams.
        weights: `[width, labels]` float32.
        bias: `[labels]` float32.

    Raises:
        ValueError: the arrays do not fit together, hold numbers that are not finite, or the number
            of buckets is not a power of two.
    """

    def __init__(
        self,
        unigrams: int,
        table: NDArray[np.float16],
        weights: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> None:
        found = [(array.dtype.name, array.shape) for array in (table, weights, bias)]
        size, width, labels = len(table), table.shape[-1], len(bias)
        expected = ("float16", (size, width)), ("float32", (width, labels)), ("float32", (labels,))
        if found != list(expected):
            raise ValueError(f"its table, weights and bias are {found}, expected {list(expected)}")
        buckets = len(table) - unigrams
        if buckets < 1 or buckets & (buckets - 1):
            raise ValueError(f"it has {buckets} buckets, which is not a power of two")
        # The largest logits that vectors of float16 can give.
        most = np.abs(weights, dtype=np.float64).sum(axis=0) * np.finfo(np.float16).max
        most += np.abs(bias, dtype=np.float64)
        if not (np.isfinite(table).all() and (most <= np.finfo(np.float32).max).all()):
            raise ValueError("it holds numbers that are not finite, or give logits that are not")
        self.unigrams, self.buckets = unigrams, buckets
        self.table, self.weights, self.bias = table, weights, bias

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> ExitZero | None:
        """The exit 0 of an engines folder; None if the model has none.

        Raises:
            ArtifactError: its file is missing or damaged, or does not fit the model.
        """
        spec: ExitZeroSpec | None = manifest.exit_0
        if spec is None:
            return None
        path = verified(folder, spec.file, spec.sha256)
        try:
            found = cls(spec.unigrams, **read_arrays(path, ARRAYS))
            found.check_sizes(spec.buckets, len(manifest.task.labels))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} does not fit the model: {error}", EXPORT_AGAIN) from error
        return found

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
        found, counts = ngrams(rows, self.unigrams, self.buckets)
        vectors = self.table.take(found, axis=0).astype(np.float32)
        sums = np.add.reduceat(vectors, np.cumsum(counts) - counts, axis=0)
        sums /= counts[:, None].astype(np.float32)
        return np.asarray(sums @ self.weights + self.bias, np.float32)
