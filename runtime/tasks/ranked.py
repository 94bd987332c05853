"""Ranking: documents that cannot be among the best of their query leave after a few layers.

A row is a query with one of its documents. Each exit predicts the final logit; exit 0 does so from
the score of a search, and equally for all documents if there are no scores, see `first_stage`.
Documents that leave do so before their group's next segment, see `fpabee.runtime.tasks.queries`;
the others run all layers, and have the logits and the order of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..artifact.manifest import Activation
from ..errors import InputError, whole_number
from ..rules.measures import Array, Floats, Mask
from ..rules.rules import ExitRule, TopK, before_top
from ..rules.settling import Settled


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document of a ranking.

    Attributes:
        index: the place of the document among those that were given, from 0.
        score: of the document; the whole model's if it ran all layers, otherwise predicted. Of a
            document that left early, it is below the scores of all that did not, so that sorting by
            scores keeps the order.
        logit: the logit from which the score comes.
        exit: the exit that gave the score; the last one is the whole model.
        truncated: whether query and document had more tokens than the model takes.
        deadline_limited: whether the deadline stopped the document; its score is predicted then.
        deadline_missed: whether the answer came after the deadline.
    """

    index: int
    score: float
    logit: float
    exit: int
    truncated: bool = False
    deadline_limited: bool = False
    deadline_missed: bool = False


def pairs_of(query: str, documents: Sequence[str]) -> list[tuple[str, str]]:
    """The query with each of its documents.

    Raises:
        InputError: they are not a string, and a list or another sequence of strings.
    """
    if not isinstance(query, str):
        raise InputError(f"the query has the type {type(query).__name__}", "give a string")
    if isinstance(documents, str) or not isinstance(documents, Sequence | np.ndarray):
        kind = type(documents).__name__
        raise InputError(f"the documents are one {kind}", "give a list of strings")
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputError(
                f"document {number} has the type {type(document).__name__}",
                "give a list of strings",
            )
    return [(query, document) for document in documents]


def top_of(rule: ExitRule, top_k: int | None, documents: int) -> int | None:
    """How many documents a ranking returns; None: all that ran all layers.

    Args:
        rule: the rule of the ranking.
        top_k: how many were asked for; None: as many as the rule looks for.
        documents: how many there are.

    Raises:
        InputError: it is not a whole number from 1, or some of as many documents may leave early.
    """
    if top_k is not None:
        top_k = whole_number("`top_k`", top_k, InputError)
    if not isinstance(rule, TopK):
        return top_k
    if top_k is not None and min(top_k, documents) > rule.top:
        raise InputError(
            f"the best {top_k} are wanted, but documents behind the best {rule.top} leave early",
            f"ask for up to {rule.top}, or convert the model again for more",
        )
    return rule.top if top_k is None else top_k


def ranked(
    settled: Settled,
    missed: Mask,
    left: Mask,
    activation: Activation,
    top_k: int | None = None,
    with_left: bool = False,
) -> list[Ranked]:
    """The documents of a query, best first.

    The order is that of the logits, and equal logits keep the order of the documents. Documents
    that left early come after all others.

    Args:
        settled: the documents, each an `EncodedRow`, with their exits and logits.
        missed: `[documents]` whether the deadline was missed.
        left: `[documents]` whether a document left before the last exit, by the rule.
        activation: what makes a score of a logit.
        top_k: most documents to return; None: all.
        with_left: also return those that left early, whatever `top_k` is.
    """
    predicted = settled.logits[:, 0]
    least = predicted[~left].min(initial=np.float32(np.inf))
    below = np.nextafter(least, np.float32(-np.inf))
    logits = np.where(left, np.minimum(predicted, below), predicted).astype(np.float64)
    scores = 1 / (1 + np.exp(-logits)) if activation is Activation.SIGMOID else logits
    order = np.lexsort((-predicted, left))
    if not with_left:
        order = order[: np.count_nonzero(~left)][:top_k]
    return [
        Ranked(
            index=int(number),
            score=float(scores[number]),
            logit=float(logits[number]),
            exit=int(settled.exits[number]),
            truncated=settled.rows[number].truncated,
            deadline_limited=bool(settled.limited[number]),
            deadline_missed=bool(missed[number]),
        )
        for number in order
    ]


def leaving(rule: ExitRule, exit_number: int, logits: Array, going: Mask) -> Mask:
    """Which documents of queries leave at an exit: `[queries, documents]`.

    Args:
        rule: the rule of the ranking.
        exit_number: an exit before the last.
        logits: `[queries, documents]` at this exit.
        going: `[queries, documents]` whether a document has not left before.
    """
    if not isinstance(rule, TopK):
        return np.zeros_like(going)
    before = before_top(np.where(going, logits, -np.inf), rule.top)
    return going & (before < rule.threshold_at(exit_number))


def changed_sets(final: Floats, left: Mask, reference: Floats, top: int) -> Mask:
    """Whether the `top` best documents of queries are not the best of a reference: `[queries]`.

    Documents with equal references may stand for each other, such as one that is given twice.

    Args:
        final: `[queries, documents]` logits of the last exit.
        left: `[queries, documents]` whether a document left before; it is never among the best.
        reference: `[queries, documents]` the logits that it should have.
        top: how many documents are wanted.
    """
    if final.shape[1] <= top:
        return np.zeros(len(final), np.bool_)
    chosen = np.argsort(-np.where(left, -np.inf, final), axis=1, kind="stable")[:, :top]
    best = np.sort(reference, axis=1)[:, -top:]
    references = np.sort(np.take_along_axis(reference, chosen, axis=1), axis=1)
    differs = np.abs(references - best) > _SAME * np.maximum(np.abs(best), 1)
    return np.asarray(differs.any(axis=1))


# Equal documents differ by as much as rows differ with their batch, see `check.BATCH_LIMIT`.
_SAME = 1e-5
