"""Make a labelled set of voice assistant requests to try the project with.

The sentences come from the patterns in ``demo_vocabulary.py``, in tiers of difficulty: a few words
decide an easy one, while a hard one can only be told by how its parts relate ("remind me to play
the piano", "play jazz, no wait, set an alarm for six"). A small share can't be told at all.

Usage:
    python scripts/make_demo_data.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import click
from demo_vocabulary import (
    CLOSERS,
    CORRECTIONS,
    FILLER_OPENERS,
    INTENTS,
    JOINERS,
    POLITE_OPENERS,
    SHARED,
    SLOTS,
    WITHDRAWALS,
)

LABELS = tuple(intent.label for intent in INTENTS)
DEMO_TEXTS = 20
MAX_INTENTS = 3

_INTENT = {intent.label: intent for intent in INTENTS}
_HELD_OUT_EVERY = 5
_HELD_OUT_SHARE = 0.25
_KEYBOARD_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_FIELD = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\ba (?=[aeiou])")


class Tier(Enum):
    """How much of a sentence has to be understood to name its intent."""

    EASY = "easy"
    """A giveaway word decides."""

    MEDIUM = "medium"
    """Politeness, fillers, typos and looser wordings surround or replace the giveaway word."""

    HARD = "hard"
    """Hints, other intents' words in a minor role, negations, self-corrections."""

    AMBIGUOUS = "ambiguous"
    """The same words are used for two intents."""


TIER_SHARES = {Tier.EASY: 0.38, Tier.MEDIUM: 0.35, Tier.HARD: 0.24, Tier.AMBIGUOUS: 0.03}
MULTI_TIER_SHARES = {Tier.EASY: 0.4, Tier.MEDIUM: 0.3, Tier.HARD: 0.3}


@dataclass(frozen=True)
class Utterance:
    """One sentence with what is known about it.

    Attributes:
        text: The sentence.
        labels: Its intents, in the order of ``LABELS``.
        tier: How hard it is meant to be.
    """

    text: str
    labels: tuple[str, ...]
    tier: Tier


