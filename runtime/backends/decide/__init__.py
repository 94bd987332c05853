"""Exit rules on a GPU: `decide.h` does what `RuleRunner` does, between segments of a CUDA graph.

`gather.h` copies the rows that go on into another group.

A rule consists of at most two signals there: a row stops at once where its answer is sure, or
after `patience` consecutive exits where it is settled. Each signal compares a score with a
threshold for each exit.

`decide.ptx` was made from `decide.cu` by NVRTC 12.4 for compute capability 7.5. The driver
compiles it for the GPU that is there, so neither a compiler nor a file for each GPU is needed.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...artifact.manifest import ProblemType
from ...rules.base import ExitRule
from ...rules.measures import Measure
from ...rules.rules import RULES, Budget, Epee, FPabee

PTX = Path(__file__).with_name("decide.ptx")
"""The compiled kernels `decide_exit` and `gather_rows`."""

GATHER = np.dtype(
    [
        *((name, np.uint64) for name in ("to", "pitch", "fill")),
        ("sources", np.uint64, (256,)),
        ("widths", np.uint32, (256,)),
    ]
)
"""What `gather` in `gather.h` reads: addresses, sizes in bytes, and the bytes of padding."""

MOST_ROWS = 32
"""Larger groups run segment by segment; the 8 warps of a block share the rows."""

SCORES = (
    *("none", *(measure.value for measure in Measure), "changed"),
    *("entropy", "confidence", "energy", "learned"),
)
"""The scores that `decide.h` computes, in its order; it negates `confidence`."""

_INTEGERS = (
    *("labels", "exits", "multi_label", "has_exit_0", "sure", "settled"),
    *("patience", "min_exit", "max_exit", "unused"),
)


def board_type(exits: int, labels: int, rows: int) -> np.dtype[np.void]:
    """The memory that `decide` works on: settings, then the state of each row, then all logits.

    `stops` is the exit of a row, 0 while it goes on, and not 0 for a row of padding. `logits` is
    `[exits + 1, rows, labels]`, where those of exit 0 come first.

    Args:
        exits: exits after a layer.
        labels: number of labels.
        rows: rows of the group, rows of padding included.
    """
    return np.dtype(
        [
            *((name, np.int32) for name in _INTEGERS),
            ("sure_below", np.float64, (exits,)),
            ("settled_below", np.float64, (exits,)),
            ("label_thresholds", np.float64, (labels,)),
            ("label_weights", np.float64, (labels,)),
            ("weights", np.float64, (exits * 5,)),
            ("stops", np.int32, (rows,)),
            ("streaks", np.int32, (rows,)),
            ("logits", np.float32, (exits + 1, rows, labels)),
        ]
    )


@functools.lru_cache(maxsize=64)
def settings_of(
    rule: ExitRule,
    problem_type: ProblemType,
    exits: range,
    labels: int,
    label_thresholds: tuple[float, ...] = (),
) -> NDArray[np.uint8] | None:
    """The settings of a rule as the first bytes of a board.

    Exit 0 is not part of them: the host asks it before anything is sent to the device.

    Args:
        rule: the rule.
        problem_type: the type of the task.
        exits: the numbers of the exits of the model.
        labels: number of labels.
        label_thresholds: see `Task.label_thresholds`.

    Returns:
        The bytes; None for a rule that `decide` does not know, or that does not fit the model.
    """
    is_multi = problem_type is ProblemType.MULTI_LABEL
    if RULES.get(rule.name) is not type(rule):
        return None
    board = np.zeros((), board_type(exits[-1], labels, 0))
    board["labels"], board["exits"], board["has_exit_0"] = labels, exits[-1], exits[0] == 0
    board["multi_label"], board["label_thresholds"] = is_multi, label_thresholds or 0.5
    board["patience"], board["min_exit"] = rule.signals_needed, rule.min_exit
    board["max_exit"] = exits[-1] if rule.max_exit is None else rule.max_exit
    thresholds = rule.stop_thresholds
    if rule.name in ("pcee", "epee"):  # the device does not normalise the entropy
        thresholds = thresholds * (labels * math.log(2) if is_multi else math.log(max(2, labels)))
    kind = {"pabee": "changed", "pcee": "entropy"}.get(rule.name, rule.name)
    if isinstance(rule, Budget):
        kind, thresholds = "none", np.zeros(1)
        board["max_exit"] = min(board["max_exit"], max(rule.exit, rule.min_exit))
    elif isinstance(rule, FPabee):
        kind = rule.measure.value
    elif isinstance(rule, Epee):
        board["sure"], board["sure_below"] = SCORES.index("entropy"), thresholds
        kind, thresholds = "changed", np.full(1, 0.5)
    board["settled"], board["settled_below"] = SCORES.index(kind), thresholds
    return np.frombuffer(board.tobytes(), np.uint8)
