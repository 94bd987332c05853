"""The dataset of package descriptions: from an index of the archive to rows of three parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import descriptions
import pytest

from fpabee.runtime.files import read_rows

from ..programs import printed

LONG = "word " * 58 + "end"


def test_each_source_package_is_one_row_of_one_part(
    serve_archive: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [
        f"Package: p{n}\nSource: s{n // 2} (1.{n})\nSection: python\nDescription-md5: m{n // 2}"
        for n in range(200)
    ]
    packages += ["Package: small\nSection: rare\nDescription-md5: m0"] * 2
    packages += ["Package: short\nSection: python\nDescription-md5: short", ""]
    texts = [f"Description-md5: m{n}\nDescription-en: of {n}\n {LONG}\n .\n" for n in range(100)]
    texts += ["Package: short\nDescription-md5: short\nDescription-en: three words only\n"]
    serve_archive(packages, texts)
    monkeypatch.setattr(descriptions, "SECTIONS", 1)
    printed(descriptions.main, tmp_path)
    parts = {
        part: [row.content for row in read_rows(tmp_path / "descriptions" / f"{part}.jsonl.gz")]
        for part in ("train", "dev", "test")
    }
    found = sorted(text for part in parts.values() for text in part)
    assert found == sorted(f"of {n} {LONG}" for n in range(100)), json.dumps(found[:2])
    assert all(0 < len(parts[part]) < 20 for part in ("dev", "test"))
