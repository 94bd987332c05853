"""How much a tokenizer.json can make of a text, told from the file before a library loads it.

The library does what the file says: three normalizers that each replace a letter by a thousand make
a gigabyte of it, and a template may put a text into its own result any number of times. So this
multiplies what each part can grow a text by, in bytes, and refuses what no real tokenizer comes
near: those of BERT, RoBERTa, MPNet, XLM-RoBERTa, CamemBERT, ALBERT, DeBERTa, ModernBERT, T5, CLIP,
Llama and Gemma grow a text at most 12 times by this count.

What Unicode itself grows (one character has up to 33 bytes in NFKD, and 3 become 4 in lower case)
is left out, since it happens once: a text that is replaced is counted as if it were normalized
already, see `_normalized`.
"""

from __future__ import annotations

import base64
import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .charsmap import replacements

MOST_GROWTH = 128
"""Bytes that a tokenizer may make of a byte of text, and parts that a template may have."""

_MOST_BYTES = 2**28
# Tokens are copied whole into each result, also where one character stands for them.
_LONGEST_TOKEN = 1024

_NULL = msgspec.Raw(b"null")


class _File(msgspec.Struct):
    """The parts of a tokenizer.json that tell; the vocabulary is passed over."""

    normalizer: msgspec.Raw = _NULL
    pre_tokenizer: msgspec.Raw = _NULL
    post_processor: msgspec.Raw = _NULL
    added_tokens: msgspec.Raw = _NULL
    model: _Model | None = None


class _Model(msgspec.Struct):
    unk_token: msgspec.Raw = _NULL
    continuing_subword_prefix: msgspec.Raw = _NULL
    end_of_word_suffix: msgspec.Raw = _NULL


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json that is damaged where the library does not look, or grows texts.

    Args:
        path: the file.

    Raises:
        ValueError: what is wrong with it; also of a file that is no JSON.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than any")
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        normalizer, splitter, template, added = (
            json.loads(bytes(part), object_pairs_hook=_without_twins)
            for part in (
                file.normalizer,
                file.pre_tokenizer,
                file.post_processor,
                file.added_tokens,
            )
        )
        growth = _growth(normalizer, "normalizers", _NORMALIZERS)
        growth *= _growth(splitter, "pretokenizers", _SPLITTERS)
        _check_growth("its normalizer and pre-tokenizer make", growth, "bytes of one byte")
        parts = _growth(template, "processors", _TEMPLATES)
        _check_growth("its post-processor makes", parts, "parts of one text")
        _check_tokens(template)
        _check_tokens(added)
        if file.model is not None:
            for name in _Model.__struct_fields__:
                _check_tokens(json.loads(bytes(getattr(file.model, name))))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a part of it is damaged: {error!r}") from error


def _check_growth(what: str, growth: float, unit: str) -> None:
    if growth > MOST_GROWTH:
        raise ValueError(f"{what} up to {growth:.3g} {unit}; expected {MOST_GROWTH} at most")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; where a name is there twice, the library may read the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice in an object")
    return found


_Growths = dict[str, Callable[[dict[str, Any]], float]]


def _growth(part: Any, children: str, known: _Growths) -> float:
    """What a part of the pipeline grows a text by; a sequence has others under `children`."""
    if part is None:
        return 1.0
    # The library takes parts without a type, and guesses it.
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "Sequence":
        return math.prod(_growth(child, children, known) for child in part[children])
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"it has a part of type {kind!r}; known are {', '.join(sorted(known))}")
    return known[kind](part)


def _same(_part: dict[str, Any]) -> float:
    return 1.0


def _replaced(part: dict[str, Any]) -> float:
    """What `Replace` makes of a byte: of each match, or where nothing matches, on both sides."""
    ((kind, pattern),) = part["pattern"].items()
    shortest = len(pattern.encode()) if kind == "String" else _shortest_match(pattern)
    content = _normalized(part["content"])
    return max(1.0, content / shortest) if shortest else 1.0 + 2 * content


# One character after another that must be there, or such ones with | between them.
_CHARACTER = r"(?:[^\\^$.|?*+()\[\]{}]|\\[snrtdw]|\[[^\[\]]+\])"
_CERTAIN = re.compile(rf"{_CHARACTER}(\+|\{{(?P<least>[1-9]\d?),?\d{{0,3}}\}})?")


def _shortest_match(pattern: str) -> int:
    """The least bytes that a regular expression matches; 0 if that is not plain to see."""
    matches = [_CERTAIN.fullmatch(choice) for choice in pattern.split("|")]
    return min(int(match["least"] or 1) if match else 0 for match in matches)


def _prepended(part: dict[str, Any]) -> float:
    return 1.0 + _normalized(part["prepend"])


def _precompiled(part: dict[str, Any]) -> float:
    table = replacements(base64.b64decode(part["precompiled_charsmap"], validate=True))
    return max(
        (
            _normalized(text.decode()) / max(len(key), _normalized(key.decode(errors="ignore")))
            for key, text in table
            if len(text) > len(key)
        ),
        default=1.0,
    )


def _normalized(text: str) -> int:
    """Bytes of a text in the form that has most of them."""
    return sum(
        max(
            len(form.encode())
            for form in (character, unicodedata.normalize("NFKD", character), character.lower())
        )
        for character in text
    )


def _metaspace(part: dict[str, Any]) -> float:
    """A space becomes another character, and one may be put in front."""
    return 1.0 + len(part["replacement"].encode())


def _template(part: dict[str, Any]) -> float:
    """How many pieces a template puts together, each a text or a special token."""
    sizes = {name: max(1, len(token["ids"])) for name, token in part["special_tokens"].items()}
    return max(
        float(sum(sizes[p["SpecialToken"]["id"]] if "SpecialToken" in p else 1 for p in part[name]))
        for name in ("single", "pair")
    )


_NORMALIZERS: _Growths = {
    # It puts a space on both sides of a Chinese character of 3 bytes.
    "BertNormalizer": lambda part: 5 / 3,
    # Each byte becomes a character of 2 at most.
    "ByteLevel": lambda part: 2.0,
    "Precompiled": _precompiled,
    "Prepend": _prepended,
    "Replace": _replaced,
} | dict.fromkeys(
    ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents"), _same
)
_SPLITTERS: _Growths = {
    "ByteLevel": lambda part: 3.0,  # and a space in front
    "Metaspace": _metaspace,
} | dict.fromkeys(
    (
        "BertPreTokenizer",
        "CharDelimiterSplit",
        "Digits",
        "FixedLength",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    ),
    _same,
)
_TEMPLATES: _Growths = {"TemplateProcessing": _template} | dict.fromkeys(
    ("BertProcessing", "ByteLevel", "RobertaProcessing"), _same
)


def _check_tokens(part: Any) -> None:
    """Refuse a long text anywhere in a part of the file."""
    if isinstance(part, str) and len(part) > _LONGEST_TOKEN:
        raise ValueError(f"it has a token of {len(part)} characters; expected {_LONGEST_TOKEN}")
    if isinstance(part, dict | list):
        for child in part.values() if isinstance(part, dict) else part:
            _check_tokens(child)
