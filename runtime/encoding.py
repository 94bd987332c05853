"""Tokenize texts with the tokenizer of the artifact, and pad rows into batches.

The tokenizers library tokenizes a whole text, which takes a hundred bytes or more for each
character, before it truncates it. It keeps all that it cut off, and for a pair it combines every
part of the first text with every part of the second. So `RowTokenizer` gives it only the beginning
of a long text, and truncates and joins the tokens itself, as the library would. A text that comes
several times, such as the query of many pairs, is tokenized once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from .artifact.folder import checked_file
from .artifact.manifest import ATTENTION_BIAS, MASK_FILL, TokenizerSpec
from .artifact.reference import Text as Text
from .artifact.untrusted.tokenizer_content import check_file, check_tokenizer
from .errors import EXPORT_AGAIN, ArtifactError, FpabeeError, InputError, first_line, whole_number

# Texts that are tokenized in one call. The library needs a hundred bytes for each character.
_CHUNK_TEXTS = 256
_CHUNK_CHARACTERS = 2**17

# A text is read to this many characters for each token that is wanted, and this many more. What is
# behind a token can change it only within a word, which is shorter than the margin, or becomes an
# unknown word. The only exception is an added token that takes all spaces before it.
_PER_TOKEN = 8
_MARGIN = 2048
# A text that gives hardly more tokens than are wanted is read to so many times as much.
_MOST_TIMES = 16
# They stand for the tokens of the first and the second text; no vocabulary has such ids.
_FIRST = 2**32 - 1
_SECOND = 2**32 - 2

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]
"""Tensors by name."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One tokenized row.

    Attributes:
        input_ids: `[tokens]` int64.
        token_type_ids: `[tokens]` int64; zeros if the model has no token types.
        truncated: whether the text had more tokens than the model takes.
        pair_start: position of the first token of the second text; None for a single text.
        predicted: of a document of a ranking, its logit as the score of the search predicts it, see
            `first_stage`; 0 without a score.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    truncated: bool
    pair_start: int | None = None
    predicted: float = 0.0

    def __len__(self) -> int:
        return len(self.input_ids)


def padding_values(tokenizer: TokenizerSpec) -> dict[str, float]:
    """The value on padding of each input of segment 1, by the name of the input."""
    return {
        "input_ids": tokenizer.pad_id,
        "token_type_ids": tokenizer.pad_type_id,
        ATTENTION_BIAS: MASK_FILL,
    }


def write_rows(array: NDArray[Any], name: str, rows: Sequence[EncodedRow], padding: float) -> None:
    """Write one model input of some rows into an array, and fill the rest with padding.

    Args:
        array: `[batch, ..., sequence]`, at least as large as the rows.
        name: `input_ids`, `token_type_ids` or `attention_bias`, which is 0 on every token.
        rows: the rows.
        padding: the value on padding.
    """
    array[...] = padding
    for number, row in enumerate(rows):
        array[number, ..., : len(row)] = 0 if name == ATTENTION_BIAS else getattr(row, name)


def padded_inputs(rows: Sequence[EncodedRow], padding: Mapping[str, float]) -> Arrays:
    """Model inputs of one batch, padded to its longest row.

    Args:
        rows: at least one row.
        padding: the value on padding of each input that is wanted, see `padding_values`.

    Returns:
        Arrays in the order of `padding`: token ids and types are `[rows, tokens]` int64, the
        attention bias is `[rows, 1, 1, tokens]` float32.
    """
    batch = len(rows)
    sequence = max(len(row) for row in rows)
    arrays: Arrays = {}
    for name, value in padding.items():
        is_bias = name == ATTENTION_BIAS
        shape = (batch, 1, 1, sequence) if is_bias else (batch, sequence)
        arrays[name] = np.empty(shape, np.float32 if is_bias else np.int64)
        write_rows(arrays[name], name, rows, value)
    return arrays


