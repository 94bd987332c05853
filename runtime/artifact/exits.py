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
    """One way through the model, with an exit after each of its segments, or after the last one.

    A pass without segments has one exit, exit 0, which answers before layer 1.

    Attributes:
        reads: `tokens`, which segments run; or without segments the `ngrams` of a row, see
            `fpabee.runtime.exit_0`, or the `scores` of a search, see `fpabee.runtime.first_stage`.
        layers: `[exits]` after how many of its encoder layers each of its exits stands.
        segments: how many segments run. Its exits are after the last ones.
        target: the target whose segments run, or empty for the engine's own.
    """

    reads: str
    layers: tuple[int, ...]
    segments: int = 0
    target: str = ""


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
        after = tuple(layer for layer in layers if layer)
        return cls((*before, Pass(TOKENS, after, len(after))))

    @classmethod
    def numbered(cls, first: int, count: int) -> Exits:
        """So many exits from a number, 0 or 1, with one layer between two of them."""
        return cls.of_layers(range(first, first + count))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """`[exits]` after how many encoder layers of its pass each exit stands, 0 for exit 0."""
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
        """After how many layers of its pass each of some exits stands.

        Args:
            exits: their numbers, in any shape.

        Returns:
            The numbers of layers, in the same shape.
        """
        depths: NDArray[np.integer[Any]] = self._depths[exits - self.first]
        return depths

    @cached_property
    def _depths(self) -> NDArray[np.intp]:
        return np.array(self.layers, np.intp)

    def ran(self, exits: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """How many layers have run at each of some exits, in all passes; as in `depths`."""
        ran: NDArray[np.integer[Any]] = self._ran[exits - self.first]
        return ran

    @cached_property
    def _ran(self) -> NDArray[np.intp]:
        return np.array(self.layers_ran, np.intp)

    @cached_property
    def layers_ran(self) -> tuple[int, ...]:
        """`[exits]` how many layers have run at each exit, in all passes."""
        before = 0
        ran: list[int] = []
        for each in self.passes:
            ran += [before + layer for layer in each.layers]
            before += each.layers[-1]
        return tuple(ran)

    @cached_property
    def layers_left(self) -> tuple[int, ...]:
        """`[exits]` how many layers a row has yet to run to full depth, after each exit.

        After a quick pass, these are all layers of the exact pass.
        """
        *before, last = self.passes
        full = last.layers[-1]
        starts = [full] * sum(len(each.layers) for each in before)
        return (*starts, *(full - layer for layer in last.layers))

    def from_first_layer(self) -> Exits:
        """The exits of the passes with segments only: all but exit 0."""
        return Exits(tuple(each for each in self.passes if each.reads == TOKENS))

    @cached_property
    def quick(self) -> str:
        """The target of the quick pass, or empty without one."""
        return next((each.target for each in self.passes if each.target), "")


def exits_of(manifest: Manifest, quick: str = "") -> Exits:
    """The exits of the model of an engines folder.

    Args:
        manifest: that of the folder.
        quick: the target of the quick pass, or empty without one. Rows in doubt at the last exit of
            a quick pass run all segments again, in the engine's own target, and have one exit at
            the end.
    """
    before = {NGRAMS: manifest.exit_0, SCORES: manifest.first_stage}
    passes = [Pass(reads, (0,)) for reads, spec in before.items() if spec is not None]
    layers = tuple(segment.layer for segment in manifest.segments)
    segments = len(layers)
    if not quick:
        return Exits((*passes, Pass(TOKENS, layers, segments)))
    first = Pass(TOKENS, layers, segments, quick)
    return Exits((*passes, first, Pass(TOKENS, layers[-1:], segments)))
