"""The exit rules: which rows stop at an exit, and what calibration tries.

After every exit from exit 1, a rule gives each row a *signal*: whether the answer looks settled. A
row stops after as many consecutive signals as the rule's patience; some rules can also stop a row
at once. Exit 0 is a bag of n-grams, whose outputs are not like those of a layer. Every rule of
classification treats it the same: a row stops there if it is confident enough, and otherwise exit 1
is compared with it.

A rule answers every question about itself: its signals (`signal`), how calibration tries all
thresholds at once (`stop_scores`), and whether a near tie of labels can move an exit
(`uses_labels`).

Sources: F-PABEE (arXiv 2305.11916), PABEE (2006.04152), DeeBERT (2004.12993), Shallow-Deep
Networks (1810.07052), COSEE (2412.13236), PCEE-BERT, FastBERT (2004.02178), EPEE (2503.02053).
Logarithms are natural, and their arguments are at least 1e-12.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from ..artifact.operating_point import RuleSettings
from ..errors import RuleError, whole_number
from .measures import MEASURES, Array, Mask, Measure, Outputs, per_row

# The types of settings; the description says what to give.
_Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Exit = Annotated[int, msgspec.Meta(ge=0, description="give a whole number from 0")]
_Patience = Annotated[int, msgspec.Meta(ge=1, description="give a whole number from 1")]
_LabelThresholds = Annotated[
    tuple[Annotated[float, msgspec.Meta(gt=0, le=1)], ...],
    msgspec.Meta(description="give a probability for each label, 1 for labels that decide nothing"),
]
_Measure = Annotated[
    Measure, msgspec.Meta(description=f"choose from {', '.join(each.value for each in Measure)}")
]
Threshold = Annotated[
    _Finite | Annotated[tuple[_Finite, ...], msgspec.Meta(min_length=1)],
    msgspec.Meta(description="give a finite number, or one for each exit"),
]
"""One threshold for all exits, or one for each exit; the last exit stops every row anyway."""
_Behind = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=0)]
_Margins = Annotated[
    _Behind | Annotated[tuple[_Behind, ...], msgspec.Meta(min_length=1)],
    msgspec.Meta(description="give a finite number of at most 0, or one for each exit"),
]


@dataclass(slots=True)
class Signal:
    """The scores and signals of a rule at one exit.

    Attributes:
        scores: `[rows]` float64, what the rule compares with its threshold; None if it has no
            score.
        agrees: `[rows]` bool, whether the answer looks settled at this exit.
        stop_now: `[rows]` bool, rows that stop regardless of their earlier signals; None if there
            are none.
    """

    scores: Array | None
    agrees: Mask
    stop_now: Mask | None = None


ScoresOf = Callable[["ExitRule"], Array]
"""Gives the scores `[exits, rows]` of a rule on a trace, with NaN where the rule has none."""

_fields = functools.cache(msgspec.structs.fields)
# Settings that are not stored at their default.
_LEFT_OUT: dict[str, Any] = {
    **{"min_exit": 0, "max_exit": None, "exit_0_threshold": None},
    "label_thresholds": (),
}


class ExitRule(msgspec.Struct, frozen=True, kw_only=True, tag_field="name"):
    """Base class of the exit rules, which decide for each row which exit answers.

    A rule is made with keyword arguments and never changes. A rule of your own is a subclass with
    the class argument `tag`, which is its name, and a method `signal`.

    Attributes:
        min_exit: the first exit at which a row may stop. Signals count from exit 1 on.
        max_exit: every row that reaches this exit stops there; None means the last exit.
        exit_0_threshold: a row stops at exit 0 if its confidence there, see `Outputs.confidence`,
            is above this number; None means that no row does. Models without exit 0 allow None
            only.

    Raises:
        RuleError: a setting has the wrong type or value. Exits are whole numbers from 0, patience
            from 1, thresholds are finite numbers, that of exit 0 from 0 to 2, those of `TopK` at
            most 0, and a measure is a `Measure` or its value.

    Example:
        >>> from fpabee.runtime import ExitRule, FPabee
        >>> rule = FPabee(threshold=0.25, patience=2, min_exit=3)
        >>> rule.to_dict()
        {'name': 'fpabee', 'min_exit': 3, 'threshold': 0.25, 'measure': 'jskd', 'patience': 2}
        >>> ExitRule.from_dict(rule.to_dict()) == rule
        True
    """

    compares_exits: ClassVar[bool] = False
    """Whether a signal needs the exit before; `signal` is then not called without one."""
    uses_labels: ClassVar[bool] = False
    """Whether the rule compares predicted labels, so that a near tie of labels can move an exit."""
    ranks: ClassVar[bool] = False
    """Whether rows are documents that are compared with each other."""

    min_exit: _Exit = 0
    max_exit: Annotated[_Exit | None, msgspec.Meta(description="give a whole number from 0")] = None
    exit_0_threshold: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=2)] | None,
        msgspec.Meta(description="give a share from 0 to 1, or 2 for never"),
    ] = None

    def __post_init__(self) -> None:
        # The constructors of msgspec check names only.
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            try:
                checked = msgspec.convert(_plain(value), field.type)
            except msgspec.ValidationError as error:
                meta = getattr(field.type, "__metadata__", [None])[0]
                hint = getattr(meta, "description", None) or str(error)
                raise RuleError(f"{self.name}: {field.name} is {value!r}", hint) from None
            msgspec.structs.force_setattr(self, field.name, checked)
        if self.max_exit is not None and self.max_exit < self.min_exit:
            raise RuleError(
                f"{self.name}: max_exit {self.max_exit} is before min_exit {self.min_exit}",
                "give a larger max_exit",
            )

    @property
    def name(self) -> str:
        """The name of the rule in commands and in the manifest."""
        return str(self.__struct_config__.tag)

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Scores and signals of some rows at an exit; each row depends on its own outputs only.

        Args:
            exit_number: from 1.
            earlier: outputs of the previous exit for the same rows; None if there is none.
            now: outputs of this exit.
        """
        raise NotImplementedError

    @property
    def ends_at_exit_0(self) -> bool:
        """Whether every row stops at exit 0."""
        return self.max_exit == 0

    def stops_at_exit_0(self, now: Outputs) -> Mask | None:
        """Which rows stop at exit 0, `[rows]`; None if no row does.

        Args:
            now: outputs of exit 0.
        """
        if self.ends_at_exit_0:
            return np.ones(len(now.logits), np.bool_)
        if self.exit_0_threshold is None:
            return None
        return self.uncertainty(now) < 1 - self.exit_0_threshold

    def uncertainty(self, now: Outputs) -> Array:
        """The uncertainty at exit 0, `[rows]`: 1 - confidence, given the outputs of exit 0."""
        return now.uncertainty()

    def check_exits(self, exits: range) -> None:
        """Check that the rule fits a model.

        Args:
            exits: the numbers of the exits of the model.

        Raises:
            RuleError: a setting names an exit that the model does not have, or is given for
                another number of exits.
        """
        if self.exit_0_threshold is not None and 0 not in exits:
            raise RuleError(
                f"rule {self.name} has a threshold for exit 0, but the model has no exit 0",
                "leave out `exit_0_threshold`, or train exit 0",
            )
        for field in ("exit", "min_exit", "max_exit"):
            value = getattr(self, field, None)
            if value is None or value in exits or (field == "min_exit" and value == 0):
                continue
            raise RuleError(
                f"rule {self.name}: {field} is {value}, but the exits of the model are "
                f"{exits[0]} to {exits[-1]}",
                f"give a number from {exits[0]} to {exits[-1]}",
            )

    @property
    def signals_needed(self) -> int:
        """How many consecutive signals stop a row."""
        return int(getattr(self, "patience", 1))

    def stop_scores(self, scores_of: ScoresOf) -> Array:
        """Everything about the rule from exit 1 on but its threshold, as a score for each row.

        A row stops at the first exit whose stop score is below the threshold, see
        `stop_thresholds`. A score of infinity never stops the row, and a score of minus infinity
        always does.

        Args:
            scores_of: the scores of any rule on the trace, from exit 1 on.

        Returns:
            `[exits, rows]` float64, from exit 1 on.
        """
        scores = self._stop_scores(scores_of)
        scores = np.where(np.isnan(scores), np.inf, scores)
        scores[: max(0, self.min_exit - 1)] = np.inf
        last = len(scores) if self.max_exit is None else self.max_exit
        scores[max(0, last - 1) :] = -np.inf
        return scores

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        """The largest of the last `patience` scores: if it is below the threshold, all are.

        NaN means that the rule cannot stop the row there.
        """
        # Settings that do not change the scores get the same value, so that scores are shared.
        plain = {**_LEFT_OUT, "patience": 1, "threshold": 0.0}
        plain = {name: plain[name] for name in plain.keys() & self.__struct_fields__}
        scores = scores_of(msgspec.structs.replace(self, **plain))
        patience = self.signals_needed
        largest = np.full_like(scores, np.nan)
        if patience <= len(scores):
            windows = np.lib.stride_tricks.sliding_window_view(scores, patience, axis=0)
            largest[patience - 1 :] = windows.max(axis=-1)
        return largest

    @property
    def stop_thresholds(self) -> Array:
        """The thresholds of stop scores: one number `[]`, or `[exits]` from exit 1.

        It is 0.5 for rules without a threshold.
        """
        return np.asarray(0.5)

    def with_stop_threshold(self, threshold: float | Sequence[float] | Array) -> ExitRule:
        """This rule with another threshold for its stop scores.

        Args:
            threshold: one number, or one for each exit. Rules without a threshold ignore it.
        """
        return self

    def capped(self, max_exit: int) -> ExitRule:
        """This rule, except that no row goes beyond an exit.

        Args:
            max_exit: that exit. A lower `max_exit` of the rule stays; a higher `min_exit` is
                lowered.

        Raises:
            RuleError: the exit is not a whole number from 0.
        """
        last = whole_number("max_exit", max_exit, RuleError, least=0)
        if self.max_exit is not None:
            last = min(last, self.max_exit)
        return msgspec.structs.replace(self, min_exit=min(self.min_exit, last), max_exit=last)

    def to_dict(self) -> RuleSettings:
        """The rule's name and settings, as the manifest stores them; `from_dict` reads them."""
        settings = msgspec.to_builtins(self)
        return {k: v for k, v in settings.items() if k not in _LEFT_OUT or v != _LEFT_OUT[k]}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> ExitRule:
        """The rule that a dictionary with `name` and settings describes.

        Args:
            settings: as `to_dict` returns them; measures are given by their values.

        Raises:
            RuleError: the rule or a setting does not exist, a setting is missing, or it has a
                wrong value.
        """
        values = dict(settings)
        name = values.pop("name", None)
        kind = EVERY_RULE.get(name) if isinstance(name, str) else None
        if kind is None:
            known = ", ".join(EVERY_RULE)
            raise RuleError(f"exit rule {name!r} does not exist", f"choose from {known}")
        try:
            return kind(**values)
        except TypeError as error:  # a name that is missing or unknown
            known = ", ".join(f"`{field}`" for field in kind.__struct_fields__)
            raise RuleError(f"rule {name}: {error}", f"its settings are {known}") from None


