"""Rows as people read them: text, true labels, and what the exits answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...runtime.rules.measures import Answers, Outputs
from ..outcome import exits_of
from ..result import Calibration
from ..scoring import Scorer

Names = tuple[str, ...]


@dataclass(frozen=True)
class TextRow:
    """One row of the calibration.

    Attributes:
        line: in its file, from 1.
        text: the text; None: the report holds no texts.
        text_pair: the second of a pair.
        labels: the true ones; None: the rows have none.
        answers: the labels that each exit answers.
        right: whether each exit's answer is right; without labels, that of the last exit.
        probability: of the last exit's answer; multi-label: of the label it is least sure of.
        exits: where each operating point stops the row, by its name.
    """

    line: int
    text: str | None
    text_pair: str | None
    labels: Names | None
    answers: tuple[Names, ...]
    right: tuple[bool, ...]
    probability: float
    exits: dict[str, int]

    def runs(self) -> list[tuple[int, int, Names]]:
        """The answers as (first exit, last exit, answer), where neighbours are the same."""
        found: list[tuple[int, int, Names]] = []
        for number, answer in enumerate(self.answers, start=1):
            if found and found[-1][2] == answer:
                found[-1] = (found[-1][0], number, answer)
            else:
                found.append((number, number, answer))
        return found

    def differs(self, point: str) -> bool:
        """Whether the answer of an operating point is not that of the last exit."""
        return self.answers[self.exits[point] - 1] != self.answers[-1]


def text_rows(result: Calibration, names: Names, texts: bool) -> list[TextRow]:
    """Every row of the calibration.

    Args:
        result: the calibration.
        names: of the labels, in the order of the logits.
        texts: whether to keep the texts.
    """
    rows = result.rows
    stops = {point.name: exits_of(point.rule, rows) for point in result.points}
    scorer: Scorer = result.selector.stopping_costs.scorer
    answers, right = rows.answers(), scorer.right()
    best = Outputs(rows.logits[-1], rows.problem_type).distributions.max(axis=-1)
    sure = best if best.ndim == 1 else best.min(axis=-1)
    return [
        TextRow(
            line=row.line or number + 1,
            text=row.text if texts else None,
            text_pair=row.text_pair if texts else None,
            labels=None if rows.expected is None else _named(rows.expected[number], names),
            answers=tuple(_named(answer, names) for answer in answers[:, number]),
            right=tuple(bool(value) for value in right[:, number]),
            probability=float(sure[number]),
            exits={name: int(exits[number]) for name, exits in stops.items()},
        )
        for number, row in enumerate(result.texts)
    ]


def ran_all_layers(rows: list[TextRow], point: str) -> list[TextRow]:
    """Rows that an operating point never stopped early, those of least certainty first."""
    last = len(rows[0].answers)
    found = [row for row in rows if row.exits[point] == last]
    return sorted(found, key=lambda row: row.probability)


def changed_by_stopping(rows: list[TextRow], point: str) -> list[TextRow]:
    """Rows whose early answer is another than at full depth; first those it gets wrong."""
    found = [row for row in rows if row.differs(point)]
    return sorted(found, key=lambda row: row.right[row.exits[point] - 1] - row.right[-1])


def _named(answer: Answers, names: Names) -> Names:
    """A class index, or 0 and 1 for each label, as names."""
    if answer.ndim == 0:
        return (names[int(answer)],)
    return tuple(names[index] for index in np.flatnonzero(answer))
