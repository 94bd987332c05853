"""Legs: the passes of rows through the segments of targets, with what runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..artifact.exits import TOKENS, Exits
from ..backends.base import Backend
from ..backends.buffers import Limits


@dataclass(frozen=True, eq=False)
class Leg:
    """A pass through all segments of one target.

    Attributes:
        backend: runs the segments.
        limits: the shapes that it runs.
        before: the exit before its first one; 0 before exit 1.
        silent: how many segments at its beginning have no exit.
    """

    backend: Backend
    limits: Limits
    before: int = 0
    silent: int = 0

    def exit_after(self, segments: int) -> int:
        """The exit that was read last when so many of its segments have run."""
        silent = self.silent
        return self.before + (segments - silent if segments > silent else 0)

    def segments_to_exit(self, segments: int) -> int:
        """How many segments run until the next exit when so many have run."""
        return max(1, self.silent + 1 - segments)


def legs_of(exits: Exits, backends: Mapping[str, Backend]) -> tuple[Leg, ...]:
    """The legs of rows that see some exits.

    Args:
        exits: the exits.
        backends: what runs the segments of each target; the empty name is the engine's own.
    """
    legs = []
    before = 0
    for each in exits.passes:
        if each.reads == TOKENS:
            backend = backends[each.target]
            silent = each.segments - len(each.layers)
            legs.append(Leg(backend, backend.limits(), before, silent))
            before += len(each.layers)
    return tuple(legs)
