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
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
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


def descriptions() -> dict[str, tuple[str, str]]:
    """The section and the description of source packages, by name."""
    key = "Description-md5"
    texts = {each[key]: each["Description-en"] for each in stanzas(DESCRIPTIONS) if each}
    sections_and_texts: dict[str, tuple[str, str]] = {}
    for package in stanzas(PACKAGES):
        # A line with only a dot separates paragraphs.
        words = [word for word in texts.get(package.get(key, ""), "").split() if word != "."]
        if len(words) >= WORDS:
            source = package.get("Source", package["Package"]).split()[0]
            sections_and_texts.setdefault(source, (package["Section"], " ".join(words)))
    sections = Counter(section for section, _ in sections_and_texts.values()).most_common(SECTIONS)
    return {name: row for name, row in sections_and_texts.items() if row[0] in dict(sections)}


def part_of(name: str) -> str:
    """Train, dev (1 of 12) or test (1 of 12), from the name of the package."""
    return {0: "dev", 1: "test"}.get(sha256(name.encode()).digest()[0] % 12, "train")


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@exits_with_one_line
def main(data: Path) -> None:
    """Download the index, and write DATA/descriptions."""
    lines: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for name, (section, text) in sorted(descriptions().items()):
        lines[part_of(name)].append(json.dumps({"text": text, "label": section}) + "\n")
    place = data / "descriptions"
    place.mkdir(parents=True, exist_ok=True)
    for part, mine in lines.items():
        with gzip.open(place / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(mine)
        click.echo(f"{place / part}.jsonl.gz: {len(mine):,} descriptions")


if __name__ == "__main__":
    main()
