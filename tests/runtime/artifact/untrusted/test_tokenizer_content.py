"""The bound on how much a tokenizer grows a text holds, and real tokenizers are far below it."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fpabee.runtime.artifact.untrusted import tokenizer_content
from fpabee.runtime.artifact.untrusted.tokenizer_content import (
    MAX_GROWTH,
    charsmap_growth,
    check_added_tokens,
    check_tokenizer,
)
from fpabee.runtime.encoding import tokenizer_errors
from fpabee.runtime.errors import ArtifactError

Part = dict[str, Any]

NONE: Part = {
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


def written(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(NONE | parts), encoding="utf-8")
    return path


def sequence(*parts: Part, name: str = "normalizers") -> Part:
    return {"type": "Sequence", name: list(parts)}


def replace(pattern: str, content: str, kind: str = "String") -> Part:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def precompiled(*texts: str) -> Part:
    """A table in SentencePiece's format that holds some texts, with an empty trie."""
    charsmap = struct.pack("<I", 1024) + bytes(1024) + "\0".join(texts).encode()
    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }


TABLE = precompiled("صلى الله عليه وسلم", " ", "1/2")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
NFKD, LOWER = {"type": "NFKD"}, {"type": "Lowercase"}
QUOTES = (replace("``", '"'), replace("''", '"'))
SPACES = replace(" {2,}", " ", "Regex")
WORDS = sequence({"type": "WhitespaceSplit"}, METASPACE, name="pretokenizers")
BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}

# As the published models have them.
REAL: dict[str, Part] = {
    "bert, mpnet": {"normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}},
    "modernbert": {"normalizer": {"type": "NFC"}, "pre_tokenizer": BYTES},
    "albert": {
        "normalizer": sequence(*QUOTES, NFKD, {"type": "StripAccents"}, LOWER, TABLE, SPACES),
        "pre_tokenizer": WORDS,
    },
    "xlm-roberta": {
        "normalizer": sequence(STRIP, TABLE, replace(" {2,}", "▁", "Regex")),
        "pre_tokenizer": METASPACE,
    },
    "deberta-v3": {
        "normalizer": sequence(STRIP, TABLE, replace(r"\s{2,}|[\n]", " ", "Regex")),
        "pre_tokenizer": sequence(METASPACE, name="pretokenizers"),
    },
    "llama": {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
}


def growth_of(normalizer: Part | None) -> float:
    return tokenizer_content._growth(normalizer, "normalizers", tokenizer_content._NORMALIZERS)


@pytest.mark.parametrize("family", REAL)
def test_tokenizers_of_real_models_pass(family: str, tmp_path: Path) -> None:
    path = written(tmp_path, **REAL[family])
    check_tokenizer(path)
    Tokenizer.from_file(str(path))


def test_a_real_table_is_below_the_bound() -> None:
    """33 bytes are the most that Unicode makes of a character, and SentencePiece's table holds."""
    normalizer, words = REAL["xlm-roberta"].values()
    growth = growth_of(normalizer)
    assert growth == 33 * 3 / 2
    growth *= tokenizer_content._growth(words, "", tokenizer_content._SPLITTERS)
    assert growth <= MAX_GROWTH


PATTERNS = st.sampled_from(["a", "aa", "", "é", " "])
REGEXES = st.sampled_from(["", "a*", "(?=a)", "a+", " {2,}", "[ab]|é", "^", "a|", "a{3}", r"\s+"])
CONTENTS = st.sampled_from(["", "a", "aé", "   ", "ﷺ", "aaaa"])
PARTS = st.one_of(
    st.builds(replace, PATTERNS, CONTENTS),
    st.builds(replace, REGEXES, CONTENTS, st.just("Regex")),
    st.builds(lambda text: {"type": "Prepend", "prepend": text}, CONTENTS.filter(bool)),
    st.sampled_from([BERT, NFKD, LOWER, {"type": "NFC"}, {"type": "ByteLevel"}, STRIP]),
)


@settings(max_examples=60)
@given(st.lists(PARTS, max_size=4), st.text("aé ﷺİ東b", min_size=1, max_size=12))
def test_no_text_grows_beyond_the_bound(parts: list[Part], text: str) -> None:
    normalizer = sequence(*parts)
    bound = growth_of(normalizer)
    assume(bound <= 10_000)
    tokenizer = Tokenizer.from_str(json.dumps(NONE | {"normalizer": normalizer}))
    assert tokenizer.normalizer is not None
    try:
        with tokenizer_errors("the library"):
            found = tokenizer.normalizer.normalize_str(text)
    except ArtifactError:  # a panic: it does not take every sequence of normalizers
        reject()
    assert len(found.encode()) <= bound * tokenizer_content._normalized_bytes(text)


A_THOUSAND = replace("a", "a" * 1000)
TEMPLATE: Part = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
LONG = {"s": {"id": "s", "ids": [0] * 300, "tokens": ["a"] * 300}}
TWICE = TEMPLATE | {
    "single": [{"SpecialToken": {"id": "s", "type_id": 0}}] * 2,
    "special_tokens": LONG,
}
MANY = TEMPLATE | {"single": [{"SpecialToken": {"id": "s", "type_id": 0}}] * 24}
MANY["special_tokens"] = {"s": {"id": "s", "ids": [0], "tokens": ["a"]}}
HUNDRED = TEMPLATE | {"single": TEMPLATE["single"] * 100}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
ADDED = {"id": 0, "content": "a" * 5000, **FLAGS}

REFUSED: dict[str, tuple[Part, str]] = {
    "nested": ({"normalizer": sequence(sequence(A_THOUSAND))}, "up to 1e.03"),
    "where it may match nothing": (
        {"normalizer": replace("(b+)+", "a" * 299, "Regex")},
        "up to 599 bytes",
    ),
    "by table": ({"normalizer": precompiled("a" * 599)}, "up to 599 bytes"),
    "under another name": (
        {"pre_tokenizer": {"normalizers": [], **sequence(*[BYTES] * 6, name="pretokenizers")}},
        "up to 729 bytes",
    ),
    "no type": ({"normalizer": {"prepend": "a"}}, "part of type None"),
    "a type that is not known": ({"normalizer": {"type": "Append"}}, "of type 'Append'; known"),
    "no content": ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}}}, "damaged"),
    "a template of long tokens": ({"post_processor": TWICE}, "up to 600 parts of one text"),
    "templates of templates": (
        {"post_processor": sequence(MANY, MANY, name="processors")},
        "up to 576 parts of one text",
    ),
    "a text a hundred times": ({"post_processor": HUNDRED}, "its template has a text twice"),
    "endless words": (
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
        "max_input_chars_per_word is 1000000000; expected at most 1024",
    ),
    "an added token": ({"added_tokens": [ADDED]}, "a token of 5000 characters"),
    "no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ä"}}, "ASCII"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_grows_texts_or_is_damaged_is_refused(name: str, tmp_path: Path) -> None:
    parts, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_tokenizer(written(tmp_path, **parts))