def _plain(value: Any) -> Any:
    """The numbers and lists of Python that stand for a scalar, an array or a sequence of NumPy."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


class ThresholdRule(ExitRule, frozen=True, kw_only=True):
    """Base class of the rules that compare a score with a threshold.

    Attributes:
        threshold: one for all exits, or one for each exit from exit 1.
    """

    threshold: Threshold

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The scores `[rows]` of some rows at an exit.

        Args:
            earlier: outputs of the previous exit; None if there is none.
            now: outputs of this exit.
        """
        raise NotImplementedError

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """The answer looks settled where the score is strictly below the threshold."""
        scores = self.scores(earlier, now)
        return Signal(scores, scores < self.threshold_at(exit_number))

    def check_exits(self, exits: range) -> None:
        """Check that the rule fits a model, see `ExitRule`."""
        super().check_exits(exits)
        if isinstance(self.threshold, tuple) and len(self.threshold) != exits[-1]:
            raise RuleError(
                f"rule {self.name} has {len(self.threshold)} thresholds, but the model has "
                f"{exits[-1]} exits after a layer",
                f"give one number, or {exits[-1]}: one for each of these exits",
            )

    def threshold_at(self, exit_number: int) -> float:
        """The threshold at an exit from 1."""
        numbers = self.threshold
        return numbers[exit_number - 1] if isinstance(numbers, tuple) else numbers

    @property
    def stop_thresholds(self) -> Array:
        """The threshold, or the thresholds `[exits]`."""
        return np.asarray(self.threshold)

    def with_stop_threshold(self, threshold: float | Sequence[float] | Array) -> ExitRule:
        """This rule with another threshold, see `ExitRule`."""
        return msgspec.structs.replace(self, threshold=threshold)


