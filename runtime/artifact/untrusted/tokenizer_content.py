"""Bound how much a tokenizer.json can grow a text, before a library loads it.

The library does what the file says. Three normalizers that each replace a letter by a thousand turn
it into a gigabyte, and a template may add any number of tokens. This module multiplies the
factors by which each part can grow a text, in bytes, and refuses a product that no real tokenizer
comes near. By this count, the tokenizers of BERT, RoBERTa, MPNet, XLM-RoBERTa, CamemBERT, ALBERT,
DeBERTa, ModernBERT, T5, CLIP, Llama and Gemma grow a text at most 12 times.

Unicode normalization is not counted as a factor, because it lengthens a text only once (at most 33
bytes per character). A text that replaces another one is therefore counted in its longest
normalized form, see `_normalized_bytes`.
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

MAX_GROWTH = 256
"""Most bytes that a tokenizer may make of a byte of text, and most parts of a template."""

MAX_WORD = 1024
"""Longest word in characters that a model may split into tokens; real ones have 100."""

# Tokens are copied whole into each result, even where a single character stands for them.
_MAX_TOKEN_CHARACTERS = 1024

_NULL = msgspec.Raw(b"null")


class _Model(msgspec.Struct):
    unk_token: msgspec.Raw = _NULL
    continuing_subword_prefix: msgspec.Raw = _NULL
    end_of_word_suffix: msgspec.Raw = _NULL
    max_input_chars_per_word: int = 0
    merges: msgspec.Raw = _NULL


class _File(msgspec.Struct):
    """The parts of a tokenizer.json that are checked."""

    normalizer: msgspec.Raw = _NULL
    pre_tokenizer: msgspec.Raw = _NULL
    post_processor: msgspec.Raw = _NULL
    added_tokens: msgspec.Raw = _NULL
    model: _Model | None = None


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json that grows texts too much, or is damaged where no library checks it.

    Args:
        path: the file.

    Raises:
        ValueError: what is wrong with the file, for example that it is not JSON.
        OSError: the file cannot be read.
    """
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        normalizer, splitter = _parsed(file.normalizer), _parsed(file.pre_tokenizer)
        growth = _growth(normalizer, "normalizers", _NORMALIZERS)
        growth *= _growth(splitter, "pretokenizers", _SPLITTERS)
        _check_growth("its normalizer and pre-tokenizer make", growth, "bytes of one byte")
        template = _parsed(file.post_processor)
        parts = _growth(template, "processors", _TEMPLATES)
        _check_growth("its post-processor makes", parts, "parts of one text")
        _check_tokens(template)
        _check_tokens(_parsed(file.added_tokens))
        if file.model:
            _check_model(file.model)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a part of it is damaged: {error!r}") from error


def check_added_tokens(tokenizer: Any) -> None:
    """Refuse added tokens that normalize to nothing: the library finds them without end.

    Args:
        tokenizer: of the library, loaded from a file that `check_tokenizer` accepts.

    Raises:
        ValueError: which token it is.
    """
    normalizer = tokenizer.normalizer
    for token in tokenizer.get_added_tokens_decoder().values() if normalizer else ():
        if token.normalized and token.content and not normalizer.normalize_str(token.content):
            raise ValueError(f"its normalizer leaves nothing of the added token {token.content!r}")


def _parsed(part: msgspec.Raw) -> Any:
    return json.loads(bytes(part), object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that occurs twice: the library may use the other value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in it has the same name twice")
    return found


def _check_growth(what: str, growth: float, unit: str) -> None:
    if growth > MAX_GROWTH:
        raise ValueError(f"{what} up to {growth:.3g} {unit}; expected at most {MAX_GROWTH}")


def _check_tokens(part: Any) -> None:
    """Refuse a long text anywhere in a part of the file."""
    if isinstance(part, str) and len(part) > _MAX_TOKEN_CHARACTERS:
        raise ValueError(
            f"it has a token of {len(part)} characters; expected at most {_MAX_TOKEN_CHARACTERS}"
        )
    if isinstance(part, dict | list):
        for child in part.values() if isinstance(part, dict) else part:
            _check_tokens(child)


def _check_model(model: _Model) -> None:
    """Refuse long tokens or words, and merges that end the process.

    The library cuts the prefix off the second token, even if this token begins with something else
    and is cut within a character.
    """
    prefix = _parsed(model.continuing_subword_prefix)
    for token in (_parsed(model.unk_token), prefix, _parsed(model.end_of_word_suffix)):
        _check_tokens(token)
    if model.max_input_chars_per_word > MAX_WORD:
        raise ValueError(
            f"its max_input_chars_per_word is {model.max_input_chars_per_word}; "
            f"expected at most {MAX_WORD}"
        )
    for merge in _parsed(model.merges) or () if prefix else ():
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if not second.startswith(prefix):
            raise ValueError(f"it merges {first!r} and {second!r}, which lacks {prefix!r}")


_Growths = dict[str, Callable[[dict[str, Any]], float]]


def _growth(part: Any, children: str, known: _Growths) -> float:
    """The factor by which a part of the pipeline can grow a text.

    Args:
        part: the part; None: the file has none.
        children: the name under which a sequence lists its parts.
        known: the factor of each type of part.
    """
    if part is None:
        return 1.0
    # The library accepts parts without a type and guesses it; this does not.
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "Sequence":
        return math.prod(_growth(child, children, known) for child in part[children])
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"it has a part of type {kind!r}; known are {', '.join(sorted(known))}")
    return known[kind](part)


