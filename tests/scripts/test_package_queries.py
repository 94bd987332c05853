"""The dataset for ranking: from an index of the archive to queries with their candidates."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import package_queries

from ..programs import printed


def test_queries_find_their_own_descriptions_among_all(
    serve_archive: Callable[..., None], tmp_path: Path
) -> None:
    filling = " ".join(f"filling{n}" for n in range(20))
    packages = [
        f"Package: p{n}\nSource: s{n // 2}\nSection: x\nDescription-md5: m{n // 2}"
        for n in range(200)
    ]
    packages += [
        f"Package: {name}\nSection: x\nDescription-md5: {name}" for name in ("copy", "short")
    ]
    texts = [
        f"Description-md5: m{n}\nDescription-en: the synopsis{n}\n {filling} synopsis{n}\n .\n"
        for n in range(99)
    ]
    texts += [
        f"Description-md5: m99\nDescription-en: matches nothing\n {filling}\n",
        f"Description-md5: copy\nDescription-en: of the same text\n {filling} synopsis98\n",
        "Description-md5: short\nDescription-en: short\n synopsis0\n",
    ]
    serve_archive(packages, texts)
    assert "100 descriptions" in printed(package_queries.main, tmp_path)
    rows: list[dict[str, Any]] = []
    for part in package_queries.PARTS:
        with gzip.open(tmp_path / "packages" / f"{part}.jsonl.gz", "rt") as file:
            mine = [json.loads(line) for line in file]
        assert mine
        rows += mine
    assert len({row["query"] for row in rows}) == len(rows) == 100
    for row in rows:
        assert len(row["documents"]) == len(row["scores"]) == package_queries.CANDIDATES
        assert row["scores"] == sorted(row["scores"], reverse=True)
        if row["query"].startswith("the "):
            assert row["right"] == 0
            assert row["documents"][0] == f"{filling} {row['query'].removeprefix('the ')}"
