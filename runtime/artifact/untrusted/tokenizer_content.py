"""Refuse a tokenizer with which the library would panic, or would not end, or not soon.

How much memory the library takes for a text is not bounded: as with a graph, a few lines are enough
to ask for more than any machine has.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from tokenizers.models import Unigram

# Longest word in characters that a WordPiece model may split into tokens. Real ones have 100, or
# 200. The time for a word grows with the third power of its length.
_MAX_WORD = 256
# Longest token in characters of a Unigram model; SentencePiece makes none above 16. For each
# character of a text, all tokens that begin there are tried.
_MAX_TOKEN = 64


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse long words, long tokens, damaged tables, and added tokens that normalize to nothing.

    The library finds an added token that normalizes to nothing without end.

    Args:
        tokenizer: of the library.

    Raises:
        ValueError: what is wrong with it.
    """
    longest = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if longest > _MAX_WORD:
        raise ValueError(f"its max_input_chars_per_word is {longest}; expected at most {_MAX_WORD}")
    if isinstance(tokenizer.model, Unigram):
        token = max(tokenizer.get_vocab(with_added_tokens=False), key=len, default="")
        if len(token) > _MAX_TOKEN:
            problem = f"its longest token has {len(token)} characters"
            raise ValueError(f"{problem}; expected at most {_MAX_TOKEN}")
    normalizer = tokenizer.normalizer
    if normalizer:
        _check_tables(msgspec.json.decode(normalizer.__getstate__()))
    for token in tokenizer.get_added_tokens_decoder().values() if normalizer else ():
        if token.normalized and token.content and not normalizer.normalize_str(token.content):
            raise ValueError(f"its normalizer leaves nothing of the added token {token.content!r}")


class _Parts(msgspec.Struct):
    """The part of tokenizer.json that is read."""

    normalizer: Any = None


def check_file(content: bytes) -> None:
    """Refuse a tokenizer.json with a damaged table of SentencePiece.

    The library would panic while it reads the table, or later, in the midst of a text. It prints a
    panic on standard error before anyone can catch it.

    Args:
        content: the content of the file.

    Raises:
        ValueError: what is wrong with it.
        RecursionError: it is nested too deeply.
    """
    _check_tables(msgspec.json.decode(content, type=_Parts).normalizer)


def _check_tables(normalizer: Any) -> None:
    for table in _tables(normalizer):
        try:
            is_sound = _is_sound(base64.b64decode(table, validate=True))
        except (TypeError, ValueError):
            is_sound = False
        if not is_sound:
            raise ValueError("its precompiled_charsmap is damaged")


def _tables(part: Any) -> Iterator[Any]:
    """The tables in a part of a tokenizer."""
    for name, value in part.items() if isinstance(part, dict) else ():
        if name == "precompiled_charsmap":
            yield value
        yield from _tables(value)
    for value in part if isinstance(part, list) else ():
        yield from _tables(value)


def _is_sound(table: bytes) -> bool:
    """Whether no text leads out of a table that maps characters to others.

    It holds the size of a trie in bytes, the trie as a double array of darts-clone, and the texts
    to which it maps. A unit of the array holds the offset to its children, which are found by XOR
    with a byte. Blocks of 256 units are whole, so all children of a unit are within the array if
    the first one is.

    Raises:
        ValueError: the texts are not valid UTF-8.
    """
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :]
    texts.decode()
    if size == 0 or size % 1024 or len(table) < 4 + size:
        return False
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    is_node = units >> 31 == 0  # the others hold values
    is_node[0] = True  # the root is read in any case
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 1 << 9) >> 6))
    if (children[is_node] >= len(units)).any():
        return False
    has_value = is_node & (units >> 8 & 1 == 1)
    values = units[children[has_value]] & 2**31 - 1
    # No text begins within a character.
    begins = np.frombuffer(texts + b"\0", np.uint8) & 0xC0 != 0x80
    return bool((values < len(begins)).all() and begins[values].all())
