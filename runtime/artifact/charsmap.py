"""The table of a `Precompiled` normalizer, as SentencePiece writes it, read before a library does.

It is the size of a trie, the trie (a double array of 32-bit units, darts-clone), and the texts that
its leaves point into, each ended by a zero byte. The library trusts all of them: a wrong size makes
it take gigabytes, and a wrong offset stops it with a panic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_UNIT_BYTES = 4
# Real tables have some 250 KB, and replace a character by 33 bytes at most.
_MOST_BYTES = 2**20
_LONGEST_TEXT = 256
# The library looks up groups of characters of at most so many bytes.
_LONGEST_KEY = 5


def replacements(charsmap: bytes) -> list[tuple[bytes, bytes]]:
    """What the table replaces, and by what.

    Args:
        charsmap: the table; decoded, if it was in base64.

    Returns:
        Pairs of a key and its replacement.

    Raises:
        ValueError: it is damaged.
    """
    if len(charsmap) > _MOST_BYTES:
        raise ValueError(f"its charsmap has {len(charsmap)} bytes, more than any")
    size = int.from_bytes(charsmap[:_UNIT_BYTES], "little")
    if not _UNIT_BYTES <= size <= len(charsmap) - _UNIT_BYTES or size % _UNIT_BYTES:
        raise ValueError(f"its charsmap of {len(charsmap)} bytes says that its trie has {size}")
    units = np.frombuffer(charsmap, "<u4", size // _UNIT_BYTES, _UNIT_BYTES).astype(np.int64)
    texts = charsmap[_UNIT_BYTES + size :]
    return [(key, _text_at(texts, at)) for key, at in _leaves(units)]


def _leaves(units: NDArray[np.int64]) -> list[tuple[bytes, int]]:
    """The keys of the trie and what their leaves hold, level by level."""
    labels = units & 0x800000FF
    (children,) = np.nonzero((labels > 0) & (labels < 256))
    # The child of a node at n by byte b is at n ^ b, and its label is b.
    nodes = children ^ labels[children]
    order = np.argsort(nodes, kind="stable")
    nodes, children = nodes[order], children[order]
    found: list[tuple[bytes, int]] = []
    at = _offset(units[:1])
    keys = np.zeros((1, 0), np.uint8)
    for _ in range(_LONGEST_KEY):
        first = np.searchsorted(nodes, at, "left")
        counts = np.searchsorted(nodes, at, "right") - first
        total = int(counts.sum())
        if total + len(found) > len(units):
            raise ValueError("the trie of its charsmap is none: parts of it are reached twice")
        shifts = np.repeat(first - np.cumsum(counts) + counts, counts)
        child = children[shifts + np.arange(total)]
        byte = labels[child].astype(np.uint8)[:, None]
        keys = np.concatenate([np.repeat(keys, counts, axis=0), byte], axis=1)
        at = child ^ _offset(units[child])
        leaf = (units[child] >> 8) & 1 == 1
        if (at[leaf] >= len(units)).any():
            raise ValueError("the trie of its charsmap points out of itself")
        values = units[at[leaf]] & 0x7FFFFFFF
        found += [(key.tobytes(), int(v)) for key, v in zip(keys[leaf], values, strict=True)]
    return found


def _offset(units: NDArray[np.int64]) -> NDArray[np.int64]:
    return (units >> 10) << ((units & 0x200) >> 6)


def _text_at(texts: bytes, at: int) -> bytes:
    if at > len(texts):
        raise ValueError("the trie of its charsmap points behind the texts")
    end = texts.find(b"\0", at)
    end = len(texts) if end < 0 else end
    if end - at > _LONGEST_TEXT:
        raise ValueError(f"its charsmap replaces a character by {end - at} bytes, more than any")
    text = texts[at:end]
    text.decode()
    return text
