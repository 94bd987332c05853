"""Rows as people read them: the text, the true labels, and the answers of the exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...runtime.rules.measures import Integers
from ..outcome import exits_of
from ..result import Calibration

Names = tuple[str, ...]


@dataclass(frozen=True)
class TextRow:
    """One row of the calibration.

    Attributes:
        line: line of the row in its file, from 1.
        text: the text; None if the report has no texts.
        text_pair: the second text of a pair.
        labels: the true labels; None if the row has none.
        answers: the predicted labels by exit, in order.
        right: whether the answer of each exit is right; without labels, whether it is the answer
            of the last exit.
        exits: where each operating point stops the row, by the point's name.
    """

    line: int
    text: str | None
    text_pair: str | None
    labels: Names | None
    answers: dict[int, Names]
    right: dict[int, bool]
    exits: dict[str, int]

    def differs(self, point: str) -> bool:
        """Whether an operating point answers otherwise than the last exit."""
        return self.answers[self.exits[point]] != self.answers[max(self.answers)]

    def gain(self, point: str) -> int:
        """1 if only the answer of an operating point is right, -1 if only the last one is."""
        return self.right[self.exits[point]] - self.right[max(self.right)]


def text_rows(result: Calibration, names: Names, texts: bool) -> list[TextRow]:
    """Every row of the calibration.

    Args:
        result: the calibration.
        names: the labels in the order of the logits.
        texts: whether to keep the texts.
    """
    rows = result.rows
    stops = {point.name: exits_of(point.rule, rows) for point in result.points}
    answers, right = rows.answers(), result.selector.stopping_costs.scorer.right()
    return [
        TextRow(
            line=row.line or number + 1,
            text=row.text if texts else None,
            text_pair=row.text_pair if texts else None,
            labels=None if rows.expected is None else _named(rows.expected[number], names),
            answers={
                exit_number: _named(answer, names)
                for exit_number, answer in zip(rows.exits, answers[:, number], strict=True)
            },
            right=dict(zip(rows.exits, right[:, number].tolist(), strict=True)),
            exits={name: int(exits[number]) for name, exits in stops.items()},
        )
        for number, row in enumerate(result.texts)
    ]


def changed_by_stopping(rows: list[TextRow], point: str) -> list[TextRow]:
    """Rows whose early answer differs from full depth; rows that lose a right answer come first."""
    found = [row for row in rows if row.differs(point)]
    return sorted(found, key=lambda row: row.gain(point))


def _named(answer: Integers, names: Names) -> Names:
    """A class index, or a 0 or 1 for each label, as names."""
    if answer.ndim == 0:
        return (names[int(answer)],)
    return tuple(names[index] for index in np.flatnonzero(answer))