class FPabee(ThresholdRule, tag="fpabee", frozen=True, kw_only=True):
    """F-PABEE (arXiv 2305.11916): neighbouring exits are similar `patience` times in a row.

    The measure of the distributions of two neighbouring exits is below the threshold. The first
    exit has no neighbour, so no row stops before exit `patience` + 1, or `patience` if the model
    has exit 0.

    Attributes:
        threshold: in nats, the unit of the measure; one for all exits, or one for each exit.
        measure: how similarity is measured; for multi-label tasks it is summed over labels.
        patience: how many consecutive signals stop a row.
    """

    compares_exits: ClassVar[bool] = True

    measure: _Measure = Measure.JSKD
    patience: _Patience = 1

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The measure, summed over labels."""
        assert earlier is not None
        return per_row(MEASURES[self.measure](earlier.distributions, now.distributions))


class Pabee(ExitRule, tag="pabee", frozen=True, kw_only=True):
    """PABEE (arXiv 2006.04152): the answer stays the same `patience` times in a row.

    For multi-label tasks the whole set of labels must stay the same. No row stops before exit
    `patience` + 1, or `patience` if the model has exit 0.

    Attributes:
        patience: how many consecutive signals stop a row.
    """

    compares_exits: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = True

    patience: _Patience

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """The score is 0 if the previous exit gave the same answer, else 1."""
        assert earlier is not None
        same = now.unchanged(earlier)
        return Signal(np.where(same, 0.0, 1.0), same)


class Entropy(ThresholdRule, tag="entropy", frozen=True, kw_only=True):
    """BranchyNet, DeeBERT (arXiv 2004.12993): the entropy -sum p log p is below the threshold.

    Attributes:
        threshold: in nats, not normalised; one for all exits, or one for each exit.
    """

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The entropy; for multi-label tasks the sum of the binary entropies."""
        return now.entropy()


