"""Operating points: what is chosen for each goal, and how that does on other rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..runtime.artifact.operating_point import Certificate, Goal
from ..runtime.encoding import EncodedRow, Text
from ..runtime.engine import Engine
from ..runtime.errors import InputError
from ..runtime.progress import Progress
from ..runtime.rules.measures import Integers
from ..runtime.rules.rules import Budget, ExitRule
from .choose import Selector
from .costs import CostModel, measure_speedup
from .families import CASCADE, DEFAULT_MEASURES, PER_EXIT
from .goals import CalibrationOptions
from .outcome import Outcome, exits_of, level_of, outcome
from .result import Point, RuleComparison
from .risk import Bound, control, split
from .scoring import LabelledLogits, Scorer

MOST_COMPARED = 6
"""How many kinds of rules are compared."""

# Confidence of the goals that are guaranteed.
_CONFIDENCE = 0.95


def compared_kinds(kinds: Sequence[str], points: Sequence[Point]) -> list[str]:
    """The kinds that are compared: F-PABEE, PABEE, the cascade, those of the points, and others."""
    first = ["fpabee", "pabee", CASCADE, *(point.kind for point in points)]
    others = sorted(kinds, key=lambda kind: kind.endswith(PER_EXIT))
    found = [kind for kind in dict.fromkeys([*first, *others]) if kind in kinds]
    # The same exit for all rows comes last: unless it is asked for, it is only full depth.
    return sorted(found, key=lambda kind: kind == "budget")[:MOST_COMPARED]


def bound_of(goal: Goal) -> Bound:
    """What a guaranteed goal asks for, with 95 % confidence; a bound is never 0 or 1."""
    assert goal.max_drop is not None
    return Bound(min(max(goal.max_drop / 100, 1e-9), 1 - 1e-9), _CONFIDENCE)


@dataclass(frozen=True)
class PointMaker:
    """Chooses settings, and judges them on rows that did not choose them.

    Attributes:
        engine: the engine.
        options: what is asked for.
        progress: reports the current step.
        selector: the settings.
        costs: measured times; the last ones count.
        held: rows to judge on; None means cross-validation on the rows that choose.
    """

    engine: Engine
    options: CalibrationOptions
    progress: Progress
    selector: Selector
    costs: Sequence[CostModel]
    held: LabelledLogits | None

    def points(self, texts: Sequence[Text]) -> tuple[Point, ...]:
        """An operating point for everything that is asked; texts are for measuring speed-ups."""
        encoded = self.engine.encode(texts)
        found = []
        for number, (name, goal) in enumerate(self.options.asked.items()):
            self.progress(f"choose {name}", number, len(self.options.asked))
            found.append(self._point(name, goal, encoded))
        return tuple(found)

    def comparisons(
        self, goal: Goal | Bound, points: Sequence[Point]
    ) -> tuple[RuleComparison, ...]:
        """The best setting of every kind of rule that matters, the fastest first."""
        if not self.options.compare:
            return ()
        if isinstance(goal, Bound):
            goal = goal.as_goal()
        full_depth = Budget(exit=self.selector.stopping_costs.rows.exits[-1])
        kinds, found = compared_kinds(self.selector.search.kinds, points), []
        for number, kind in enumerate(kinds):
            self.progress(f"compare {kind}", number, len(kinds))
            try:
                rule = self.selector.search.choose(goal, [kind]) or full_depth
                chosen_on = self._judge(rule, self.selector.stopping_costs.rows)
                held_out = self._held_out(rule, goal, [kind])
                found.append(RuleComparison(kind, rule, chosen_on, held_out))
            except InputError:  # no setting of this kind is fast enough
                continue
        return tuple(sorted(found, key=lambda comparison: -comparison.chosen_on.estimated))

    def _point(self, name: str, goal: Goal | Bound, encoded: Sequence[EncodedRow]) -> Point:
        rows = self.selector.stopping_costs.rows
        certificate, refusal = None, ""
        if isinstance(goal, Bound) or goal.guaranteed:
            rule, certificate, refusal = self._guaranteed(goal)
            confidence = certificate.confidence / 100 if certificate else _CONFIDENCE
            tested = self.held or rows.take(split(len(rows))[1])
            held_out = self._judge(rule, tested, level_of(confidence))
        else:
            search = self.selector.search
            rule = search.choose(goal, search.kinds) or Budget(exit=rows.exits[-1])
            held_out = self._held_out(rule, goal, search.kinds)
        measured = {
            str(model.batch): measure_speedup(self.engine, encoded, rule, model.batch)
            for model in self.costs
        }
        judged = self._judge(rule, rows)
        return Point(name, goal, rule, judged, held_out, measured, certificate, refusal)

    def _guaranteed(self, goal: Goal | Bound) -> tuple[ExitRule, Certificate | None, str]:
        """The boldest setting whose drop is bounded, and the bound.

        If no setting meets a goal: full depth, None, and what would help.
        """
        costs, options = self.selector.stopping_costs, self.options
        full_depth = Budget(exit=costs.rows.exits[-1])
        bound = goal if isinstance(goal, Bound) else bound_of(goal)
        try:
            rule, certificate = control(costs, bound, options.rules, DEFAULT_MEASURES)
            return rule, certificate, ""
        except InputError as error:
            if isinstance(goal, Bound):
                raise
            # The risk of a goal is its drop.
            return full_depth, None, error.hint.replace("risk", "drop")

    def _held_out(self, rule: ExitRule, goal: Goal, kinds: Collection[str]) -> Outcome:
        """How the choice for a goal does on rows that did not choose.

        These are the test rows, on which the rule itself is judged. Without them, each part of the
        rows is judged with the setting that the other parts choose.
        """
        if self.held is not None:
            return self._judge(rule, self.held)
        costs = self.selector.stopping_costs
        return self._outcome(costs.scorer, self.selector.held_out(goal, kinds))

    def _judge(self, rule: ExitRule, rows: LabelledLogits, level: float = 0.95) -> Outcome:
        """What a rule gives on some rows."""
        scorer = Scorer(rows, self.selector.stopping_costs.scorer.metric)
        return self._outcome(scorer, exits_of(rule, rows), level)

    def _outcome(self, scorer: Scorer, exits: Integers, level: float = 0.95) -> Outcome:
        costs = self.costs[-1].row_costs(scorer.rows.lengths)
        return outcome(scorer, exits, costs, self.engine.manifest.exit_layers, level)
