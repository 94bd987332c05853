"""Score against depth: what the settings of the rules that matter give."""

from __future__ import annotations

import numpy as np

from ..calibrate import compared_kinds
from ..result import Calibration
from ..scoring import Scorer
from ..search import exits_of

_SETTINGS = 16


def curves(result: Calibration) -> dict[str, list[tuple[float, float]]]:
    """A curve for each kind of rule that is compared, see `compared_kinds`.

    A curve consists of 16 settings from deep to shallow: of those that are shallow enough, the one
    with the smallest drop. Each is a mean depth in layers and a drop in points, on the rows of the
    calibration or on its test rows.
    """
    search, costs = result.search, result.search.stopping_costs
    rows = result.rows if result.test is None else result.test
    scorer, layers = Scorer(rows, costs.scorer.metric), np.asarray(result.layers)
    found: dict[str, list[tuple[float, float]]] = {}
    for kind in compared_kinds(search.kinds, result.points):
        families = [family for family in search.families if family.kind == kind]
        rules = [rule for family in families for rule in family.rules]
        exits = np.concatenate([family.exits for family in families])
        drops = np.concatenate([costs.drops(family.exits) for family in families])
        depths = layers[result.rows.at(exits)[0]].mean(axis=1)
        found[kind] = []
        for limit in np.linspace(depths.max(), depths.min(), _SETTINGS) + 1e-9:
            best = int(np.where(depths <= limit, drops, np.inf).argmin())
            stops = exits[best].astype(np.int64)
            if result.test is not None:
                stops = exits_of(rules[best], rows)
            depth = float(layers[rows.at(stops)[0]].mean())
            found[kind].append((depth, 100 * (scorer.full_depth - scorer.score(stops))))
    return found
