"""Queries with their documents, as services log them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, RowError
from ..first_stage import checked_scores
from .rows import ReadOptions, Row
from .sources import read_rows

QUERY_COLUMN = "query"
_DOCUMENTS = "documents"
_SCORES = "scores"
READING = ReadOptions(text_column=QUERY_COLUMN, text_pair_column="", label_column="")
"""How files of queries are read: JSON lines, or Parquet with lists."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query and the documents to rank for it.

    Attributes:
        text: the query.
        documents: the documents, in any order; the results name them by their place here, from 0.
        scores: those of the search that found the documents; None if they are not known.
        fields: all other fields of the row, which are passed through to the output.
        where: file and line, for messages.
    """

    text: str
    documents: tuple[str, ...]
    scores: tuple[float, ...] | None
    fields: dict[str, Any]
    where: str

    @classmethod
    def of(cls, row: Row) -> Query:
        """The query that a row holds.

        Raises:
            RowError: it has no list of documents, or scores that do not fit them.
        """
        fields = {**row.fields}
        documents = fields.pop(_DOCUMENTS, None)
        scores = fields.pop(_SCORES, None)
        example = 'write {"query": "...", "documents": ["...", "..."]} per line'
        if not isinstance(documents, list) or not all(isinstance(each, str) for each in documents):
            raise RowError(f"{row.where} has no list of texts in {_DOCUMENTS!r}", example)
        if scores is not None:
            try:
                scores = checked_scores(scores, len(documents))
            except InputError as error:
                raise RowError(f"{row.where}: {error.message}", error.hint) from error
        return cls(
            text=row.text,
            documents=tuple(documents),
            scores=scores,
            fields=fields,
            where=row.where,
        )

    @property
    def content(self) -> str:
        """The text of the query, which makes two queries the same, whatever their documents."""
        return self.text

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query with each of its documents, as the model reads them."""
        return [(self.text, document) for document in self.documents]


def read_queries(source: str | Path) -> Iterator[Query]:
    """The queries of a file, or of standard input.

    Args:
        source: a path, or `-` for standard input. Each line of `.jsonl` (also `.gz`) is an object
            with `query`, `documents` and perhaps `scores`; `.parquet` has the same columns.

    Yields:
        One query at a time, so that memory stays flat.

    Raises:
        InputError: the file does not exist, cannot be read, or has no rows.
        RowError: a row is not a query with documents; the message names its line.
        MissingExtraError: the file is Parquet, and pyarrow is not installed.
    """
    return map(Query.of, read_rows(source, READING))
