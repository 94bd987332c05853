"""Tokenizing texts with the artifact's tokenizer, truncating them, and padding batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tokenizers import Tokenizer

from fpabee.runtime import FpabeeError
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS, MASK_FILL
from fpabee.runtime.encoding import EncodedRow, TextEncoder, padded_batches, padding_values
from fpabee.runtime.errors import InputError

from ..doubles.calls import before


def encoder_of(folder: Path, max_length: int | None = None) -> TextEncoder:
    return TextEncoder(folder, read_manifest(folder).tokenizer, max_length)


@pytest.fixture
def bert(engines: Mapping[str, Path]) -> TextEncoder:
    """The encoder of the BERT artifact; its ids are 0 pad, 1 unknown, 2 begin, 3 end, 4 'the'."""
    return encoder_of(engines["bert"])


def ids(row: EncodedRow) -> list[int]:
    return list(row.input_ids.tolist())


def test_tokens_are_those_of_the_tokenizer(bert: TextEncoder, engines: Mapping[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(str(engines["bert"] / "tokenizer" / "tokenizer.json"))
    texts = ["The film is not bad!", "", "naïve 東京", "xyz the"]
    rows = bert.encode(texts)
    assert [ids(row) for row in rows] == [tokenizer.encode(text).ids for text in texts]
    assert [len(row) for row in rows] == [len(row.input_ids) for row in rows]
    assert ids(bert.encode(["the the"])[0]) == [2, 4, 4, 3]
    assert ids(bert.encode([""])[0]) == [2, 3]


def test_pairs_have_token_types_where_the_model_has_them(
    bert: TextEncoder, engines: Mapping[str, Path]
) -> None:
    pair = ("the", "the the")
    row, text, empty = bert.encode([pair, "the", ("", "")])
    assert (ids(text), ids(empty)) == ([2, 4, 3], [2, 3, 3])
    assert ids(row) == [2, 4, 3, 4, 4, 3]
    assert row.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    (without,) = encoder_of(engines["mpnet"]).encode([pair])
    assert without.token_type_ids.tolist() == [0] * len(without)


def test_long_texts_are_truncated_and_marked(
    bert: TextEncoder, engines: Mapping[str, Path]
) -> None:
    exact, longer, pair = bert.encode(["the " * 62, "the " * 63, ("the " * 70, "a")])
    assert [len(exact), len(longer), len(pair)] == [64, 64, 64]
    assert [exact.truncated, longer.truncated, pair.truncated] == [False, True, True]
    assert ids(longer) == [2, *[4] * 62, 3]
    assert pair.token_type_ids.tolist() == [0] * 62 + [1, 1]
    for limit, length in ((5, 5), (1000, 64)):
        assert len(encoder_of(engines["bert"], limit).encode(["the " * 100])[0]) == length
    for impossible in (1, "5", 5.5):
        with pytest.raises(FpabeeError, match="max_length"):
            encoder_of(engines["bert"], cast(int, impossible))


def test_batches_are_padded_to_their_longest_row(
    bert: TextEncoder, engines: Mapping[str, Path]
) -> None:
    rows = bert.encode(["the the", ("the", "a"), "the"])
    spec = read_manifest(engines["bert"]).tokenizer
    padding = padding_values(msgspec.structs.replace(spec, pad_id=7, pad_type_id=8))
    first, second = padded_batches(rows, padding, batch=2)
    assert first["input_ids"].tolist() == [[*ids(rows[0]), 7], ids(rows[1])]
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 0, 8], [0, 0, 0, 1, 1]]
    assert first[ATTENTION_BIAS].shape == (2, 1, 1, 5)
    assert first[ATTENTION_BIAS][0, 0, 0].tolist() == [0, 0, 0, 0, MASK_FILL]
    assert not first[ATTENTION_BIAS][1].any()
    assert second["input_ids"].tolist() == [ids(rows[2])]
    assert {array.dtype.name for array in first.values()} == {"int64", "float32"}


def test_a_long_query_is_not_tokenized_for_each_of_its_documents(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    before(monkeypatch, bert._tokenizer, "rows", lambda texts, _: sizes.append(len(texts)))
    pairs = [("x" * 500_000, f"document {number}") for number in range(100)]
    assert len(bert.encode(pairs)) == 100
    assert sorted(sizes) == [1, 99]


@pytest.mark.parametrize(
    "text", [None, b"bytes", ["a", "b"], ("a",), ("a", "b", "c"), ("a", 5), {"text": "a"}], ids=repr
)
def test_only_texts_and_pairs_are_accepted(bert: TextEncoder, text: Any) -> None:
    with pytest.raises(
        InputError, match=f"text 1 has the type {type(text).__name__}.*give a string"
    ):
        bert.encode(["good", text])
    if text is None:  # texts are numbered over all parts in which they are tokenized
        many: list[Any] = [*["good"] * 800, text]
        with pytest.raises(InputError, match="text 800 has the type NoneType"):
            bert.encode(many)


@pytest.mark.parametrize("text", ["a\ud800b", ("a", "\udfff")])
def test_invalid_unicode_is_refused(bert: TextEncoder, text: Any) -> None:
    with pytest.raises(InputError, match=r"text 0 is not valid Unicode: .* at character \d"):
        bert.encode([text])


def test_a_text_without_any_token_is_refused(without_special_tokens: Path) -> None:
    encoder = encoder_of(without_special_tokens)
    assert ids(encoder.encode(["the the"])[0]) == [4, 4]
    with pytest.raises(InputError, match=r"text 1 has no tokens: .*tokenizer\.json adds no"):
        encoder.encode(["the", ""])