class Uncertainty(ThresholdRule, tag="uncertainty", frozen=True, kw_only=True):
    """The basis of `Confidence`: 1 - max p is below the threshold."""

    label_thresholds: _LabelThresholds = ()

    def uncertainty(self, now: Outputs) -> Array:
        """1 - max p, also at exit 0."""
        return now.uncertainty(self.label_thresholds)

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """1 - max p."""
        return self.uncertainty(now)


class Confidence(Uncertainty, tag="confidence", frozen=True, kw_only=True):
    """Shallow-Deep Networks (arXiv 1810.07052), RightTool: max p is above the threshold.

    Close to 1, max p loses its digits. Therefore 1 - max p, which is the sum of the other
    probabilities, is compared with 1 - threshold.

    Attributes:
        threshold: a probability; one for all exits, or one for each exit.
        label_thresholds: `[labels]` the probability above which a label is flagged, 1 for labels
            that decide nothing. Then a row stops if it is certain which labels are flagged, also at
            exit 0: with q = sigmoid(logit p - logit t), the least max(q, 1 - q) of a label stands
            for max p. Empty: the answer is what has to be certain.
    """

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The largest probability; for multi-label tasks the least max(p, 1 - p) of a label."""
        return 1 - self.uncertainty(now)

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """The answer looks settled where 1 - max p is strictly below 1 - threshold."""
        uncertainty = self.uncertainty(now)
        return Signal(1 - uncertainty, uncertainty < 1 - self.threshold_at(exit_number))

    @property
    def stop_thresholds(self) -> Array:
        """1 - threshold, or `[exits]` of them."""
        return 1 - np.asarray(self.threshold)

    def with_stop_threshold(self, threshold: float | Sequence[float] | Array) -> ExitRule:
        """This rule with another threshold for 1 - max p, see `ExitRule`."""
        return msgspec.structs.replace(self, threshold=1 - np.asarray(threshold))

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        return scores_of(Uncertainty(threshold=0.0, label_thresholds=self.label_thresholds))


class Energy(ThresholdRule, tag="energy", frozen=True, kw_only=True):
    """COSEE (arXiv 2412.13236): the energy 1/(1 + sum exp z) is below the threshold; z are logits.

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
    """

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The energy: the probability of one more class whose logit is 0."""
        top = np.maximum(np.maximum.reduce(now.logits, axis=-1), 0)
        powers: Array = np.add.reduce(np.exp(now.logits - top[:, None]), axis=-1)
        rest: Array = np.exp(-top)
        return rest / (rest + powers)


class Pcee(ThresholdRule, tag="pcee", frozen=True, kw_only=True):
    """PCEE-BERT: the normalised entropy is below the threshold `patience` times in a row.

    Normalised means divided by the logarithm of the number of classes. For multi-label tasks it is
    the mean over labels of the binary entropies divided by log 2. With patience 1 this is the rule
    of FastBERT (arXiv 2004.02178).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
        patience: how many consecutive signals stop a row; they count from exit 1 on.
    """

    patience: _Patience = 1

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The normalised entropy."""
        return now.normalised_entropy()


class Epee(ThresholdRule, tag="epee", frozen=True, kw_only=True):
    """EPEE (arXiv 2503.02053): the normalised entropy is low, or the answer stays the same.

    A row stops at once if its normalised entropy (as in `Pcee`) is below the threshold, or if its
    answer stayed the same `patience` times in a row (as in `Pabee`).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
        patience: how many times in a row the answer must stay the same.
    """

    uses_labels: ClassVar[bool] = True

    patience: _Patience

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The normalised entropy."""
        return now.normalised_entropy()

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """A row stops now if its entropy is low, and gives a signal if its answer is the same."""
        sure = super().signal(exit_number, earlier, now)
        same = np.zeros_like(sure.agrees) if earlier is None else now.unchanged(earlier)
        return Signal(sure.scores, same, stop_now=sure.agrees)

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        same = Pabee(patience=self.patience).stop_scores(scores_of) < 0.5
        return np.where(same, -np.inf, Pcee(threshold=0.0).stop_scores(scores_of))


