"""The exits of a model, made of passes through its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest

NGRAMS = "ngrams"
SCORES = "scores"
TOKENS = "tokens"


@dataclass(frozen=True)
class Pass:
    """One way through the model, with an exit after each of its segments.

    A pass without segments has one exit, exit 0, which answers before layer 1.

    Attributes:
        reads: `tokens`, which segments run; or without segments the `ngrams` of a row, see
            `fpabee.runtime.exit_0`, or the `scores` of a search, see `fpabee.runtime.first_stage`.
        layers: `[exits]` how many encoder layers have run at each of its exits.
    """

    reads: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Exits:
    """The exits of a model in the order in which rows see them.

    Attributes:
        passes: the passes, in the order in which they run.
    """

    passes: tuple[Pass, ...]

    @classmethod
    def of_layers(cls, layers: Sequence[int]) -> Exits:
        """The exits after these layers, such as `Manifest.exit_layers`; 0 is exit 0."""
        before = tuple(Pass(NGRAMS, (0,)) for layer in layers if layer == 0)
        return cls((*before, Pass(TOKENS, tuple(layer for layer in layers if layer))))

    @classmethod
    def numbered(cls, first: int, count: int) -> Exits:
        """So many exits from a number, 0 or 1, with one layer between two of them."""
        return cls.of_layers(range(first, first + count))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """`[exits]` how many encoder layers have run at each exit, 0 for exit 0."""
        return tuple(layer for each in self.passes for layer in each.layers)

    @cached_property
    def numbers(self) -> range:
        """The numbers of the exits: from 0 if there is an exit 0, else from 1."""
        first = min(1, self.layers[0])
        return range(first, first + len(self.layers))

    @cached_property
    def first(self) -> int:
        """The number of the first exit, 0 or 1."""
        return self.numbers[0]

    @cached_property
    def last(self) -> int:
        """The number of the last exit: full depth."""
        return self.numbers[-1]

    @cached_property
    def before_layers(self) -> range:
        """The numbers of the exits that answer before layer 1: exit 0, or none."""
        return range(self.first, 1)

    def __len__(self) -> int:
        return len(self.layers)

    def place(self, exits: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Where arrays `[exits, ...]` hold what belongs to these exits; of the same shape."""
        return exits - self.first

    def depths(self, exits: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """How many layers run for rows that stop at these exits; of the same shape."""
        depths: NDArray[np.integer[Any]] = self._depths[exits - self.first]
        return depths

    @cached_property
    def _depths(self) -> NDArray[np.intp]:
        return np.array(self.layers, np.intp)

    def from_first_layer(self) -> Exits:
        """The exits of the passes with segments only: all but exit 0."""
        return Exits(tuple(each for each in self.passes if each.reads == TOKENS))


def exits_of(manifest: Manifest) -> Exits:
    """The exits of the model of an engines folder."""
    before = {NGRAMS: manifest.exit_0, SCORES: manifest.first_stage}
    passes = [Pass(reads, (0,)) for reads, spec in before.items() if spec is not None]
    layers = tuple(segment.layer for segment in manifest.segments)
    return Exits((*passes, Pass(TOKENS, layers)))
