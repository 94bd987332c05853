"""Read the table of a `Precompiled` normalizer, in SentencePiece's format, before a library does.

The table is the size of a trie, the trie (a double array of 32-bit units, as in darts-clone), and
the texts that the leaves point to, each ended by a zero byte. The tokenizers library trusts all of
them: a wrong size makes it allocate gigabytes, and a wrong offset makes it panic.
"""

from __future__ import annotations

import struct
from collections import defaultdict

_UNIT_BYTES = 4
# Real tables have about 250 KB, and replace a character by 33 bytes at most.
_MAX_BYTES = 2**20
_MAX_TEXT_BYTES = 256
# The library looks up groups of characters of at most this many bytes.
_MAX_KEY_BYTES = 5


def replacements(charsmap: bytes) -> list[tuple[bytes, bytes]]:
    """The replacements of a table.

    Args:
        charsmap: the table, decoded from base64.

    Returns:
        Pairs of a key and its replacement.

    Raises:
        ValueError: the table is damaged.
    """
    if len(charsmap) > _MAX_BYTES:
        raise ValueError(f"its charsmap has {len(charsmap)} bytes; expected at most {_MAX_BYTES}")
    size = int.from_bytes(charsmap[:_UNIT_BYTES], "little")
    if not _UNIT_BYTES <= size <= len(charsmap) - _UNIT_BYTES or size % _UNIT_BYTES:
        raise ValueError(f"its charsmap of {len(charsmap)} bytes says that its trie has {size}")
    units = struct.unpack_from(f"<{size // _UNIT_BYTES}I", charsmap, _UNIT_BYTES)
    texts = charsmap[_UNIT_BYTES + size :]
    return [(key, _text_at(texts, at)) for key, at in _leaves(units)]


def _leaves(units: tuple[int, ...]) -> list[tuple[bytes, int]]:
    """The keys of the trie and the values of their leaves."""
    # The child by byte b of the node with base n is at n ^ b, and its label is b.
    children: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, unit in enumerate(units):
        label = unit & 0x800000FF
        if 0 < label < 256:
            children[place ^ label].append((label, place))
    found: list[tuple[bytes, int]] = []
    visits = 0
    waiting = [(b"", _offset(units[0]))]
    while waiting:
        prefix, parent_base = waiting.pop()
        for byte, place in children.get(parent_base, ()):
            visits += 1
            if visits > len(units):
                raise ValueError("the trie of its charsmap is damaged: a part is reached twice")
            key = prefix + bytes([byte])
            base = place ^ _offset(units[place])
            has_leaf = units[place] >> 8 & 1
            if has_leaf and base >= len(units):
                raise ValueError("the trie of its charsmap points outside itself")
            if has_leaf:
                found.append((key, units[base] & 0x7FFFFFFF))
            if len(key) < _MAX_KEY_BYTES:
                waiting.append((key, base))
    return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _text_at(texts: bytes, at: int) -> bytes:
    if at > len(texts):
        raise ValueError("the trie of its charsmap points beyond the texts")
    end = texts.find(b"\0", at)
    text = texts[at : end if end >= 0 else len(texts)]
    if len(text) > _MAX_TEXT_BYTES:
        raise ValueError(
            f"its charsmap replaces a character by {len(text)} bytes; "
            f"expected at most {_MAX_TEXT_BYTES}"
        )
    text.decode()  # raises ValueError if it is not UTF-8
    return text
