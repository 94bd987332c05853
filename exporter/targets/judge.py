"""Judge a target on texts of the user: by labels and exits, and by the score on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...calibration.scoring import METRICS, LabelledLogits, Scorer
from ...calibration.trace import expected_labels
from ...runtime.agreement import REQUIREMENTS, Agreement, Logits, compare, must_pass
from ...runtime.artifact.manifest import Manifest, Task
from ...runtime.engine import Engine
from ...runtime.errors import Remedy, VerificationError
from ...runtime.files import Row
from ...runtime.metrics import Labels
from ..precision.formats import CPU_INT8

# Points that a target may lose against fp32 at full depth. One row may always be lost, because a
# smaller difference cannot be seen on few rows.
_MOST_DROP = 0.3
_MOST_ROWS = 2000


@dataclass(frozen=True)
class Score:
    """What a target scores on labelled rows at full depth.

    Attributes:
        metric: the first metric of the task.
        rows: the number of rows.
        value: of the target, from 0 to 1.
        fp32: of `onnxruntime-fp32` on the same rows.
        limit: the most points that the target may lose.
    """

    metric: str
    rows: int
    value: float
    fp32: float
    limit: float

    @property
    def drop(self) -> float:
        """Points that the target loses; negative if it gains."""
        return 100 * (self.fp32 - self.value)

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.value:.4f} on {self.rows} labelled rows (fp32: {self.fp32:.4f}, "
            f"at most {self.limit:.2f} points less allowed)"
        )


class Judge:
    """Compares targets with `onnxruntime-fp32` on rows, which run there once.

    Args:
        exact: the engine of `onnxruntime-fp32`.
        rows: the rows, of which the first 2,000 are used. The score is compared if all of them
            have labels.

    Raises:
        InputError: the model does not know a label.
    """

    def __init__(self, exact: Engine, rows: Sequence[Row]) -> None:
        rows = rows[:_MOST_ROWS]
        self._manifest = exact.manifest
        self._texts = [row.content for row in rows]
        self._truth = labels_of(rows, exact.manifest)
        self._expected = exact.trace(self._texts).logits

    def __call__(self, engine: Engine) -> tuple[Agreement, Score | None]:
        """How closely a target agrees, and its score; None without labels.

        Raises:
            VerificationError: too many labels or exits differ, or the score is too low.
        """
        task, precision = self._manifest.task, engine.manifest.targets[engine.target].precision
        found, first = engine.trace(self._texts).logits, self._manifest.exits[0]
        required = REQUIREMENTS[precision]
        agreement = compare(found, self._expected, engine.rule, task, required, first)
        remedy = Remedy(
            "give more texts like those to classify as {calibration_data}, or use another target"
            if precision in CPU_INT8
            else "use another target"
        )
        must_pass(agreement, "it changes answers", remedy)
        if self._truth is None:
            return agreement, None
        metric, truth, count = METRICS[task.problem_type][0], self._truth, len(self._texts)
        value, fp32 = (_score_of(z, metric, truth, task) for z in (found, self._expected))
        score = Score(metric, count, value, fp32, max(_MOST_DROP, 100 / count))
        if score.drop > score.limit + 1e-9:
            raise VerificationError(f"it loses {score.drop:.2f} points: {score}", remedy)
        return agreement, score


def _score_of(logits: Logits, metric: str, truth: Labels, task: Task) -> float:
    lengths = truth[:0]  # which no score needs
    rows = LabelledLogits(logits, lengths, truth, task.problem_type, task.label_thresholds)
    return Scorer(rows, metric).full_depth


def labels_of(rows: Sequence[Row], manifest: Manifest) -> Labels | None:
    """The labels of rows as numbers; None if some rows have none.

    Raises:
        InputError: the model does not know a label.
    """
    if not rows or any(row.labels is None for row in rows):
        return None
    return expected_labels(rows, manifest.task)
