"""How rows run: the legs that they take, the exits that they see there, and what stops them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..artifact.exits import TOKENS, Exits
from ..backends.base import Backend
from ..backends.buffers import Limits
from ..errors import RuleError
from ..rules.rules import Budget, ExitRule
from ..rules.settling import Runner
from ..tasks import Task


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


@dataclass(frozen=True, eq=False)
class Route:
    """How rows run: a rule, compiled for the exits of the passes that they take.

    Rows of one route may run together. The number of an exit means something only together with
    the route, or with its exits: exit 3 of a quick pass is not exit 3 of the exact pass.

    Attributes:
        task: what the logits mean.
        exits: the exits that rows see.
        legs: the passes that they take, with what runs them. The last one is the exact pass.
        runner: decides which rows stop at which exit.
        point: the operating point whose rule it is; None: it is the rule of no point.
    """

    task: Task
    exits: Exits
    legs: tuple[Leg, ...]
    runner: Runner[Any]
    point: str | None = None

    @classmethod
    def through(cls, task: Task, exits: Exits, backends: Mapping[str, Backend]) -> Route:
        """The route of rows that see all exits.

        Args:
            task: what the logits mean.
            exits: the exits.
            backends: what runs the segments of each target of their passes.
        """
        legs = []
        before = 0
        for each in exits.passes:
            if each.reads == TOKENS:
                backend = backends[each.target]
                silent = each.segments - len(each.layers)
                legs.append(Leg(backend, backend.limits(), before, silent))
                before += len(each.layers)
        runner = task.runner(Budget(exit=exits.last), exits.numbers)
        return cls(task, exits, tuple(legs), runner)

    @property
    def rule(self) -> ExitRule:
        """What stops rows."""
        return self.runner.rule

    @cached_property
    def whole(self) -> Route:
        """The same passes for rows that see all exits."""
        return self.by(Budget(exit=self.exits.last))

    @cached_property
    def _capped(self) -> dict[int | None, Route]:
        return {}

    def by(self, rule: ExitRule, point: str | None = None) -> Route:
        """The same passes by another rule.

        Args:
            rule: the rule.
            point: the operating point whose rule it is.

        Raises:
            RuleError: the rule does not fit the task, or these exits.
        """
        runner = self.task.runner(rule, self.exits.numbers)
        return Route(self.task, self.exits, self.legs, runner, point)

    def fits(self, rule: ExitRule) -> bool:
        """Whether a rule fits the task and these exits."""
        try:
            self.by(rule)
        except RuleError:
            return False
        return True

    def capped(self, max_exit: int) -> Route:
        """The same route, except that no row goes beyond an exit; always the same one for an exit.

        Args:
            max_exit: see `ExitRule.capped`.

        Raises:
            RuleError: there is no such exit.
        """
        rule = self.rule.capped(max_exit)
        if rule.max_exit not in self._capped:
            self._capped.setdefault(rule.max_exit, self.by(rule))
        return self._capped[rule.max_exit]

    def __str__(self) -> str:
        return ", then ".join(f"a pass in {leg.backend.name}" for leg in self.legs)
