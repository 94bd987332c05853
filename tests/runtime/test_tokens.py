"""Long texts are tokenized as the tokenizers library does, but only as far as they are needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import (
    Encoding,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fpabee.runtime import InputError
from fpabee.runtime.encoding import EncodedRow, RowTokenizer, Text, characters_read, first_tokens

SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [
    *("the film", "antidisestablishmentarianism", "naïve", "東京", "!!!", "x" * 130, "a.b/c", "🙂"),
    *("\t \u200b", "i'm", "<mask>"),
]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=SPECIAL, continuing_subword_prefix="##"
    )
    tokenizer.train_from_iterator(WORDS[:5], trainer)
    types = "<s>:0 $A:0 </s>:0", "<s>:0 $A:0 </s>:0 $B:1 </s>:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=types[0], pair=types[1], special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\t", " "), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS[:4] * 4, trainer)
    return tokenizer  # without special tokens


TOKENIZERS = {"wordpiece": wordpiece, "byte level": byte_level, "unigram": unigram}
Make = Callable[[], Tokenizer]


@pytest.fixture(params=TOKENIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    """The same tokenizer at each call."""
    content = TOKENIZERS[request.param]().to_str()
    return lambda: Tokenizer.from_str(content)


def stock(make: Make, limit: int, texts: Sequence[Text]) -> list[Encoding]:
    tokenizer = make()
    tokenizer.enable_truncation(limit)
    return list(tokenizer.encode_batch(list(texts)))


def content(row: EncodedRow) -> tuple[list[int], list[int], bool, int | None]:
    return row.input_ids.tolist(), row.token_type_ids.tolist(), row.truncated, row.pair_start


def expected(text: Text, found: Encoding) -> tuple[list[int], list[int], bool, int | None]:
    second = found.sequence_ids.index(1) if 1 in found.sequence_ids else None
    assert isinstance(text, tuple) or second is None
    return found.ids, found.type_ids, bool(found.overflowing), second


def some_text(rng: random.Random) -> str:
    longest = rng.choice((0, 1, 3, 10, 40))
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))


def test_texts_and_pairs_are_truncated_as_the_library_does(make: Make) -> None:
    rng = random.Random(0)
    for limit in (5, 12, 13):
        texts: list[Text] = [(some_text(rng), some_text(rng)) for _ in range(80)]
        texts += [(text, text) for text in (some_text(rng) for _ in range(20))]
        texts += [some_text(rng) for _ in range(20)]
        rows = RowTokenizer(make(), limit, uses_types=True).rows(texts)
        whole = stock(make, limit, texts)
        for text, row, encoding in zip(texts, rows, whole, strict=True):
            assert content(row) == expected(text, encoding)


STRETCHES: list[Callable[[random.Random], str]] = [
    lambda rng: " " * rng.randrange(9000),
    lambda rng: "a" * rng.randrange(5000),
    lambda rng: "\u200b\u0301 " * rng.randrange(3000),
    lambda rng: "=-" * rng.randrange(2000),
    lambda rng: "\U00013000" * rng.randrange(5000),
    some_text,
    some_text,
]


def test_long_texts_have_the_tokens_of_the_whole_text(make: Make) -> None:
    rng = random.Random(1)
    for limit in (8, 100):
        tokenizer = RowTokenizer(make(), limit, uses_types=True)
        for _ in range(12):
            text = "".join(rng.choice(STRETCHES)(rng) for _ in range(rng.randint(2, 12)))
            (row,) = tokenizer.rows([text])
            (encoding,) = stock(make, limit, [text])
            assert content(row) == expected(text, encoding)


def test_of_two_long_texts_the_longer_one_gets_the_odd_token(make: Make) -> None:
    limit = make().num_special_tokens_to_add(is_pair=True) + 9
    tokenizer = RowTokenizer(make(), limit, uses_types=True)
    longer = "the film " * 40_000
    shorter = "the film " * 30_000
    first, second = tokenizer.rows([(longer, shorter), (shorter, longer)])
    assert len(first) == len(second)
    assert first.truncated
    assert second.truncated
    assert first.pair_start == (second.pair_start or 0) + 1


class Spy:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.total = 0

    def encode(self, text: str, **options: Any) -> Encoding:
        self.total += len(text)
        return self.tokenizer.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> list[Encoding]:
        self.total += sum(map(len, texts))
        return self.tokenizer.encode_batch_fast(texts, **options)


@pytest.mark.parametrize(
    ("text", "times"), [("the film " * 50_000, 1), (" " * 450_000, 17), ("a" * 450_000, 17)]
)
def test_a_long_text_is_read_to_a_limit(text: str, times: int) -> None:
    """Ordinary text is read only at its beginning; spaces and an endless word further."""
    spy: Any = Spy(wordpiece())
    ((ids, total),) = first_tokens(spy, [text], 64)
    assert spy.total == times * characters_read(64)
    assert len(ids) == {"t": 64, " ": 0, "a": 1}[text[0]]
    assert total > 64


def test_the_query_of_many_pairs_is_tokenized_once(make: Make) -> None:
    query = "the film " * 5000
    documents = [f"{number} film" for number in range(100)]
    tokenizer = RowTokenizer(make(), 16, uses_types=True)
    alone = [tokenizer.rows([(query, each)])[0] for each in documents]
    spy: Any = Spy(tokenizer._tokenizer)
    tokenizer._tokenizer = spy
    rows = tokenizer.rows([(query, each) for each in documents])
    assert spy.total == characters_read(16) + sum(map(len, documents))
    assert [content(row) for row in rows] == [content(row) for row in alone]


def test_only_what_may_be_read_must_be_valid(make: Make) -> None:
    tokenizer = RowTokenizer(make(), 8, uses_types=True)
    (row,) = tokenizer.rows(["the film " * 5000 + "\ud800"])
    assert content(row) == content(tokenizer.rows(["the film " * 5000])[0])
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.rows(["the" + " " * 10_000 + "\ud800 film"])
