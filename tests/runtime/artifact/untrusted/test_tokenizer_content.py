"""Tokenizers with which the library would not end, or not soon, are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from fpabee.runtime.artifact.untrusted.tokenizer_content import check_tokenizer

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
    check_tokenizer(made(model=model | {"max_input_chars_per_word": 1024}))
    with pytest.raises(ValueError, match="max_input_chars_per_word is 1000000000; expected at"):
        check_tokenizer(made(model=model | {"max_input_chars_per_word": 10**9}))


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
