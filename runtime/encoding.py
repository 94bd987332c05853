"""Texts to token ids, with the tokenizer that the artifact holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .arguments import whole_number
from .artifact.folder import verified
from .artifact.manifest import ATTENTION_BIAS, MASK_FILL, TokenizerSpec
from .artifact.reference import Text as Text
from .artifact.tokenizer_content import check_tokenizer
from .errors import ArtifactError, FpabeeError, InputError, first_line

# Texts that are tokenized in one call, so that memory stays flat on long lines too.
_CHUNK_TEXTS = 256
_CHUNK_CHARACTERS = 4 * 2**20

Arrays = dict[str, NDArray[Any]]
"""Tensors by name."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One tokenized row.

    Attributes:
        input_ids: `[tokens]` int64.
        token_type_ids: `[tokens]` int64; zeros where the model takes none.
        truncated: whether the text had more tokens than the model takes.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)

    def model_input(self, name: str) -> NDArray[np.int64] | float:
        """The row's values of a model input.

        Args:
            name: `input_ids`, `token_type_ids` or `attention_bias`.

        Returns:
            `[tokens]` int64; for the attention bias 0, which it is on every real token.
        """
        if name == ATTENTION_BIAS:
            return 0.0
        return self.input_ids if name == "input_ids" else self.token_type_ids


def padding_values(tokenizer: TokenizerSpec) -> dict[str, float]:
    """What each input of segment 1 holds beyond the end of a row, by the name of the input."""
    return {
        "input_ids": tokenizer.pad_id,
        "token_type_ids": tokenizer.pad_type_id,
        ATTENTION_BIAS: MASK_FILL,
    }


def write_rows(array: NDArray[Any], name: str, rows: Sequence[EncodedRow], padding: float) -> None:
    """Write one model input of some rows into an array, and padding around them.

    Args:
        array: `[batch, ..., sequence]`, at least as large as the rows; all of it is written.
        name: the model input, as in `EncodedRow.model_input`.
        rows: the rows, from the first of the array on.
        padding: the value beyond the end of each row, and of rows of padding.
    """
    array[...] = padding
    for number, row in enumerate(rows):
        array[number, ..., : len(row)] = row.model_input(name)


def padded_inputs(rows: Sequence[EncodedRow], padding: Mapping[str, float]) -> Arrays:
    """Model inputs of one batch, padded to its longest row.

    Args:
        rows: at least one row.
        padding: the padding of each input that is wanted, see `padding_values`.

    Returns:
        In the order of `padding`: token ids and types `[rows, tokens]` int64, the attention bias
        `[rows, 1, 1, tokens]` float32.
    """
    batch, sequence = len(rows), max(len(row) for row in rows)
    arrays: Arrays = {}
    for name, value in padding.items():
        if name == ATTENTION_BIAS:
            arrays[name] = np.empty((batch, 1, 1, sequence), np.float32)
        else:
            arrays[name] = np.empty((batch, sequence), np.int64)
        write_rows(arrays[name], name, rows, value)
    return arrays


def padded_batches(
    rows: Sequence[EncodedRow], padding: Mapping[str, float], batch: int
) -> Iterator[Arrays]:
    """Model inputs of rows in batches, in their order; see `padded_inputs`.

    Args:
        rows: the rows.
        padding: the padding of each input that is wanted, see `padding_values`.
        batch: rows in a batch; the last one may have fewer.
    """
    for start in range(0, len(rows), batch):
        yield padded_inputs(rows[start : start + batch], padding)


class TextEncoder:
    """Tokenizes rows, truncated to the model's longest sequence.

    Args:
        folder: the engines folder.
        spec: the tokenizer's part of the manifest.
        max_length: a shorter limit than the spec's, in tokens.

    Raises:
        ArtifactError: the tokenizer is missing or damaged, or makes far more of a text than it is.
        InputError: `max_length` is no whole number, or leaves no room for text.
    """

    def __init__(self, folder: Path, spec: TokenizerSpec, max_length: int | None = None) -> None:
        self._path = verified(folder, spec.file, spec.sha256)
        with tokenizer_errors(f"{self._path} is not a tokenizer that can be used"):
            check_tokenizer(self._path)
            self._tokenizer = Tokenizer.from_file(str(self._path))
            self._tokenizer.no_padding()
            special = self._tokenizer.num_special_tokens_to_add(is_pair=True)
        self._uses_types = "token_type_ids" in spec.inputs
        limit = spec.max_length
        if max_length is not None:
            limit = min(limit, whole_number("max_length", max_length, InputError))
        if limit <= special:
            raise InputError(
                f"max_length {limit} leaves no room for text beside {special} special tokens",
                f"give {special + 1} to {spec.max_length} tokens",
            )
        with tokenizer_errors(f"{self._path} cannot truncate"):
            self._tokenizer.enable_truncation(limit)
        self._limit = limit

    def encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize texts or pairs.

        Raises:
            InputError: a text is neither a string nor a pair of strings, is not Unicode, or has no
                tokens.
            ArtifactError: the tokenizer is damaged, as only this text shows.
        """
        for number, text in enumerate(texts, start=1):
            _check(text, number)
        with tokenizer_errors(f"{self._path} fails on a text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        longest = max((len(encoding) for encoding in encodings), default=0)
        if longest > self._limit:  # its template puts more than once what was truncated
            raise ArtifactError(
                f"{self._path} gives {longest} tokens, though told to give {self._limit} at most",
                "export the model again with fpabee-export",
            )
        for number, encoding in enumerate(encodings, start=1):
            if not len(encoding):  # the mean over no tokens would be one over its padding
                raise InputError(
                    f"text {number} has no tokens: {self._path} adds none of its own",
                    "leave such texts out, or export with a tokenizer that adds special tokens",
                )
        return [
            EncodedRow(
                np.asarray(encoding.ids, np.int64),
                np.asarray(encoding.type_ids, np.int64)
                if self._uses_types
                else np.zeros(len(encoding.ids), np.int64),
                bool(encoding.overflowing),
            )
            for encoding in encodings
        ]


@contextmanager
def tokenizer_errors(
    what: str,
    kind: type[FpabeeError] = ArtifactError,
    hint: str = "export the model again with fpabee-export",
) -> Iterator[None]:
    """Turn what the library, or the check before it, raises on a bad tokenizer into our error.

    Args:
        what: what failed.
        kind: of our error.
        hint: of our error.
    """
    try:
        yield
    # The bare Exception, or for a panic of its Rust code one that is not even that.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {first_line(error)}", hint) from error


def _check(text: object, number: int) -> None:
    is_pair = isinstance(text, tuple) and len(text) == 2
    parts = text if isinstance(text, tuple) and is_pair else (text,)
    for part in parts:
        if not isinstance(part, str):
            raise InputError(
                f"text {number} is a {type(text).__name__}", "give a string, or a pair of strings"
            )
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} is not Unicode: {error.reason} at character {error.start + 1}",
                "decode the file as UTF-8, or replace the character",
            ) from error


def chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts in parts that are bounded in number and characters."""
    iterator = iter(texts)
    for first in iterator:
        chunk, characters = [first], _characters(first)
        for text in itertools.islice(iterator, _CHUNK_TEXTS - 1):
            chunk.append(text)
            characters += _characters(text)
            if characters >= _CHUNK_CHARACTERS:
                break
        yield chunk


def _characters(text: Text) -> int:
    """Size of a text or a pair; what is neither is refused when it is encoded."""
    parts = text if isinstance(text, tuple) else (text,)
    return sum(len(part) for part in parts if isinstance(part, str))
