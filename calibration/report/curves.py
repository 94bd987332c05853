"""Score against depth: what the settings of the rules that matter give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..calibrate import ALWAYS_SHOWN
from ..result import Calibration, Point
from ..scoring import Scorer
from ..search import CASCADE, PER_EXIT, exits_of

_SETTINGS = 16
_MOST_KINDS = 6


def curves(result: Calibration) -> dict[str, list[tuple[float, float]]]:
    """A curve for each kind of rule that is shown, see `shown_kinds`.

    A curve consists of 16 settings from deep to shallow: of those that are shallow enough, the one
    with the smallest drop. Each is a mean depth in layers and a drop in points, on the rows of the
    calibration or on its test rows.
    """
    search = result.search
    costs = result.search.stopping_costs
    rows = result.rows if result.test is None else result.test
    scorer = Scorer(rows, costs.scorer.metric)
    layers = np.asarray(result.layers)
    points_by_kind: dict[str, list[tuple[float, float]]] = {}
    for kind in shown_kinds(search.kinds, result.points):
        families = [family for family in search.families if family.kind == kind]
        rules = [rule for family in families for rule in family.rules]
        exits = np.concatenate([family.exits for family in families])
        drops = np.concatenate([costs.drops(family.exits) for family in families])
        depths = layers[result.rows.at(exits)[0]].mean(axis=1)
        points_by_kind[kind] = []
        for limit in np.linspace(depths.max(), depths.min(), _SETTINGS) + 1e-9:
            best = int(np.where(depths <= limit, drops, np.inf).argmin())
            stops = exits[best].astype(np.int64)
            if result.test is not None:
                stops = exits_of(rules[best], rows)
            depth = float(layers[rows.at(stops)[0]].mean())
            points_by_kind[kind].append((depth, 100 * (scorer.full_depth - scorer.score(stops))))
    return points_by_kind


def shown_kinds(kinds: Sequence[str], points: Sequence[Point]) -> list[str]:
    """The kinds that get a curve: F-PABEE, PABEE, the cascade, those of the points, and others."""
    first = [*ALWAYS_SHOWN, CASCADE, *(point.kind for point in points)]
    others = sorted(kinds, key=lambda kind: kind.endswith(PER_EXIT))
    shown = [kind for kind in dict.fromkeys([*first, *others]) if kind in kinds]
    # The same exit for all rows comes last: unless it is asked for, it is only full depth.
    return sorted(shown, key=lambda kind: kind == "budget")[:_MOST_KINDS]