def test_an_added_token_that_normalizes_to_nothing_is_refused() -> None:
    """With another token that asks for whole words, one character took all memory."""
    added = [
        {"id": 0, "content": "\u0301", **FLAGS, "normalized": True},
        {"id": 1, "content": "b", **FLAGS, "normalized": True, "single_word": True},
    ]
    exact = [{**added[0], "normalized": False}, added[1]]
    for parts in ({"added_tokens": added}, {"added_tokens": exact, "normalizer": BERT}):
        check_added_tokens(Tokenizer.from_str(json.dumps(NONE | parts)))
    refused = NONE | {"added_tokens": added, "normalizer": BERT}
    with pytest.raises(ValueError, match="leaves nothing of the added token '\u0301'"):
        check_added_tokens(Tokenizer.from_str(json.dumps(refused)))


def test_merges_that_end_the_process_are_refused(tmp_path: Path) -> None:
    """The library cuts the prefix off the second token, here within a character."""
    bpe: Part = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}}
    for prefix, merges in (("##", [["a", "##b"]]), ("##", ["a ##b"]), ("##", []), (None, [])):
        model = {**bpe, "continuing_subword_prefix": prefix, "merges": merges}
        path = written(tmp_path, model=model)
        check_tokenizer(path)
        Tokenizer.from_file(str(path))
    for merges in ([["a", "é"]], ["a é"]):
        model = {**bpe, "continuing_subword_prefix": "b", "merges": merges}
        with pytest.raises(ValueError, match="it merges 'a' and 'é', which lacks 'b'"):
            check_tokenizer(written(tmp_path, model=model))


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    """The library ignores both types and guesses that it is a Replace."""
    path = written(tmp_path, normalizer=A_THOUSAND)
    text = path.read_text().replace('"type": "Replace"', '"type": "NFC", "type": "Replace"')
    normalizer: Any = Tokenizer.from_str(text).normalizer
    assert len(normalizer.normalize_str("a")) == 1000
    path.write_text(text)
    with pytest.raises(ValueError, match="the same name twice"):
        check_tokenizer(path)


def test_a_table_with_a_wrong_size_is_refused() -> None:
    """The library would allocate it. What else is damaged lets it panic, which is an error."""
    with pytest.raises(ValueError, match="says that its trie has 4294967292"):
        charsmap_growth(struct.pack("<I", 2**32 - 4) + b"abcd")
