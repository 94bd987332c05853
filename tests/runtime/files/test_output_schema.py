"""What `fpabee-run` writes is what docs/output.schema.json and docs/run.md say."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pyarrow import parquet

from fpabee.runtime.errors import InputError
from fpabee.runtime.files.records import AnyLabels, OneLabel

from ..running import Run, write_lines

DOCS = Path(__file__).parents[3] / "docs"
SCHEMA = json.loads((DOCS / "output.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FIELDS = {
    field
    for kind in SCHEMA["anyOf"]
    for field in SCHEMA["$defs"][kind["$ref"].rpartition("/")[2]]["properties"]
}
FLAGS = {
    "--with-text": {"text", "text_pair"},
    "--scores": {"probabilities"},
}
ANSWER = {"bert": {"label", "score"}, "mpnet": {"labels", "scores"}}
ALWAYS = {"index", "exit", "layer", "truncated", "error"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "in.jsonl",
        {"text": "play music"},
        {"text": "the film", "text_pair": "the " * 100},
        {"text": 5},
        {"text": ""},
    )


def expected(family: str, *flags: str) -> set[str]:
    return ALWAYS.union(ANSWER[family], *(FLAGS[flag] for flag in flags))


@pytest.mark.parametrize("flags", [(), ("--with-text",), tuple(FLAGS)], ids=str)
@pytest.mark.parametrize("family", ANSWER)
def test_lines(
    run: Run, engines: Mapping[str, Path], source: Path, family: str, flags: tuple[str, ...]
) -> None:
    records = run(engines[family], source, "--on-error", "skip", *flags).records
    assert len(records) == 4
    for record in records:
        VALIDATOR.validate(record)
    assert set().union(*records) == expected(family, *flags)


@pytest.mark.parametrize("family", ANSWER)
def test_tables(run: Run, engines: Mapping[str, Path], source: Path, family: str) -> None:
    """A table has the same fields as columns; Parquet holds the same values with their types."""
    options = (engines[family], source, "--on-error", "skip", *FLAGS, "--quiet")
    lines = run(*options).records
    json_file, csv_file, parquet_file = outputs = [
        source.with_name(name) for name in ("out.jsonl", "out.csv", "out.parquet")
    ]
    for output in outputs:
        output.write_text("old")
        assert run(*options, "--output", output).code == 0
    assert [json.loads(line) for line in json_file.read_text("utf-8").splitlines()] == lines
    assert {path.name for path in source.parent.iterdir()} == {
        "in.jsonl",
        *(o.name for o in outputs),
    }
    with csv_file.open(encoding="utf-8", newline="") as stream:
        cells = list(csv.DictReader(stream))
    table = parquet.read_table(parquet_file)
    assert list(cells[0]) == table.column_names
    assert {name.partition(".")[0] for name in cells[0]} == expected(family, *FLAGS)
    for row, line in zip(table.to_pylist(), lines, strict=True):
        record: dict[str, Any] = {}
        for name, value in row.items():
            field, _, label = name.partition(".")
            if value is None or value is False:
                continue
            if label:
                record.setdefault(field, {})[label] = value
            else:
                record[field] = value
        assert record == line
        VALIDATOR.validate(record)


def test_the_schema_is_strict() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    good = {"index": 0, "label": "a", "score": 0.5, "exit": 1, "layer": 1}
    VALIDATOR.validate(good | {"id": [None]})
    for bad in (
        *({key: good[key] for key in good if key != name} for name in good),
        good | {"score": 1.5},
        good | {"exit": -1},
        good | {"truncated": False},
        good | {"error": "x"},
        good | {"labels": ["a"], "scores": [0.5]},
    ):
        assert not VALIDATOR.is_valid(bad), bad


def test_the_page_names_the_same_fields() -> None:
    _, page = (DOCS / "run.md").read_text("utf-8").split("## Output schema")
    rows = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == FIELDS


def test_a_label_with_the_separator_is_refused_in_a_table() -> None:
    labels = ("a|b", "c")
    OneLabel(labels).check_separator()
    with pytest.raises(InputError, match=r"'a\|b' contains '\|'.*JSON lines"):
        AnyLabels(labels).check_separator()
