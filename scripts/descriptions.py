#!/usr/bin/env python
"""Make a dataset of longer texts that anybody can download: descriptions of Debian's packages.

    python scripts/descriptions.py DATA

The task is to predict the section of the Debian archive (`python`, `science`, ...) of a package
from its description. Descriptions of at least 60 words are used (148 tokens on average), one of
each source package, from the ten sections that have the most of them. Hashes of the names divide
them into train, dev and test, so that a later state of the archive moves no package from one part
to another. They are written to DATA/descriptions, where `peers.py --only mini-descriptions-exit-0`
and `conversions.py --only mini-descriptions` read them. The indexes of Debian 13 are downloaded
(16 MB). The texts belong to the authors of the packages.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import click

from fpabee.commands.command import exits_with_one_line
from fpabee.runtime import InputError

ARCHIVE = "https://deb.debian.org/debian/dists/trixie/main"
PACKAGES = "binary-amd64/Packages.xz"
DESCRIPTIONS = "i18n/Translation-en.xz"
WORDS = 60
SECTIONS = 10
_FIELD = re.compile(r"^([\w-]+): (.*(?:\n .*)*)", re.MULTILINE)


def stanzas(file: str) -> Iterator[dict[str, str]]:
    """The fields of each stanza of an index of the archive.

    Raises:
        InputError: it cannot be downloaded.
    """
    try:
        with urlopen(f"{ARCHIVE}/{file}", timeout=60) as answer:
            text = lzma.decompress(answer.read()).decode()
    except URLError as error:
        raise InputError(
            f"{ARCHIVE}/{file} cannot be downloaded: {error.reason}",
            "connect to the internet, or set HTTPS_PROXY",
        ) from error
    for stanza in text.split("\n\n"):
        yield dict(_FIELD.findall(stanza))


@dataclass(frozen=True)
class Package:
    """The record of a binary package in the archive.

    Attributes:
        source: name of the source package that it is built from.
        section: of the archive.
        synopsis: one line.
        description: the paragraphs below the synopsis, on one line.
    """

    source: str
    section: str
    synopsis: str
    description: str


def packages() -> Iterator[Package]:
    """The binary packages that are described, in the order of the index."""
    key = "Description-md5"
    texts = {each[key]: each["Description-en"] for each in stanzas(DESCRIPTIONS) if each}
    for package in stanzas(PACKAGES):
        if text := texts.get(package.get(key, "")):
            synopsis, _, paragraphs = text.partition("\n")
            # A line with only a dot separates paragraphs.
            words = [word for word in paragraphs.split() if word != "."]
            source = package.get("Source", package["Package"]).split()[0]
            yield Package(
                source=source,
                section=package["Section"],
                synopsis=" ".join(synopsis.split()),
                description=" ".join(words),
            )


def descriptions() -> dict[str, tuple[str, str]]:
    """The section and the description of source packages, by name."""
    sections_and_texts: dict[str, tuple[str, str]] = {}
    for package in packages():
        text = f"{package.synopsis} {package.description}"
        if len(text.split()) >= WORDS:
            sections_and_texts.setdefault(package.source, (package.section, text))
    sections = Counter(section for section, _ in sections_and_texts.values()).most_common(SECTIONS)
    return {name: row for name, row in sections_and_texts.items() if row[0] in dict(sections)}


def twelfth_of(name: str) -> int:
    """One of twelve parts, 0 to 11, from the name of a package."""
    return sha256(name.encode()).digest()[0] % 12


def part_of(name: str) -> str:
    """Train, dev (1 of 12) or test (1 of 12), from the name of the package."""
    return {0: "dev", 1: "test"}.get(twelfth_of(name), "train")


def write_lines(place: Path, part: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as PLACE/PART.jsonl.gz."""
    place.mkdir(parents=True, exist_ok=True)
    with gzip.open(place / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@exits_with_one_line
def main(data: Path) -> None:
    """Download the index, and write DATA/descriptions."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for name, (section, text) in sorted(descriptions().items()):
        rows[part_of(name)].append({"text": text, "label": section})
    place = data / "descriptions"
    for part, mine in rows.items():
        write_lines(place, part, mine)
        click.echo(f"{place / part}.jsonl.gz: {len(mine):,} descriptions")


if __name__ == "__main__":
    main()
