"""Refuse a tokenizer with which the library would not end, or not soon.

How much memory the library takes for a text is not bounded: as with a graph, a few lines are enough
to ask for more than any machine has.
"""

from __future__ import annotations

from typing import Any

MAX_WORD = 1024
"""Longest word in characters that a model may split into tokens; real ones have 100."""


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse long words, and added tokens that normalize to nothing.

    The time for a word grows with the square of its length, and the library finds such a token
    without end.

    Args:
        tokenizer: of the library.

    Raises:
        ValueError: what is wrong with it.
    """
    longest = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if longest > MAX_WORD:
        raise ValueError(f"its max_input_chars_per_word is {longest}; expected at most {MAX_WORD}")
    normalizer = tokenizer.normalizer
    for token in tokenizer.get_added_tokens_decoder().values() if normalizer else ():
        if token.normalized and token.content and not normalizer.normalize_str(token.content):
            raise ValueError(f"its normalizer leaves nothing of the added token {token.content!r}")
