"""The rows of a training, from files as the runtime reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.folder import BAD_JSON
from ...runtime.encoding import EncodedRow, RowTokenizer
from ...runtime.errors import InputError
from ...runtime.files import ReadOptions, Row, read_rows


@dataclass(frozen=True)
class Examples:
    """Tokenized rows, and what a model should give for them.

    Attributes:
        rows: the rows.
        targets: numbers of labels `[rows]` int64; for multi-label `[rows, labels]` of 0 and 1;
            for either also probabilities `[rows, labels]` float32.
    """

    rows: Sequence[EncodedRow]
    targets: NDArray[Any]


def labelled_rows(source: str, reading: ReadOptions) -> Iterator[Row]:
    """The labelled rows of a file, one at a time.

    Args:
        source: the file, or `-` for standard input.
        reading: how the rows are read.

    Raises:
        InputError: the file cannot be read, or a row has no label.
        RowError: a row cannot be read.
    """
    for number, row in enumerate(read_rows(source, reading), start=1):
        if row.labels is None:
            raise InputError(
                f"{source}, row {number} has no label",
                "give every row a label, or name their column with `label_column`",
            )
        yield row


def label_names(rows: Sequence[Row], train: str) -> tuple[str, ...]:
    """The labels of the task, in order.

    Args:
        rows: the training rows.
        train: the file that they come from.

    Returns:
        What `labels.json` beside the training file lists; without such a file, the labels that
        occur, in alphabetical order.

    Raises:
        InputError: that file is not a list of different names.
    """
    listed = Path(train).parent / "labels.json"
    if Path(train).is_file() and listed.is_file():
        try:
            names = msgspec.json.decode(listed.read_bytes(), type=tuple[str, ...])
        except BAD_JSON as error:
            raise InputError(
                f"{listed} is not a list of labels: {error}", 'write it as JSON: ["no", "yes"]'
            ) from error
        if len(set(names)) < len(names):
            raise InputError(f"{listed} names a label twice", "name every label once")
        return names
    return tuple(sorted({label for row in rows for label in row.labels or ()}))


def encoded_rows(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[EncodedRow]:
    """Rows as the runtime tokenizes them.

    Args:
        rows: the rows.
        tokenizer: the fast tokenizer of the model.
        max_length: longer rows are truncated to this many tokens.

    Raises:
        InputError: a row has no tokens, or `max_length` leaves no room for text.
    """
    # As the engine does: a single text is not a pair with an empty second text.
    encoded = _row_tokenizer(tokenizer, max_length).rows([row.content for row in rows])
    for row, tokens in zip(rows, encoded, strict=True):
        if not len(tokens):
            raise InputError(
                f"{row.where} has no tokens: the tokenizer adds no special tokens",
                "leave such rows out, or use a tokenizer that adds special tokens",
            )
    return encoded


def special_tokens(tokenizer: Any, max_length: int) -> NDArray[np.int64]:
    """The ids of the tokens that a tokenizer adds to a pair of texts: `[tokens]`.

    Args:
        tokenizer: the fast tokenizer of the model.
        max_length: longer rows are truncated to this many tokens.

    Raises:
        InputError: `max_length` leaves no room for text.
    """
    (row,) = _row_tokenizer(tokenizer, max_length).rows([("", "")])
    return row.input_ids


def _row_tokenizer(tokenizer: Any, max_length: int) -> RowTokenizer:
    own = copy.deepcopy(tokenizer.backend_tokenizer)
    return RowTokenizer(own, max_length, "token_type_ids" in tokenizer.model_input_names)