@dataclass(frozen=True)
class Writer:
    """Source of sentences for one split.

    Attributes:
        rng: Where all chance comes from.
        held_out: Whether the slot values kept away from training may be used.
    """

    rng: random.Random
    held_out: bool

    def single(self, label: str, tier: Tier) -> Utterance:
        """Write one sentence with one intent.

        Args:
            label: The intent.
            tier: How hard the sentence shall be.

        Returns:
            The sentence, which may have been written before.
        """
        drafts: dict[Tier, Callable[[str], str]] = {
            Tier.EASY: self._easy,
            Tier.MEDIUM: self._medium,
            Tier.HARD: self._hard,
            Tier.AMBIGUOUS: self._ambiguous,
        }
        return Utterance(self._styled(drafts[tier](label), tier), (label,), tier)

    def multi(self, label: str, tier: Tier) -> Utterance:
        """Write one sentence with one to three intents.

        Args:
            label: An intent that the sentence must have.
            tier: How hard the sentence shall be.

        Returns:
            The sentence, which may have been written before.
        """
        others = self.rng.sample([name for name in LABELS if name != label], MAX_INTENTS)
        count = self.rng.choices(range(1, MAX_INTENTS + 1), weights=(30, 45, 25))[0]
        wanted = [label, *others[: count - 1]]
        self.rng.shuffle(wanted)
        parts = [self._multi_part(name, tier) for name in wanted]
        text = parts[0]
        for part in parts[1:]:
            text = self._fill(self.rng.choice(JOINERS), x=text, y=part)
        if tier is Tier.HARD:
            withdrawn = self._clause(others[-1])
            text = self._fill(self.rng.choice(WITHDRAWALS), x=withdrawn, y=text)
        ordered = tuple(name for name in LABELS if name in wanted)
        return Utterance(self._styled(text, tier), ordered, tier)

    def _multi_part(self, label: str, tier: Tier) -> str:
        # Only bare verb phrases can be joined freely; looser wordings stay a minority.
        if tier is Tier.EASY or self.rng.random() < 0.6:
            return self._clause(label)
        return self._fill(self.rng.choice(_INTENT[label].medium))

    def _easy(self, label: str) -> str:
        text = self._clause(label)
        return self._polite(text) if self.rng.random() < 0.3 else text

    def _medium(self, label: str) -> str:
        if self.rng.random() < 0.35:
            text = self._polite(self._clause(label))
        else:
            text = self._fill(self.rng.choice(_INTENT[label].medium))
        if self.rng.random() < 0.6:
            text = f"{self.rng.choice(FILLER_OPENERS)} {text}"
        return self._close(text) if self.rng.random() < 0.3 else text

    def _hard(self, label: str) -> str:
        kind = self.rng.choices(("indirect", "wrapper", "correction"), weights=(30, 40, 30))[0]
        if kind == "indirect":
            text = self._fill(self.rng.choice(_INTENT[label].indirect))
        else:
            other = self.rng.choice([name for name in LABELS if name != label])
            if kind == "wrapper":
                pattern = self.rng.choice(_INTENT[label].wrappers)
                text = self._fill(pattern, clause=self._embedded(other))
            else:
                pattern = self.rng.choice(CORRECTIONS)
                text = self._fill(pattern, x=self._clause(other), y=self._clause(label))
        return f"{self.rng.choice(FILLER_OPENERS)} {text}" if self.rng.random() < 0.3 else text

    def _ambiguous(self, label: str) -> str:
        text = self._fill(self.rng.choice([s.pattern for s in SHARED if label in s.labels]))
        return f"{self.rng.choice(FILLER_OPENERS)} {text}" if self.rng.random() < 0.5 else text

    def _clause(self, label: str) -> str:
        return self._fill(self.rng.choice(_INTENT[label].easy))

    def _embedded(self, label: str) -> str:
        # "i have to tell me the weather" would make no sense.
        patterns = [line for line in _INTENT[label].easy if " me " not in line]
        return self._fill(self.rng.choice(patterns))

    def _polite(self, text: str) -> str:
        return f"{self.rng.choice(POLITE_OPENERS)} {text}"

    def _close(self, text: str) -> str:
        return f"{text} {self.rng.choice(CLOSERS)}"

    def _fill(self, pattern: str, **parts: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            return parts[name] if name in parts else self._slot(name)

        return _ARTICLE.sub("an ", _FIELD.sub(value, pattern))

    def _slot(self, name: str) -> str:
        trained, held_out = split_slot(name)
        if self.held_out and self.rng.random() < _HELD_OUT_SHARE:
            return self.rng.choice(held_out)
        return self.rng.choice(trained)

    def _styled(self, text: str, tier: Tier) -> str:
        if tier is not Tier.EASY and self.rng.random() < 0.15:
            text = with_typo(text, self.rng)
        # Speech recognisers mostly leave punctuation out, which hides where a part begins.
        if self.rng.random() < 0.6:
            text = text.replace(",", "")
        if self.rng.random() < 0.2:
            text = text[0].upper() + text[1:] + self.rng.choice(("", "."))
        return text


@dataclass
class Registry:
    """Which sentences were given to which split, so that no two splits share one."""

    _owners: dict[str, str] = field(default_factory=dict)
    _used: set[tuple[str, str]] = field(default_factory=set)

    def claim(self, text: str, task: str, split: str) -> bool:
        """Take a sentence for a split unless it is taken.

        Args:
            text: The sentence; upper and lower case count as the same.
            task: The data set it is for. Within one, no sentence comes twice.
            split: The split it is for. Across data sets, a sentence stays with its first split.

        Returns:
            Whether the sentence may be used.
        """
        key = text.casefold()
        if self._owners.setdefault(key, split) != split or (task, key) in self._used:
            return False
        self._used.add((task, key))
        return True


def split_slot(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide a slot's values into those for all splits and those kept away from training.

    Args:
        name: The slot.

    Returns:
        The values for all splits, and the values for dev and test only.
    """
    values = SLOTS[name]
    held_out = values[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    return tuple(value for value in values if value not in held_out), held_out


def with_typo(text: str, rng: random.Random) -> str:
    """Misspell one word of four letters or more, if there is one.

    Args:
        text: The sentence.
        rng: Where chance comes from.

    Returns:
        The sentence with one letter dropped, mistyped or swapped with the next.
    """
    words = list(re.finditer(r"[a-z]{4,}", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start(), word.end() - 1)
    edit = rng.choice((_drop, _swap, _neighbour))
    return edit(text, at, rng)


def _drop(text: str, at: int, _: random.Random) -> str:
    return text[:at] + text[at + 1 :]


def _swap(text: str, at: int, _: random.Random) -> str:
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _neighbour(text: str, at: int, rng: random.Random) -> str:
    row = next(keys for keys in _KEYBOARD_ROWS if text[at] in keys)
    place = row.index(text[at])
    beside = row[max(place - 1, 0) : place] + row[place + 1 : place + 2]
    return text[:at] + rng.choice(beside) + text[at + 1 :]


def build_split(
    task: str, split: str, rows: int, seed: int, registry: Registry
) -> tuple[Utterance, ...]:
    """Write all sentences of one split, with all intents about equally often.

    Args:
        task: ``single`` or ``multi``.
        split: Name of the split. All but ``train`` also get held-out slot values.
        rows: How many sentences to write.
        seed: Same seed, same sentences.
        registry: Keeps the split apart from those written before.

    Returns:
        The sentences in random order.
    """
    rng = random.Random(f"{seed}/{task}/{split}")
    writer = Writer(rng, held_out=split != "train")
    write = writer.single if task == "single" else writer.multi
    shares = TIER_SHARES if task == "single" else MULTI_TIER_SHARES
    labels = [LABELS[row % len(LABELS)] for row in range(rows)]
    tiers = rng.choices(list(shares), weights=list(shares.values()), k=rows)
    utterances = []
    for label, tier in zip(labels, tiers, strict=True):
        utterance = write(label, tier)
        while not registry.claim(utterance.text, task, split):
            utterance = write(label, tier)
        utterances.append(utterance)
    rng.shuffle(utterances)
    return tuple(utterances)


def _rows(task: str, utterances: Iterable[Utterance]) -> Iterator[dict[str, object]]:
    for utterance in utterances:
        if task == "single":
            yield {"text": utterance.text, "label": utterance.labels[0]}
        else:
            yield {"text": utterance.text, "labels": list(utterance.labels)}


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def write_demo_data(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write both data sets and the unlabelled texts.

    Args:
        folder: Where to write; made if it is missing.
        sizes: Number of rows by split.
        seed: Same seed, same bytes.
    """
    registry = Registry()
    for task in ("single", "multi"):
        for split, rows in sizes.items():
            utterances = build_split(task, split, rows, seed, registry)
            lines = [json.dumps(row) for row in _rows(task, utterances)]
            _write_lines(folder / task / f"{split}.jsonl", lines)
        _write_lines(folder / task / "labels.json", [json.dumps(LABELS, indent=2)])
    texts = build_split("single", "texts", DEMO_TEXTS, seed, registry)
    _write_lines(folder / "texts.txt", [utterance.text for utterance in texts])


_ROWS = click.IntRange(min=len(LABELS))


@click.command()
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=7, show_default=True, help="Same seed, same data.")
@click.option("--train-rows", type=_ROWS, default=4000, show_default=True)
@click.option("--dev-rows", type=_ROWS, default=800, show_default=True)
@click.option("--test-rows", type=_ROWS, default=800, show_default=True)
def main(output_dir: Path, seed: int, train_rows: int, dev_rows: int, test_rows: int) -> None:
    """Write labelled demo data with one and with several intents a sentence to OUTPUT_DIR."""
    sizes = {"train": train_rows, "dev": dev_rows, "test": test_rows}
    write_demo_data(output_dir, sizes, seed)
    click.echo(f"Wrote {sum(sizes.values())} rows a data set to {output_dir}")


if __name__ == "__main__":
    main()