def padded_batches(
    rows: Sequence[EncodedRow], padding: Mapping[str, float], batch: int
) -> Iterator[Arrays]:
    """Model inputs of rows in batches, see `padded_inputs`.

    Args:
        rows: the rows, which keep their order.
        padding: the value on padding of each input that is wanted, see `padding_values`.
        batch: rows in a batch; the last batch may have fewer.
    """
    for start in range(0, len(rows), batch):
        yield padded_inputs(rows[start : start + batch], padding)


class _Tokens(NamedTuple):
    """The first tokens of a text.

    Attributes:
        ids: at most as many as were wanted.
        total: how many the whole text has; an estimate if it was not read to its end.
    """

    ids: list[int]
    total: int


_NO_TOKENS = _Tokens([], 0)


class RowTokenizer:
    """Tokenizes texts into rows, truncated as the tokenizers library does it.

    Time and memory grow with the limit, and not with the texts. So the number of tokens of a text
    that is not read to its end is estimated. This decides which of two such texts of a pair, the
    longer one, gets an odd token. A text with less than a token for each 128 characters, such as
    one that begins with tens of thousands of spaces, may lose tokens within the limit.

    Args:
        tokenizer: of the library. Its post-processor, truncation and padding are taken out of it.
        limit: longest row in tokens, special tokens included.
        uses_types: whether the model has token types.

    Raises:
        InputError: the limit leaves no room for text, or the post-processor repeats a text.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, uses_types: bool) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._templates = _template(tokenizer, is_pair=False), _template(tokenizer, is_pair=True)
        for template, texts in zip(self._templates, ([_FIRST], [_SECOND, _FIRST]), strict=True):
            if sorted(token for token, _ in template if token in (_FIRST, _SECOND)) != texts:
                raise InputError(
                    "the template of the tokenizer does not take each text once",
                    "use a tokenizer that gives a text, or both texts of a pair, once",
                )
        special = max(len(self._templates[0]) - 1, len(self._templates[1]) - 2)
        if limit <= special:
            raise InputError(
                f"max_length {limit} leaves no room for text beside {special} special tokens",
                f"give `max_length` of at least {special + 1}",
            )
        tokenizer.post_processor = None
        self._tokenizer = tokenizer
        self._limit = limit
        self._uses_types = uses_types

    def rows(self, texts: Sequence[Text], first: int = 0) -> list[EncodedRow]:
        """Tokenize texts or pairs of texts; a row may be empty.

        Args:
            texts: strings, or (text, text_pair) tuples.
            first: the number of the first text in errors; they count from 0, as results do.

        Raises:
            InputError: a text is neither a string nor a pair of strings, or is not valid Unicode
                where it is read.
        """
        most = _MOST_TIMES * characters_read(self._limit)
        for number, text in enumerate(texts, first):
            _check(text, number, most)
        parts = [part for text in texts for part in (text if isinstance(text, tuple) else (text,))]
        distinct = list(dict.fromkeys(parts))
        tokens = first_tokens(self._tokenizer, distinct, self._limit)
        tokens_of = dict(zip(distinct, tokens, strict=True))
        return [
            self._row(text, *map(tokens_of.__getitem__, text))
            if isinstance(text, tuple)
            else self._row(text, tokens_of[text])
            for text in texts
        ]

    def _row(self, text: Text, first: _Tokens, second: _Tokens = _NO_TOKENS) -> EncodedRow:
        pieces = self._templates[isinstance(text, tuple)]
        budget = self._limit - sum(token not in (_FIRST, _SECOND) for token, _ in pieces)
        kept = _longest_first(first.total, second.total, budget)
        kept_of_first, kept_of_second = kept
        texts = {_FIRST: first.ids[:kept_of_first], _SECOND: second.ids[:kept_of_second]}
        ids: list[int] = []
        types: list[int] = []
        pair_start = None
        for token, kind in pieces:
            if token == _SECOND and kept_of_second:
                pair_start = len(ids)
            added = texts.get(token, [token])
            ids += added
            types += [kind] * len(added)
        input_ids = np.array(ids, np.int64)
        token_types = np.array(types, np.int64) if self._uses_types else np.zeros_like(input_ids)
        return EncodedRow(
            input_ids=input_ids,
            token_type_ids=token_types,
            truncated=kept != (first.total, second.total),
            pair_start=pair_start,
        )


def characters_read(most: int) -> int:
    """How many characters of an ordinary text are read for this many tokens."""
    return most * _PER_TOKEN + _MARGIN


def first_tokens(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[_Tokens]:
    """The first tokens of texts, without special tokens.

    Args:
        tokenizer: it truncates nothing, and has no post-processor.
        texts: any texts; only what is read must be valid Unicode.
        most: how many tokens are wanted of each.
    """
    window = characters_read(most)
    beginnings = [text[:window] for text in texts]
    encoded = tokenizer.encode_batch_fast(beginnings, add_special_tokens=False)
    answers = []
    for text, tokens in zip(texts, encoded, strict=True):
        end = window
        # Such as a run of spaces, or an endless word.
        if len(text) > window and len(tokens) < 5 / 4 * most:
            end *= _MOST_TIMES
            tokens = tokenizer.encode(text[:end], add_special_tokens=False)
        total = len(tokens)
        if len(text) > end:
            total = max(most + 1, total * len(text) // end)
        answers.append(_Tokens(tokens.ids[:most], total))
    return answers


def _template(tokenizer: Tokenizer, is_pair: bool) -> list[tuple[int, int]]:
    """The template of a text or a pair, from the post-processor of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        is_pair: whether there is a second text.

    Returns:
        The id and the type of each special token. `_FIRST` and `_SECOND` stand for all tokens of a
        text.
    """
    toy = Tokenizer(WordLevel({"a": _FIRST, "b": _SECOND}, unk_token="a"))
    if tokenizer.post_processor is not None:
        toy.post_processor = tokenizer.post_processor
    encoded = toy.encode("a", "b" if is_pair else None)
    return list(zip(encoded.ids, encoded.type_ids, strict=True))


def _longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
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


class TextEncoder:
    """Tokenizes texts, truncated to the longest sequence that the model takes.

    Args:
        folder: the engines folder.
        spec: the tokenizer's part of the manifest.
        max_length: a shorter limit than the spec's, in tokens, special tokens included.

    Attributes:
        limit: tokens to which rows are truncated.

    Raises:
        ArtifactError: the tokenizer is missing or damaged, or could expand texts without bound, or
            the length in the spec leaves no room for text.
        InputError: `max_length` is not a whole number, or leaves no room for text.
    """

    def __init__(self, folder: Path, spec: TokenizerSpec, max_length: int | None = None) -> None:
        self._path = checked_file(folder, spec.file, spec.sha256)
        self.limit = spec.max_length
        if max_length is not None:
            self.limit = min(self.limit, whole_number("max_length", max_length, InputError))
        with tokenizer_errors(f"{self._path} is not a tokenizer that can be used"):
            tokenizer = read_tokenizer(self._path)
            uses_types = "token_type_ids" in spec.inputs
            try:
                self._tokenizer = RowTokenizer(tokenizer, self.limit, uses_types)
            except InputError as error:
                if self.limit < spec.max_length:  # as the caller asks for
                    raise
                again = f"{EXPORT_AGAIN}: {error.hint}"
                raise ArtifactError(f"{folder}: {error.message}", again) from error

    def encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize texts or pairs of texts.

        Args:
            texts: strings, or (text, text_pair) tuples.

        Returns:
            One row for each text, in their order.

        Raises:
            InputError: a text is neither a string nor a pair of strings, is not valid Unicode
                where it is read, or has no tokens; or a string is given instead of a list.
            ArtifactError: the tokenizer fails on a text.
        """
        return list(self.stream(texts))

    def stream(self, texts: Iterable[Text]) -> Iterator[EncodedRow]:
        """Tokenize any number of texts; while the rows are used, a thread tokenizes the next ones.

        Args:
            texts: strings, or (text, text_pair) tuples; they are read in the caller's thread.

        Raises:
            FpabeeError: as in `encode`.
        """
        if isinstance(texts, str):
            raise InputError("the texts are one string", "give a list: [text]")
        parts = blocks(texts, _counter(), _CHUNK_CHARACTERS, _CHUNK_TEXTS)
        part = next(parts, [])
        following = next(parts, None)
        if following is None:  # a thread would take longer than it saves
            yield from self._rows(part, 0)
            return
        with ThreadPoolExecutor(1) as pool:
            rows: Callable[[], list[EncodedRow]] = partial(self._rows, part, 0)
            first = len(part)
            for part in chain([following], parts):
                ahead = pool.submit(self._rows, part, first)
                yield from rows()
                rows = ahead.result
                first = first + len(part)
            yield from rows()

    def _rows(self, texts: Sequence[Text], first: int) -> list[EncodedRow]:
        with tokenizer_errors(f"{self._path} fails on a text"):
            rows = self._tokenizer.rows(texts, first)
        for number, row in enumerate(rows, first):
            if not len(row):  # a mean over no tokens would be a mean over padding
                raise InputError(
                    f"text {number} has no tokens: {self._path} adds no special tokens",
                    "leave such texts out, or export with a tokenizer that adds special tokens",
                )
        return rows


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, which may be from a stranger.

    Raises:
        ArtifactError: it is damaged, or could take time without bound.
    """
    with tokenizer_errors(f"{path} is not a tokenizer that can be used"):
        content = path.read_bytes()
        check_file(content)
        tokenizer = Tokenizer.from_buffer(content)
        check_tokenizer(tokenizer)
        return tokenizer


@contextmanager
def tokenizer_errors(
    what: str,
    kind: type[FpabeeError] = ArtifactError,
    hint: str = EXPORT_AGAIN,
) -> Iterator[None]:
    """Turn the exceptions of the tokenizers library, and of `check_tokenizer`, into our errors.

    Errors that are ours already pass.

    Args:
        what: what failed.
        kind: class of our error.
        hint: hint of our error.
    """
    try:
        yield
    except FpabeeError:
        raise
    # The library raises Exception itself. A panic of its Rust code is only a BaseException.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {first_line(error)}", hint) from error


def _check(text: object, number: int, most: int) -> None:
    parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
    for part in parts:
        if not isinstance(part, str):
            raise InputError(
                f"text {number} has the type {type(text).__name__}",
                "give a string, or a pair of strings",
            )
        try:
            part[:most].encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} is not valid Unicode: {error.reason} at character "
                f"{error.start + 1}",
                "decode the file as UTF-8, or replace the character",
            ) from error


def characters(text: Text) -> int:
    """Characters of a text or pair; anything else is refused when it is encoded."""
    parts = text if isinstance(text, tuple) else (text,)
    return sum(len(part) for part in parts if isinstance(part, str))


def _counter() -> Callable[[Text], int]:
    """Counts the characters of one text after another; the query of many pairs counts once."""
    before: object = None

    def count(text: Text) -> int:
        nonlocal before
        if isinstance(text, str):
            return len(text)
        first = text[0] if isinstance(text, tuple) and text else ""
        is_repeated = first == before
        before = first
        return characters(text) - (characters(first) if is_repeated else 0)

    return count


def blocks(
    items: Iterable[T], size: Callable[[T], int], most: int, most_items: int | None = None
) -> Iterator[list[T]]:
    """Lists of items, bounded in total size and in number.

    Args:
        items: the items; nothing is read beyond the list that is asked for.
        size: the size of an item.
        most: a list ends when its items have at least this size together.
        most_items: most items in a list; None: any number.
    """
    block: list[T] = []
    total = 0
    for item in items:
        block.append(item)
        total += size(item)
        if total >= most or len(block) == most_items:
            yield block
            block = []
            total = 0
    if block:
        yield block