def _unchanged(*kinds: str) -> _Growths:
    return dict.fromkeys(kinds, lambda part: 1.0)


def _replace(part: dict[str, Any]) -> float:
    """Each match is replaced; an empty match inserts the content on both sides of a byte."""
    ((kind, pattern),) = part["pattern"].items()
    shortest = len(pattern.encode()) if kind == "String" else _shortest_match(pattern)
    content = _normalized_bytes(part["content"])
    return max(1.0, content / shortest) if shortest else 1.0 + 2 * content


# One character that must match, possibly repeated.
_CHARACTER = r"(?:[^\\^$.|?*+()\[\]{}]|\\[snrtdw]|\[[^\[\]]+\])"
_CERTAIN = re.compile(rf"{_CHARACTER}(\+|\{{(?P<least>[1-9]\d?),?\d{{0,3}}\}})?")


def _shortest_match(pattern: str) -> int:
    """A lower bound of the bytes that a regular expression matches; 0 if it is not obvious."""
    matches = [_CERTAIN.fullmatch(choice) for choice in pattern.split("|")]
    return min(int(match["least"] or 1) if match else 0 for match in matches)


def _precompiled(part: dict[str, Any]) -> float:
    return charsmap_growth(base64.b64decode(part["precompiled_charsmap"], validate=True))


def charsmap_growth(charsmap: bytes) -> float:
    """The factor by which the table of a `Precompiled` normalizer can grow a text.

    The table, in SentencePiece's format, is the size of a trie, the trie, and the texts that
    replace characters, each ended by a zero byte. In real tables they have at most 33 bytes.

    Raises:
        ValueError: the size is wrong, for which the library allocates gigabytes, or a text is not
            UTF-8.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size > len(charsmap) - 4:
        raise ValueError(f"its charsmap of {len(charsmap)} bytes says that its trie has {size}")
    texts = charsmap[4 + size :].decode().split("\0")
    return float(max(1, *map(_normalized_bytes, texts)))


def _normalized_bytes(text: str) -> int:
    """Bytes of a text, each character in the longest of its normalized forms."""
    return sum(
        max(
            len(form.encode())
            for form in (character, unicodedata.normalize("NFKD", character), character.lower())
        )
        for character in text
    )


def _template(part: dict[str, Any]) -> float:
    """How many pieces a template joins; a piece is a text, or one id of a special token."""
    sizes = {name: max(1, len(token["ids"])) for name, token in part["special_tokens"].items()}
    counts = []
    for pieces in (part["single"], part["pair"]):
        texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
        if len(set(texts)) < len(texts):
            raise ValueError("its template has a text twice")
        special = [sizes[p["SpecialToken"]["id"]] for p in pieces if "SpecialToken" in p]
        counts.append(len(texts) + sum(special))
    return float(max(counts))


_NORMALIZERS: _Growths = {
    # It puts a space on both sides of a Chinese character of 3 bytes.
    "BertNormalizer": lambda part: 5 / 3,
    # Each byte becomes a character of at most 2 bytes.
    "ByteLevel": lambda part: 2.0,
    "Precompiled": _precompiled,
    "Prepend": lambda part: 1.0 + _normalized_bytes(part["prepend"]),
    "Replace": _replace,
    **_unchanged("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents"),
}
_SPLITTERS: _Growths = {
    "ByteLevel": lambda part: 3.0,  # as above, and a space in front
    # A space becomes another character, and one may be put in front.
    "Metaspace": lambda part: 1.0 + len(part["replacement"].encode()),
    **_unchanged("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength"),
    **_unchanged("Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
}
_TEMPLATES: _Growths = {
    "TemplateProcessing": _template,
    **_unchanged("BertProcessing", "ByteLevel", "RobertaProcessing"),
}
