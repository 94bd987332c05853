#!/usr/bin/env python
"""Make a dataset for ranking that anybody can download: which description fits a synopsis?

    python scripts/package_queries.py DATA

Queries are the synopses of Debian's packages, and documents their descriptions without the
synopsis, one of each source package and of at least 20 words. BM25 finds 50 candidates for each
query among all documents, as a search service would, so the right one is sometimes missing. Hashes
of the names divide queries into four parts: `teach` is for the training of rerankers, `train` and
`certify` are for their conversion, and `test` decides nothing. DATA/packages gets a file of each,
with the numbers of BM25 as `scores`, and `right`, the place of the right document or null. The same
indexes are downloaded as by `descriptions.py`, and `rerankers.py` reads what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import bm25s
import click
from descriptions import Package, packages, twelfth_of, write_lines

from fpabee.commands.command import exits_with_one_line

WORDS = 20
CANDIDATES = 50


@dataclass(frozen=True)
class Part:
    """Some of the queries.

    Attributes:
        twelfths: which twelfths of the packages it draws from.
        most: it has at most so many queries.
    """

    twelfths: range
    most: int


PARTS = {
    "test": Part(range(1), 300),
    "certify": Part(range(1, 2), 600),
    "train": Part(range(2, 4), 1500),
    "teach": Part(range(4, 12), 6000),
}


def collection() -> list[Package]:
    """One package of each source package, by name, and each description once."""
    by_source: dict[str, Package] = {}
    for package in packages():
        if len(package.description.split()) >= WORDS:
            by_source.setdefault(package.source, package)
    by_text: dict[str, Package] = {}
    for _, package in sorted(by_source.items()):
        by_text.setdefault(package.description, package)
    return list(by_text.values())


def numbers_of(part: Part, documents: list[Package]) -> list[int]:
    """The numbers of the packages whose synopses are the queries of a part.

    Where there are too many, those with the smallest hashes stay: a later state of the archive
    changes few of them.
    """
    hashes = {
        number: sha256(package.source.encode()).digest()
        for number, package in enumerate(documents)
        if twelfth_of(package.source) in part.twelfths
    }
    return sorted(hashes, key=hashes.__getitem__)[: part.most]


def candidates(
    queries: list[int], documents: list[Package], retriever: bm25s.BM25
) -> Iterator[dict[str, Any]]:
    """Queries with the documents that BM25 finds, best first."""
    words = bm25s.tokenize(
        [documents[number].synopsis for number in queries], stopwords="en", show_progress=False
    )
    count = min(CANDIDATES, len(documents))
    places, scores = retriever.retrieve(words, k=count, show_progress=False)
    for query, mine, numbers in zip(queries, places.tolist(), scores.tolist(), strict=True):
        yield {
            "query": documents[query].synopsis,
            "documents": [documents[place].description for place in mine],
            "scores": [round(score, 4) for score in numbers],
            "right": mine.index(query) if query in mine else None,
        }


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@exits_with_one_line
def main(data: Path) -> None:
    """Download the index, and write DATA/packages."""
    documents = collection()
    retriever = bm25s.BM25()
    texts = [package.description for package in documents]
    retriever.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    click.echo(f"{len(documents):,} descriptions")
    place = data / "packages"
    for name, part in PARTS.items():
        rows = list(candidates(numbers_of(part, documents), documents, retriever))
        write_lines(place, name, rows)
        missing = sum(row["right"] is None for row in rows)
        click.echo(
            f"{place / name}.jsonl.gz: {len(rows):,} queries, {missing:,} without their description"
        )


if __name__ == "__main__":
    main()
