"""Tokenizing texts with the artifact's tokenizer, truncating them, and padding batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from fpabee.runtime import FpabeeError
from fpabee.runtime.artifact.folder import read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS, MASK_FILL
from fpabee.runtime.encoding import EncodedRow, TextEncoder, padded_batches, padding_values
from fpabee.runtime.errors import ArtifactError, InputError


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
    (row,) = bert.encode([pair])
    assert ids(row) == [2, 4, 3, 4, 4, 3]
    assert row.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    (without,) = encoder_of(engines["mpnet"]).encode([pair])
    assert without.token_type_ids.tolist() == [0] * len(without)


def test_texts_and_pairs_may_be_mixed(bert: TextEncoder) -> None:
    rows = bert.encode(["the", ("the", "the"), ("", "")])
    assert [ids(row) for row in rows] == [[2, 4, 3], [2, 4, 3, 4, 3], [2, 3, 3]]


def test_long_texts_are_truncated_and_marked(bert: TextEncoder) -> None:
    exact, longer, pair = bert.encode(["the " * 62, "the " * 63, ("the " * 70, "a")])
    assert [len(exact), len(longer), len(pair)] == [64, 64, 64]
    assert [exact.truncated, longer.truncated, pair.truncated] == [False, True, True]
    assert ids(longer) == [2, *[4] * 62, 3]
    assert pair.token_type_ids.tolist() == [0] * 62 + [1, 1]


def test_a_limit_can_shorten_rows_but_not_lengthen_them(engines: Mapping[str, Path]) -> None:
    text = ["the " * 100]
    assert len(encoder_of(engines["bert"], 5).encode(text)[0]) == 5
    assert len(encoder_of(engines["bert"], 1000).encode(text)[0]) == 64


@pytest.mark.parametrize("limit", [1, 0, -1, "5", 5.5])
def test_a_limit_without_room_for_a_token_is_refused(
    engines: Mapping[str, Path], limit: Any
) -> None:
    with pytest.raises(FpabeeError, match="max_length"):
        encoder_of(engines["bert"], limit)


def test_batches_are_padded_to_their_longest_row(bert: TextEncoder) -> None:
    rows = bert.encode(["the the", ("the", "a"), "the"])
    padding = {"input_ids": 7, "token_type_ids": 8, ATTENTION_BIAS: MASK_FILL}
    first, second = padded_batches(rows, padding, batch=2)
    assert first["input_ids"].tolist() == [[*ids(rows[0]), 7], ids(rows[1])]
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 0, 8], [0, 0, 0, 1, 1]]
    assert first[ATTENTION_BIAS].shape == (2, 1, 1, 5)
    assert first[ATTENTION_BIAS][0, 0, 0].tolist() == [0, 0, 0, 0, MASK_FILL]
    assert not first[ATTENTION_BIAS][1].any()
    assert second["input_ids"].tolist() == [ids(rows[2])]
    assert {array.dtype.name for array in first.values()} == {"int64", "float32"}


def test_padding_values_are_those_of_the_tokenizer(engines: Mapping[str, Path]) -> None:
    spec = read_manifest(engines["mpnet"]).tokenizer
    values = padding_values(msgspec.structs.replace(spec, pad_id=5, pad_type_id=6))
    assert values == {"input_ids": 5, "token_type_ids": 6, ATTENTION_BIAS: MASK_FILL}


@pytest.mark.parametrize(
    "text",
    [None, 5, b"bytes", ["a", "b"], ("a",), ("a", "b", "c"), ("a", 5), (), {"text": "a"}],
    ids=repr,
)
def test_only_texts_and_pairs_are_accepted(bert: TextEncoder, text: Any) -> None:
    with pytest.raises(InputError, match=f"text 2 is a {type(text).__name__}.*give a string"):
        bert.encode(["good", text])


@pytest.mark.parametrize("text", ["a\ud800b", ("a", "\udfff")])
def test_invalid_unicode_is_refused(bert: TextEncoder, text: Any) -> None:
    with pytest.raises(InputError, match=r"text 1 is not valid Unicode: .* at character \d"):
        bert.encode([text])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_that_is_not_a_tokenizer_is_refused(
    engine_copy: Callable[..., Path], content: bytes
) -> None:
    folder = engine_copy("bert")
    spec = read_manifest(folder).tokenizer
    path = folder / spec.file
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged: sha256"):
        TextEncoder(folder, spec)
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        TextEncoder(folder, msgspec.structs.replace(spec, sha256=sha256_of(path)))


def test_a_text_without_any_token_is_refused(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy("bert")
    spec = read_manifest(folder).tokenizer
    path = folder / spec.file
    content = msgspec.json.decode(path.read_bytes())
    content["post_processor"] = None  # which adds the special tokens
    path.write_bytes(msgspec.json.encode(content))
    encoder = TextEncoder(folder, msgspec.structs.replace(spec, sha256=sha256_of(path)))
    assert ids(encoder.encode(["the the"])[0]) == [4, 4]
    with pytest.raises(InputError, match=r"text 2 has no tokens: .*tokenizer\.json adds no"):
        encoder.encode(["the", ""])
