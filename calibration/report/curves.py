"""Score against depth: what the settings of each rule give."""

from __future__ import annotations

import numpy as np

from ..result import Calibration
from ..scoring import Scorer
from ..settings import StopScores, exits_of

_MARKS = 16


def curves(result: Calibration) -> dict[str, list[tuple[float, float]]]:
    """A curve for each rule that may be chosen.

    A curve consists of 16 settings from deep to shallow: of those that are shallow enough, the one
    with the smallest drop. Each is a mean depth in layers and a drop in points, on the rows of the
    calibration or on its test rows.
    """
    rows = result.rows if result.test is None else result.test
    scorer = Scorer(rows, result.search.stopping_costs.scorer.metric)
    layers = np.asarray(result.layers)
    stop = StopScores(result.rows)
    curve_of: dict[str, list[tuple[float, float]]] = {}
    tried = result.search.tried
    for name in dict.fromkeys(each.settings[0].name for each in tried):
        mine = [each for each in tried if each.settings[0].name == name]
        rules = [rule for each in mine for rule in each.settings]
        drops = np.concatenate([each.drops for each in mine])
        exits = np.concatenate([stop.exits(each.settings) for each in mine])
        depths = layers[result.rows.at(exits)[0]].mean(axis=1)
        curve_of[name] = []
        for limit in np.linspace(depths.max(), depths.min(), _MARKS) + 1e-9:
            best = int(np.where(depths <= limit, drops, np.inf).argmin())
            stops = exits_of(rules[best], rows)
            depth = float(layers[rows.at(stops)[0]].mean())
            curve_of[name].append((depth, 100 * (scorer.full_depth - scorer.score(stops))))
    return curve_of
