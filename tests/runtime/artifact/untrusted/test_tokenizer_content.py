"""Tokenizers with which the library would not end, or not soon, are refused."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from tokenizers import Tokenizer

from fpabee.runtime.artifact.untrusted.tokenizer_content import (
    check_file,
    check_tokenizer,
)

NONE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "u": 1}, "unk_token": "u"},
}
BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def made(**parts: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(NONE | parts))


def test_endless_words_are_refused() -> None:
    model = {
        "type": "WordPiece",
        "unk_token": "a",
        "continuing_subword_prefix": "##",
        "vocab": {"a": 0},
    }
    check_tokenizer(made(model=model | {"max_input_chars_per_word": 200}))
    with pytest.raises(ValueError, match="max_input_chars_per_word is 1000000000; expected at"):
        check_tokenizer(made(model=model | {"max_input_chars_per_word": 10**9}))
    with pytest.raises(ValueError, match="max_input_chars_per_word is 1024; expected at most 256"):
        check_tokenizer(made(model=model | {"max_input_chars_per_word": 1024}))


def test_a_word_of_which_each_part_is_a_token_is_refused() -> None:
    """A long text of one letter took half a minute."""
    vocabulary = [[letter * length, -1.0] for letter in "ab" for length in range(1, 65)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
    check_tokenizer(made(model=model))
    vocabulary.append(["a" * 65, -1.0])
    with pytest.raises(ValueError, match="longest token has 65 characters; expected at most 64"):
        check_tokenizer(made(model=model))


def test_an_added_token_that_normalizes_to_nothing_is_refused() -> None:
    """With another token that asks for whole words, one character took all memory."""
    added = [
        {"id": 0, "content": "\u0301", **FLAGS, "normalized": True},
        {"id": 1, "content": "b", **FLAGS, "normalized": True, "single_word": True},
    ]
    exact = [{**added[0], "normalized": False}, added[1]]
    check_tokenizer(made(added_tokens=added))
    check_tokenizer(made(added_tokens=exact, normalizer=BERT))
    with pytest.raises(ValueError, match="leaves nothing of the added token '\u0301'"):
        check_tokenizer(made(added_tokens=added, normalizer=BERT))


def test_a_sound_table_is_taken() -> None:
    """Its trie has one entry: f becomes the text at 2, which the root leads to in two steps."""
    units = {0: 0, ord("f"): 1 << 10 | 1 << 8 | ord("f"), ord("f") ^ 1: 1 << 31 | 2}
    trie = b"".join(struct.pack("<I", units.get(number, 0)) for number in range(256))
    charsmap = base64.b64encode(struct.pack("<I", len(trie)) + trie + b"b\0aa\0").decode()
    parts = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}
    check_file(json.dumps(NONE | parts).encode())
    tokenizer = made(**parts)
    check_tokenizer(tokenizer)
    assert tokenizer.normalizer.normalize_str("fun") == "aaun"