class Budget(ExitRule, tag="budget", frozen=True, kw_only=True):
    """Every row stops at the same exit ("Budgeted-Exit" in F-PABEE's Table 1).

    Attributes:
        exit: that exit.
    """

    exit: _Exit

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Every row gives its signal from that exit on; there is no score."""
        return Signal(None, np.full_like(now.logits[:, 0], exit_number >= self.exit, np.bool_))

    @property
    def ends_at_exit_0(self) -> bool:
        """Whether exit 0 is that exit."""
        return self.exit == 0 or super().ends_at_exit_0

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        scores = np.full_like(scores_of(self), np.inf)
        scores[max(0, self.exit - 1) :] = -np.inf
        return scores


class TopK(ThresholdRule, tag="top-k", frozen=True, kw_only=True):
    """For rankings: a document stops when it can no longer be among the best of its query.

    Each exit predicts the final logit. The score of a document is its prediction minus the `top`th
    largest prediction of its query. Rows are the documents of one query that have not stopped, so
    that a document which is out never keeps another one in. The documents that never stop have the
    logits of the whole model. (Cascade ranking; for transformers, see Xin et al. 2020 and
    arXiv 2510.15620.)

    Attributes:
        threshold: minus the margin by which a document has to be behind, in logits, at most 0; one
            for all exits, or one for each exit.
        top: how many documents are wanted.
        exit_0_threshold: the same at exit 0, which predicts from the scores of the search; None
            means that no document stops there.
    """

    ranks: ClassVar[bool] = True

    threshold: _Margins
    exit_0_threshold: Annotated[
        _Behind | None, msgspec.Meta(description="give a finite number of at most 0")
    ] = None
    top: Annotated[int, msgspec.Meta(ge=1, description="give a whole number from 1")]

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """How far documents are before the `top`th; infinity if there are no more than `top`."""
        return before_top(now.logits[:, 0], self.top)

    def threshold_at(self, exit_number: int) -> float:
        """The threshold at an exit; minus infinity if no document stops at exit 0."""
        if exit_number > 0:
            return super().threshold_at(exit_number)
        return -np.inf if self.exit_0_threshold is None else self.exit_0_threshold

    def with_stop_threshold(self, threshold: float | Sequence[float] | Array) -> ExitRule:
        """This rule with another threshold, lowered to 0, because the best must not leave."""
        return super().with_stop_threshold(np.minimum(threshold, 0))

    def stops_at_exit_0(self, now: Outputs) -> Mask | None:
        """Which documents stop at exit 0, by the same score as at the others."""
        if self.ends_at_exit_0:
            return super().stops_at_exit_0(now)
        return self.signal(0, None, now).agrees


def before_top(logits: Array, top: int) -> Array:
    """How far logits `[..., documents]` are before the `top`th largest of their query.

    Args:
        logits: predictions of the documents of queries; minus infinity for those that have stopped.
        top: how many documents are wanted.

    Returns:
        Of the same shape; infinity where a query has no more than `top` documents.
    """
    if logits.shape[-1] <= top:
        return np.full(logits.shape, np.inf)
    limits: Array = np.partition(logits, -top, axis=-1)[..., -top, None]
    # Minus infinity: fewer than `top` documents are left, so none of them stops.
    return np.where(np.isneginf(limits), np.inf, logits - np.where(np.isneginf(limits), 0, limits))


_ALL = (FPabee, Pabee, Entropy, Confidence, Energy, Pcee, Epee, Budget)
RULES: dict[str, type[ExitRule]] = {str(rule.__struct_config__.tag): rule for rule in _ALL}
"""The class of each rule of classification by its name."""
EVERY_RULE: dict[str, type[ExitRule]] = RULES | {str(TopK.__struct_config__.tag): TopK}
"""The same with the rule of rankings."""
OF_SHARES = (Confidence, Energy, Pcee, Epee)
"""The rules whose scores are from 0 to 1, and so are thresholds that make sense."""
