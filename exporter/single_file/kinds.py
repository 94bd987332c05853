"""The differences between kinds of models as one file: the table `KINDS`."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import msgspec
import numpy as np

from ...calibration.scoring import AGREEMENT
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.artifact.reference import Text
from ...runtime.encoding import TextEncoder
from ...runtime.errors import BackendError
from ...runtime.exit_0 import ExitZero
from ...runtime.rules.rules import ExitRule
from .cases import Cases, QueryCases
from .check import logits_of_segments
from .exit_0_nodes import ExitZeroNodes
from .graph import TYPES
from .pair_marks import PairMarks
from .query_nodes import QueryNodes
from .rules import RowNodes
from .tokenizer import load_tokenizer

# Queries on which a ranking is checked, their documents besides twice the best, and their words.
_QUERIES = 8
_LEAST_DOCUMENTS = 10
_MOST_WORDS = 20
_NOT_IN_PAIRS = "no token types or separators say where the second text of a pair begins"
_WITH_SCORES = " with the scores of a search, which this file does not take"
_COSTS_OF_RANKING = (
    "- Layers per document: {depth:.2f} of {layers}, if a query is one batch.\n"
    "- Times as fast as full depth: {speed}.\n"
)

Protos = Mapping[str, Any]
"""The graphs of a target by name, each an `onnx.ModelProto`."""


@dataclass(frozen=True)
class Parts:
    """The parts of a graph besides the graphs of its segments.

    Attributes:
        source: the engines folder, without the exits that the graph leaves out.
        rule: the rule inside.
        operating_point: its name; None: it is none, or does not hold for the graph.
        before: the exits before layer 1, at most one.
        rows: makes what says how rows depend on each other, see `single_graph`.
        exit_0: what the card says about exit 0.
        no_exit_0: why exit 0 of the model was left out; empty: it was not.
    """

    source: EnginesFolder
    rule: ExitRule
    operating_point: str | None
    before: Sequence[ExitZeroNodes] = ()
    rows: Callable[..., RowNodes] = RowNodes
    exit_0: str = "the model has none"
    no_exit_0: str = ""


class Kind(ABC):
    """A kind of models.

    Attributes:
        templates: what the names of its parts of the card begin with.
        hub_task: what the hub calls its task.
    """

    templates: ClassVar[str]
    hub_task: ClassVar[str]

    def check_plan(self) -> None:  # noqa: B027 - most kinds can be a plan
        """Refuse plans.

        Raises:
            BackendError: they are not built yet.
        """

    @abstractmethod
    def parts(
        self, source: EnginesFolder, protos: Protos, rule: ExitRule, operating_point: str | None
    ) -> Parts:
        """The parts of the graph.

        Args:
            source: the engines folder.
            protos: the graphs of its segments.
            rule: the rule.
            operating_point: its name; None: it is none.

        Raises:
            ArtifactError: the tokenizer or exit 0 is missing or damaged.
            BackendError: the rule needs what a graph cannot recognise.
        """

    @abstractmethod
    def cases(
        self, parts: Parts, reference: Sequence[Text], protos: Protos, precision: str
    ) -> Cases:
        """The cases on which the graph is checked.

        Args:
            parts: what it is made of.
            reference: the reference texts of the engines folder.
            protos: the graphs of its segments, whose weights are not moved yet.
            precision: of these graphs.
        """

    @abstractmethod
    def measured(
        self, point: OperatingPoint, rule: ExitRule, exits: range, layers: int, speed: str
    ) -> dict[str, Any]:
        """The values in its part of the card, `measured.md`, that other kinds do not have.

        Args:
            point: the operating point.
            rule: the rule inside.
            exits: the exits of the graph.
            layers: of the model.
            speed: how many times as fast as full depth it is, in words.
        """


class Texts(Kind):
    """Texts that are classified, and do not depend on each other."""

    templates = ""
    hub_task = "text-classification"

    def parts(
        self, source: EnginesFolder, protos: Protos, rule: ExitRule, operating_point: str | None
    ) -> Parts:
        """See `Kind`: exit 0 is left out where it cannot recognise pairs."""
        exit_0 = ExitZero.load(source)
        if exit_0 is None:
            return Parts(source, rule, operating_point)
        marks = _marks(source, protos)
        if marks is None:
            without = source.with_manifest(exit_0=None)
            rule = _without_exit_0(rule)
            return Parts(without, rule, None, exit_0=_NOT_IN_PAIRS, no_exit_0=_NOT_IN_PAIRS)
        before = [ExitZeroNodes(exit_0, marks)]
        return Parts(source, rule, operating_point, before, exit_0="inside")

    def cases(
        self, parts: Parts, reference: Sequence[Text], protos: Protos, precision: str
    ) -> Cases:
        """See `Kind`: the reference texts, except those that exit 0 takes for pairs.

        Those are the texts with separators in their midst.
        """
        separators = [each for exit_0 in parts.before for each in exit_0.marks.texts]
        texts = [
            text for text in reference if not any(each in "".join(text) for each in separators)
        ]
        return Cases(**_run(parts, texts, protos, precision))

    def measured(
        self, point: OperatingPoint, rule: ExitRule, exits: range, layers: int, speed: str
    ) -> dict[str, Any]:
        """See `Kind`."""
        changed = f" ({1 - point.score:.2%} changed)" if point.metric == AGREEMENT else ""
        return {"changed": changed}


class Queries(Kind):
    """Queries whose documents are ranked, and compared within a batch."""

    templates = "ranking_"
    hub_task = "text-ranking"

    def check_plan(self) -> None:
        """See `Kind`."""
        raise BackendError("plans of rankings are not built yet", "choose a `target` for CPUs")

    def parts(
        self, source: EnginesFolder, protos: Protos, rule: ExitRule, operating_point: str | None
    ) -> Parts:
        """See `Kind`: a file gets no scores of a search, and the promise holds without them."""
        marks = _marks(source, protos)
        if marks is None:
            raise BackendError(
                "no token types or separators say where a document begins, so documents of a "
                "query cannot be recognised in a batch",
                "run the engines folder instead of a file",
            )
        without = source.with_manifest(first_stage=None)
        rows = partial(QueryNodes, marks)
        return Parts(without, _without_exit_0(rule), operating_point, rows=rows)

    def cases(
        self, parts: Parts, reference: Sequence[Text], protos: Protos, precision: str
    ) -> Cases:
        """See `Kind`: queries with documents, made of the words of the reference texts.

        A batch holds all documents of a query and some of the next one, so that queries are mixed.
        """
        words = " ".join(" ".join(text) if isinstance(text, tuple) else text for text in reference)
        top = _wanted(parts.rule, otherwise=1)
        documents = _LEAST_DOCUMENTS + 2 * top
        draw = random.Random(0).choices
        queries = np.repeat(np.arange(_QUERIES), documents)
        names = [" ".join(draw(words.split(), k=3)) for _ in range(_QUERIES)]
        texts: list[Text] = [
            (names[query], " ".join(draw(words.split(), k=1 + place % _MOST_WORDS)))
            for place, query in enumerate(queries)
        ]
        run = _run(parts, texts, protos, precision)
        return QueryCases(**run, batch=documents + top, queries=queries)

    def measured(
        self, point: OperatingPoint, rule: ExitRule, exits: range, layers: int, speed: str
    ) -> dict[str, Any]:
        """See `Kind`: the costs are left out if scores saved layers that the file has to run."""
        had_scores = len(point.exits) > len(exits)
        costs = _COSTS_OF_RANKING.format(depth=point.mean_depth, layers=layers, speed=speed)
        return {
            "top": _wanted(rule, otherwise=0),
            "scores": _WITH_SCORES if had_scores else "",
            "costs": "" if had_scores else costs,
            "changed_queries": round(point.rows * (1 - point.score)),
            "changed_at_full_depth": round(point.rows * (1 - point.full_depth_score)),
        }


KINDS: dict[str, Kind] = {"predict": Texts(), "rank": Queries()}
"""By the method of `Engine` that answers."""


def _marks(source: EnginesFolder, protos: Protos) -> PairMarks | None:
    """How the second texts of pairs are recognised; None: they cannot be."""
    inputs = {value.name for proto in protos.values() for value in proto.graph.input}
    return PairMarks.of(load_tokenizer(source), TYPES in inputs)


def _without_exit_0(rule: ExitRule) -> ExitRule:
    return msgspec.structs.replace(rule, exit_0_threshold=None)


def _wanted(rule: ExitRule, otherwise: int) -> int:
    """How many documents a rule wants; one that stops all at the same exit does not say."""
    top: Any = rule.to_dict().get("top", otherwise)
    return int(top)


def _run(parts: Parts, texts: Sequence[Text], protos: Protos, precision: str) -> dict[str, Any]:
    """The texts with what the segments give for them, see `Cases`."""
    manifest = parts.source.manifest
    rows = TextEncoder(parts.source.path, manifest.tokenizer).encode(texts)
    before = [each.exit_0 for each in parts.before]
    expected = logits_of_segments(manifest, protos, before, rows, precision)
    return {"manifest": manifest, "texts": texts, "rows": rows, "expected": expected}
