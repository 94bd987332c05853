"""Score against speed-up: what the settings of the rules that matter give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...runtime.progress import Progress
from ...runtime.rules.base import ExitRule
from ..families import Family
from ..outcome import exits_of, outcome
from ..points import compared_kinds
from ..result import Calibration
from ..scoring import Scorer

_SPEEDS = 16


@dataclass(frozen=True)
class FrontSetting:
    """The setting with the smallest drop among those that are fast enough.

    Attributes:
        curve: the kind of rule.
        rule: the setting.
        estimated_speedup: by measured times of the segments.
        drop: in points, on the rows of the calibration or on its test rows. If a rule was fitted to
            rows, each row was judged by a rule that was fitted to other rows.
        mean_depth: in layers, on the same rows.
    """

    curve: str
    rule: ExitRule
    estimated_speedup: float
    drop: float
    mean_depth: float


def rule_fronts(result: Calibration, progress: Progress) -> list[FrontSetting]:
    """A curve for each kind of rule that is compared, see `compared_kinds`."""
    found = []
    kinds = compared_kinds(result.selector.search.kinds, result.points)
    for number, kind in enumerate(kinds):
        progress(f"report: {kind}", number, len(kinds))
        families = [family for family in result.selector.search.families if family.kind == kind]
        found += list(_curve(result, families))
    return found


def _curve(result: Calibration, families: list[Family]) -> Iterator[FrontSetting]:
    """About 16 settings that no other setting beats, from slow to fast."""
    costs = result.selector.stopping_costs
    rows = result.rows if result.test is None else result.test
    scorer = Scorer(rows, costs.scorer.metric)
    seconds = result.costs[-1].row_costs(rows.lengths)
    rules = [rule for family in families for rule in family.rules]
    exits = np.concatenate([family.exits for family in families])
    once = np.ones((len(result.rows), 1))
    drops = np.concatenate([costs.drops(family.exits, once)[:, 0] for family in families])
    times = np.concatenate([costs.mean_costs(family.exits, once)[:, 0] for family in families])
    for limit in np.geomspace(times.max(), times.min(), _SPEEDS) * (1 + 1e-9):
        best = int(np.where(times <= limit, drops, np.inf).argmin())
        rule, stops = rules[best], exits[best].astype(np.int64)
        if result.test is not None:
            stops = exits_of(rule, rows)
        held = outcome(scorer, stops, seconds, result.layers)
        yield FrontSetting(families[0].kind, rule, held.estimated, held.drop, held.mean_depth)
