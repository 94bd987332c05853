"""Exit rules: after each exit, which rows stop. Pure numpy, per row, at any batch size.

Every rule has one shape: at each exit a row may give a *sign* that its answer is settled;
it stops after `patience` signs in a row. Some rules also stop at once on confidence. The
`score` is what a rule compares with its threshold.

Sources: F-PABEE (arXiv 2305.11916), PABEE (2006.04152), DeeBERT (2004.12993), Shallow-Deep
Networks (1810.07052), COSEE (2412.13236), PCEE-BERT, FastBERT (2004.02178), EPEE
(2503.02053). Logarithms are natural, and their arguments are clamped at 1e-12.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .distributions import ARRAYS, MEASURES, Answers, Array, Floats, Mask, Measure, Outputs, per_row
from .errors import RuleError
from .manifest import ProblemType


@dataclass(slots=True)
class Signs:
    """What a rule sees at one exit: scores (None: it has none), signs, immediate stops."""

    scores: Array | None
    settled: Mask
    at_once: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """Base of the rules.

    Attributes:
        min_exit: stopping is allowed from this exit on; signs count from exit 1.
        max_exit: a row that gets here stops; None is the last exit.
    """

    name: ClassVar[str]

    min_exit: int = 1
    max_exit: int | None = None

    def __post_init__(self) -> None:
        for field in ("min_exit", "max_exit", "patience", "exit"):
            value = getattr(self, field, 1)
            if field == "max_exit" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RuleError(f"{self.name}: {field} is {value!r}", "give a whole number from 1")
        threshold = getattr(self, "threshold", 0.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise RuleError(f"{self.name}: threshold is {threshold!r}", "give a number")
        if not math.isfinite(threshold):
            raise RuleError(f"{self.name}: threshold is {threshold}", "give a finite number")
        if self.max_exit is not None and self.max_exit < self.min_exit:
            raise RuleError(
                f"{self.name}: max_exit {self.max_exit} is before min_exit {self.min_exit}",
                "give a larger max_exit",
            )

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Scores and signs of rows at an exit; `earlier` is None at exit 1."""
        raise NotImplementedError

    @property
    def signs_from(self) -> int:
        """The first exit that can give a sign; those before it are not asked."""
        return 1

    @property
    def signs_needed(self) -> int:
        """How many signs in a row stop a row."""
        return int(getattr(self, "patience", 1))

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Name and settings, as in the manifest."""
        settings = {
            key: value.value if isinstance(value, Enum) else value
            for key, value in dataclasses.asdict(self).items()
            if not (key == "max_exit" and value is None) and not (key == "min_exit" and value == 1)
        }
        return {"name": self.name, **settings}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> ExitRule:
        """The rule that a dictionary with `name` and settings describes.

        Raises:
            RuleError: unknown rule or setting, a setting missing or of a wrong value.
        """
        given = dict(settings)
        name = given.pop("name", None)
        kind = RULES.get(name) if isinstance(name, str) else None
        if kind is None:
            raise RuleError(f"exit rule {name!r} does not exist", f"choose from {', '.join(RULES)}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        unknown = sorted(set(given) - set(fields))
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = sorted(set(required) - set(given))
        if unknown or missing:
            what = f"does not take {', '.join(unknown)}" if unknown else f"needs {missing[0]}"
            give = "" if unknown else f"give {missing[0]}; "
            raise RuleError(f"rule {name} {what}", f"{give}its settings are: {', '.join(fields)}")
        if "measure" in given:
            try:
                given["measure"] = Measure(given["measure"])
            except ValueError:
                raise RuleError(
                    f"measure {given['measure']!r} does not exist",
                    f"choose from {', '.join(m.value for m in Measure)}",
                ) from None
        return kind(**given)


@dataclass(frozen=True, kw_only=True)
class Budget(ExitRule):
    """Every row stops at one exit ("Budgeted-Exit" in the paper's Table 1)."""

    name: ClassVar[str] = "budget"

    exit: int

    @property
    def signs_from(self) -> int:
        """The given exit."""
        return self.exit

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Settled."""
        return Signs(None, np.ones(len(now.logits), np.bool_))


@dataclass(frozen=True, kw_only=True)
class FPabee(ExitRule):
    """F-PABEE: neighbouring distributions similar `patience` times in a row."""

    name: ClassVar[str] = "fpabee"

    threshold: float
    measure: Measure = Measure.JSKD
    patience: int = 1

    @property
    def signs_from(self) -> int:
        """Exit 2: it takes two to compare."""
        return 2

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: the measure, summed over labels. Settled: strictly below the threshold."""
        assert earlier is not None
        measure = MEASURES[self.measure]
        scores = per_row(measure(ARRAYS, earlier.distributions, now.distributions))
        return Signs(scores, scores < self.threshold)


@dataclass(frozen=True, kw_only=True)
class Pabee(ExitRule):
    """PABEE: the answer stays the same `patience` times in a row."""

    name: ClassVar[str] = "pabee"

    patience: int

    @property
    def signs_from(self) -> int:
        """Exit 2: it takes two to compare."""
        return 2

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: 0 if the answer is that of the exit before, else 1."""
        assert earlier is not None
        same = now.unchanged(earlier)
        return Signs(np.where(same, 0.0, 1.0), same)


@dataclass(frozen=True, kw_only=True)
class Entropy(ExitRule):
    """BranchyNet, DeeBERT: entropy below the threshold, in nats, not normalised."""

    name: ClassVar[str] = "entropy"

    threshold: float

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: entropy; multi-label: the sum of the binary entropies."""
        scores = now.entropy()
        return Signs(scores, scores < self.threshold)


@dataclass(frozen=True, kw_only=True)
class Confidence(ExitRule):
    """Shallow-Deep Networks, RightTool: largest probability above the threshold."""

    name: ClassVar[str] = "confidence"

    threshold: float

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: max p; multi-label: the least of max(p, 1-p) over labels."""
        best = now.distributions.max(axis=-1)
        scores = best if best.ndim == 1 else best.min(axis=-1)
        return Signs(scores, scores > self.threshold)


@dataclass(frozen=True, kw_only=True)
class Energy(ExitRule):
    """COSEE: 1/(1 + sum exp z) below the threshold (temperature 1)."""

    name: ClassVar[str] = "energy"

    threshold: float

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: 1/(1 + sum exp z), computed without overflow."""
        top = np.maximum(now.logits.max(axis=-1), 0.0)
        total = np.exp(now.logits - top[:, None]).sum(axis=-1)
        scores = np.exp(-top) / (np.exp(-top) + total)
        return Signs(scores, scores < self.threshold)


@dataclass(frozen=True, kw_only=True)
class Pcee(ExitRule):
    """PCEE-BERT: normalised entropy below the threshold `patience` times (FastBERT: once)."""

    name: ClassVar[str] = "pcee"

    threshold: float
    patience: int = 1

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: normalised entropy; signs count from exit 1."""
        scores = now.normalised_entropy()
        return Signs(scores, scores < self.threshold)


@dataclass(frozen=True, kw_only=True)
class Epee(ExitRule):
    """EPEE: normalised entropy below the threshold, or the answer unchanged `patience` times."""

    name: ClassVar[str] = "epee"

    threshold: float
    patience: int

    def signs(self, earlier: Outputs | None, now: Outputs) -> Signs:
        """Score: normalised entropy. Settled: the answer is unchanged."""
        scores = now.normalised_entropy()
        same = np.zeros(len(scores), np.bool_) if earlier is None else now.unchanged(earlier)
        return Signs(scores, same, scores < self.threshold)


RULES: dict[str, type[ExitRule]] = {
    rule.name: rule for rule in (FPabee, Pabee, Entropy, Confidence, Energy, Pcee, Epee, Budget)
}


def takes_threshold(name: str) -> bool:
    """Whether a rule has a threshold."""
    return any(field.name == "threshold" for field in dataclasses.fields(RULES[name]))


class Progress:
    """What a rule remembers of a group of rows from one exit to the next.

    Args:
        signs: `[rows]` int64, signs in a row so far.
        earlier: outputs of the exit before; None before exit 1.
    """

    __slots__ = ("earlier", "signs")

    def __init__(self, signs: Answers, earlier: Outputs | None = None) -> None:
        self.signs = signs
        self.earlier = earlier

    def take(self, rows: NDArray[np.intp]) -> Progress:
        """That of some of the rows."""
        earlier = None if self.earlier is None else self.earlier.take(rows)
        return Progress(self.signs[rows], earlier)

    @staticmethod
    def join(parts: Sequence[Progress]) -> Progress:
        """That of several groups, all of them past the same exit."""
        earlier = [part.earlier for part in parts if part.earlier is not None]
        return Progress(
            np.concatenate([part.signs for part in parts]),
            Outputs.join(earlier) if earlier else None,
        )


class Decider:
    """Applies a rule to groups of rows, one exit after another.

    Args:
        rule: the rule.
        problem_type: the task.
        exits: number of exits of the model.
        cuts: multi-label decision cuts, see `Task.cuts`.

    Attributes:
        rule: the rule.
        problem_type: the task.
        last: the exit at which every row stops.

    Raises:
        RuleError: the rule names an exit that the model does not have.
    """

    def __init__(
        self,
        rule: ExitRule,
        problem_type: ProblemType,
        exits: int,
        cuts: Sequence[float] = (),
    ) -> None:
        for field in ("exit", "min_exit", "max_exit"):
            value = getattr(rule, field, None)
            if value is not None and value > exits:
                raise RuleError(
                    f"rule {rule.name}: {field} is {value}, but the model has {exits} exits",
                    f"give at most {exits}",
                )
        self.rule = rule
        self.problem_type = problem_type
        self.last = rule.max_exit or exits
        self._cuts = cuts
        self._signs_from = rule.signs_from
        self._signs_needed = rule.signs_needed

    def start(self, rows: int) -> Progress:
        """The progress of a group of rows before exit 1."""
        return Progress(np.zeros(rows, np.int64))

    def decide(
        self, exit_number: int, progress: Progress, logits: Floats
    ) -> tuple[Mask | None, Array | None]:
        """Decide for the rows of a group at an exit, and note it in their progress.

        Args:
            exit_number: from 1; a group sees every exit in turn.
            progress: that of the group's rows.
            logits: `[rows, labels]` of these rows at this exit.

        Returns:
            Which rows stop `[rows]`, None if none does, and their scores `[rows]` or None.
        """
        now = Outputs(logits, self.problem_type, self._cuts)
        earlier, progress.earlier = progress.earlier, now
        stops, scores = None, None
        if exit_number >= self._signs_from:
            signs = self.rule.signs(earlier, now)
            stops, scores = self._count(progress, signs), signs.scores
        if exit_number >= self.last:
            return np.ones(len(logits), np.bool_), scores
        if stops is None or exit_number < self.rule.min_exit or not np.count_nonzero(stops):
            return None, scores
        return stops, scores

    def _count(self, progress: Progress, signs: Signs) -> Mask:
        """Which rows have enough signs."""
        enough = signs.settled
        if self._signs_needed > 1:
            progress.signs += 1
            progress.signs *= signs.settled
            enough = progress.signs >= self._signs_needed
        return enough if signs.at_once is None else enough | signs.at_once


@dataclass(frozen=True)
class Simulation:
    """What a rule does with a trace.

    Attributes:
        exits: `[rows]` exit of each row, counted from 1.
        predictions: `[rows]` class indices, or `[rows, labels]` of 0 and 1, at that exit.
        scores: `[exits, rows]` float64, NaN where the rule has none.
    """

    exits: Answers
    predictions: Answers
    scores: Array


def simulate(
    logits: Floats,
    rule: ExitRule,
    problem_type: ProblemType | str,
    cuts: Sequence[float] = (),
) -> Simulation:
    """Apply a rule to a trace: exactly the exits of a live run that gave these logits.

    Args:
        logits: `[exits, rows, labels]`.
        rule: the rule.
        problem_type: `single_label_classification` or `multi_label_classification`.
        cuts: multi-label decision cuts; none means 0.5.

    Raises:
        RuleError: the logits are not of that shape, or the rule does not fit.
    """
    if logits.ndim != 3 or logits.shape[0] == 0:
        raise RuleError(f"logits have shape {list(logits.shape)}", "expected [exits, rows, labels]")
    exits, rows, labels = logits.shape
    task = ProblemType(problem_type)
    decider = Decider(rule, task, exits, cuts)
    progress = decider.start(rows)
    chosen = np.zeros(rows, np.int64)
    shape = (rows,) if task is ProblemType.SINGLE_LABEL else (rows, labels)
    predictions = np.zeros(shape, np.int64)
    scores = np.full((exits, rows), np.nan)
    for number in range(1, exits + 1):
        stops, exit_scores = decider.decide(number, progress, logits[number - 1])
        if exit_scores is not None:
            scores[number - 1] = exit_scores
        if stops is not None and progress.earlier is not None:
            new = stops & (chosen == 0)
            chosen[new] = number
            predictions[new] = progress.earlier.answers[new]
    return Simulation(chosen, predictions, scores)
