"""Tokenize texts of any length in memory that grows with the tokens that are wanted.

The tokenizers library tokenizes a whole text, which takes a hundred bytes or more for each
character, before it truncates it. It keeps all that it cut off, and for a pair it combines every
part of the first text with every part of the second. So this module gives it only the beginning of
a long text, and truncates and joins the tokens itself, as the library would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from .artifact.untrusted.tokenizer_content import MAX_WORD

# A text is read to this many characters for each token that is wanted, and this many more. What is
# behind a token can change it only within a word, which is shorter than the margin, or becomes an
# unknown word. The only exception is an added token that takes all spaces before it.
_PER_TOKEN = 8
_MARGIN = 2 * MAX_WORD
# Characters that are kept of a longer stretch that gives no token, such as a run of spaces.
_GAP = 64
# Texts of up to this many characters are tokenized whole where their exact number of tokens counts.
_MOST_COUNTED = 2**16
# They stand for the tokens of the first and the second text; no vocabulary has such ids.
FIRST, SECOND = 2**32 - 1, 2**32 - 2


class Tokens(NamedTuple):
    """The first tokens of a text.

    Attributes:
        ids: at most as many as were wanted.
        total: how many the whole text has.
        is_estimate: whether that is estimated, because the text was not read to its end.
    """

    ids: list[int]
    total: int
    is_estimate: bool = False


def characters_read(most: int) -> int:
    """How many characters of an ordinary text are read for this many tokens."""
    return most * _PER_TOKEN + _MARGIN


def first_tokens(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[Tokens]:
    """The first tokens of texts, without special tokens.

    Args:
        tokenizer: it truncates nothing, and has no post-processor.
        texts: any texts that are valid Unicode within the characters that are read.
        most: how many tokens are wanted of each.
    """
    window = characters_read(most)
    short = [text for text in texts if len(text) <= window]
    found = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    answers = []
    for text in texts:
        if len(text) <= window:
            ids = next(found).ids
            answers.append(Tokens(ids[:most], len(ids)))
        else:
            answers.append(_of_long_text(tokenizer, text, most))
    return answers


def _of_long_text(tokenizer: Tokenizer, text: str, most: int) -> Tokens:
    """Read a text until its first tokens are certain; what gives few tokens is shortened."""
    end = characters_read(most)
    read = text[:end]
    while True:
        found = tokenizer.encode(read, add_special_tokens=False)
        total = len(found)
        if end >= len(text):
            return Tokens(found.ids[:most], total)
        if total > most and max(stop for _, stop in found.offsets[:most]) + _MARGIN <= len(read):
            return Tokens(found.ids[:most], max(most + 1, total * len(text) // end), True)
        read = _shortened(read, found.offsets)
        # At least twice as much as before, so that the time grows linearly with the text.
        more = max(len(read), characters_read(most))
        # Beyond the first characters, which were checked, a text may be invalid Unicode.
        read += text[end : end + more].encode(errors="replace").decode()
        end += more


def total_of(tokenizer: Tokenizer, text: str, tokens: Tokens) -> int:
    """How many tokens a text has; an estimate only if it is very long.

    Args:
        tokenizer: as in `first_tokens`.
        text: the text.
        tokens: what `first_tokens` gave for it.
    """
    if not tokens.is_estimate or len(text) > _MOST_COUNTED:
        return tokens.total
    whole = text.encode(errors="replace").decode()  # only its beginning was checked
    return len(tokenizer.encode_batch_fast([whole], add_special_tokens=False)[0])


def _shortened(text: str, offsets: Sequence[tuple[int, int]]) -> str:
    """A text that gives the same tokens, without most of what gives none or a single one.

    No token of a vocabulary has as many characters as the margin: a longer stretch is an unknown
    word, and stays one.

    Args:
        text: the text.
        offsets: where each token begins and ends.
    """
    parts, at = [], 0
    for start, stop in offsets:
        if stop > at:
            start = max(start, at)
            parts += [
                _without_middle(text[at:start], _GAP),
                _without_middle(text[start:stop], _MARGIN),
            ]
            at = stop
    return "".join((*parts, _without_middle(text[at:], _GAP)))


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most // 2] + text[-most // 2 :]


def template(tokenizer: Tokenizer, is_pair: bool) -> list[tuple[int, int]]:
    """What the post-processor of a tokenizer makes of a text or a pair.

    Args:
        tokenizer: the tokenizer.
        is_pair: whether there is a second text.

    Returns:
        The id and the type of each special token. `FIRST` and `SECOND` stand for all tokens of a
        text.
    """
    toy = Tokenizer(WordLevel({"a": FIRST, "b": SECOND}, unk_token="a"))
    if tokenizer.post_processor is not None:
        toy.post_processor = tokenizer.post_processor
    found = toy.encode("a", "b" if is_pair else None)
    return list(zip(found.ids, found.type_ids, strict=True))


def longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens of each text of a pair are kept, as in the strategy of this name.

    The tokens are taken from the longer text; if both have more than half of the budget, they share
    it, and the longer one gets the odd token.

    Args:
        first: tokens of the first text.
        second: tokens of the second text.
        budget: tokens that both may have together.
    """
    if first + second <= budget:
        return first, second
    shorter = min(first, second, budget // 2)
    longer = budget - shorter
    return (shorter, longer) if first <= second else (longer, shorter)
