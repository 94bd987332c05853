"""The jobs that the rows of files run through, from a row to its record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from ..chain.route import Route
from ..encoding import EncodedRow, characters
from ..engine import Engine
from ..errors import InputError, RowError
from ..predictions import Prediction
from ..quality import Labels, evaluate
from ..tasks.ranked import Ranked
from .destination import Convert
from .formats import TextFormat
from .queries import QUERY_COLUMN, Query
from .records import SCHEMAS, Record, convert
from .rows import Row

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class JobOptions:
    """Settings of a job: the fields that it writes, and how it deals with errors.

    Attributes:
        with_text: whether the text, or the query, is repeated in its record.
        probabilities: whether the probabilities of all labels are written.
        metrics: whether predictions are scored against the labels of the rows.
        skips_errors: whether the record of a row that cannot be used is its error; otherwise such a
            row ends the run.
    """

    with_text: bool = False
    probabilities: bool = False
    metrics: bool = False
    skips_errors: bool = False


class Job(ABC, Generic[ItemT, AnswerT]):
    """The work for each row of a file. A row becomes an item, and an item is answered.

    Args:
        engine: the engine that runs.
        route: how the rows run.
        options: what is written.

    Attributes:
        engine: as given.
        route: as given.
        options: as given.
        unit: what the rows are called.
        part: what those are called that have an exit of their own.
    """

    unit: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, engine: Engine, route: Route, options: JobOptions) -> None:
        self.engine = engine
        self.route = route
        self.options = options

    @abstractmethod
    def table(self, output: Path | None, chosen: TextFormat) -> Convert | None:
        """The function that converts a file of records as JSON lines to the output.

        Args:
            output: the file that is written; None for standard output.
            chosen: its format.

        Returns:
            None: the output takes JSON lines.

        Raises:
            InputError: this format cannot hold the records.
        """

    @abstractmethod
    def item(self, row: Row) -> ItemT:
        """The item of a row.

        Raises:
            RowError: the row cannot be answered, or not be scored although scores are wanted.
        """

    @abstractmethod
    def size(self, item: ItemT) -> int:
        """The characters of an item."""

    @abstractmethod
    def answers(self, items: Sequence[ItemT]) -> Iterator[AnswerT]:
        """The answers of items, in their order."""

    @abstractmethod
    def record(self, index: int, item: ItemT, answer: AnswerT) -> Record:
        """The record of an item; the index is that of its row."""

    @abstractmethod
    def parts(self, record: Record) -> list[Record]:
        """The parts of a record that have an exit of their own."""

    @abstractmethod
    def empty(self, item: ItemT) -> int:
        """How many of these have an empty text."""

    def count(self, item: ItemT, record: Record) -> None:
        """Count what `scores` needs."""

    def scores(self) -> dict[str, float]:
        """The scores of the records that were counted; empty if there is nothing to score."""
        return {}


class TextJob(Job[Row, Prediction]):
    """Each row is a text, which gets labels."""

    unit = part = "rows"

    def __init__(self, engine: Engine, route: Route, options: JobOptions) -> None:
        super().__init__(engine, route, options)
        self._schema = SCHEMAS[engine.manifest.task.problem_type](
            engine.labels,
            with_text=options.with_text,
            probabilities=options.probabilities,
            errors=options.skips_errors,
        )
        # How often each pair of true and predicted labels occurred.
        self._answers: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()

    def table(self, output: Path | None, chosen: TextFormat) -> Convert | None:
        """Tables have a column for each field of the records."""
        if chosen is TextFormat.JSON_LINES:
            return None
        if chosen is TextFormat.CSV:
            self._schema.check_separator()
        return partial(convert, chosen=chosen, schema=self._schema)

    def item(self, row: Row) -> Row:
        """The row itself."""
        if self.options.metrics and row.labels is None:
            raise RowError(
                f"{row.where} has no label to score against",
                "give every row a label, set `label_column`, or leave out `metrics`",
            )
        if self.options.metrics:
            self._encoded([row.labels or ()], [row.where])
        return row

    def size(self, item: Row) -> int:
        """The characters of a text or a pair."""
        return characters(item.content)

    def answers(self, items: Sequence[Row]) -> Iterator[Prediction]:
        """The predictions; all rows of a block run together."""
        return self.engine.core.stream([row.content for row in items], self.route)

    def record(self, index: int, item: Row, answer: Prediction) -> Record:
        """The record of a prediction."""
        return self._schema.record(index, item, answer)

    def parts(self, record: Record) -> list[Record]:
        """The record itself."""
        return [record]

    def empty(self, item: Row) -> int:
        """Whether the text is empty."""
        return int(not item.text)

    def count(self, item: Row, record: Record) -> None:
        """Count the true labels together with the predicted ones."""
        if self.options.metrics:
            self._answers[item.labels or (), self._schema.labels_of(record)] += 1

    def scores(self) -> dict[str, float]:
        """The scores of the rows so far, by `evaluate`."""
        if not self._answers:
            return {}
        counts = list(self._answers.values())
        expected, predicted = (
            np.repeat(self._encoded(labels), counts, axis=0)
            for labels in zip(*self._answers, strict=True)
        )
        return evaluate(predicted, expected, len(self.engine.labels))

    def _encoded(self, labels: Sequence[Sequence[str]], places: Sequence[str] = ()) -> Labels:
        return self.engine.core.task.encode(labels, places)


@dataclass(frozen=True, slots=True)
class EncodedQuery:
    """A query that is ready to run.

    Attributes:
        query: the query.
        rows: the query with each of its documents, tokenized.
    """

    query: Query
    rows: Sequence[EncodedRow]


class QueryJob(Job[EncodedQuery, list[Ranked]]):
    """Each row is a query with documents, which are put in order."""

    unit = "queries"
    part = "documents"
    _NAMES = frozenset({"index", QUERY_COLUMN, "results", "error"})

    def table(self, output: Path | None, chosen: TextFormat) -> Convert | None:
        """A table cannot hold a list of results for each query."""
        if chosen is TextFormat.JSON_LINES:
            return None
        raise InputError(f"{output} cannot hold rankings, which are lists", "write .jsonl instead")

    def item(self, row: Row) -> EncodedQuery:
        """The query of a row, tokenized."""
        query = Query.of(row)
        rows = self.engine.core.encode(query.pairs)
        try:
            self.engine.core.check_query(rows)
        except InputError as error:
            raise RowError(f"{row.where}: {error.message}", error.hint) from error
        return EncodedQuery(query, self.engine.core.with_scores(rows, query.scores))

    def size(self, item: EncodedQuery) -> int:
        """The characters of a query with each of its documents."""
        return sum(map(characters, item.query.pairs))

    def answers(self, items: Sequence[EncodedQuery]) -> Iterator[list[Ranked]]:
        """All documents of each query, best first; queries run one after another."""
        for item in items:
            yield self.engine.core.rank(item.rows, self.route, with_left=True)

    def record(self, index: int, item: EncodedQuery, answer: list[Ranked]) -> Record:
        """The record of a ranking; a field of the input never replaces a result."""
        results = [
            {"index": each.index, "score": round(each.score, 6), "exit": each.exit}
            | ({"truncated": True} if each.truncated else {})
            for each in answer
        ]
        record: Record = {"index": index}
        fields = item.query.fields.items()
        record |= {name: value for name, value in fields if name not in self._NAMES}
        if self.options.with_text:
            record[QUERY_COLUMN] = item.query.text
        return record | {"results": results}

    def parts(self, record: Record) -> list[Record]:
        """The documents."""
        parts: list[dict[str, Any]] = record["results"]
        return parts

    def empty(self, item: EncodedQuery) -> int:
        """How many documents are empty."""
        return item.query.documents.count("")


JOBS: dict[str, type[Job[Any, Any]]] = {"predict": TextJob, "rank": QueryJob}
"""By the method of `Engine` that answers."""
