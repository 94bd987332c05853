"""The rows of a training, from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpabee.exporter.training.examples import label_names, labelled_rows
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import ReadOptions, Row

USUAL = ReadOptions()


def seen(rows: list[Row]) -> list[tuple[object, tuple[str, ...] | None]]:
    return [(row.content, row.labels) for row in rows]


def test_rows_of_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,text_pair,label\n"a, b",c,yes\nd,,no\n')
    rows = seen(list(labelled_rows(str(tmp_path / "train.csv"), USUAL)))
    assert rows == [(("a, b", "c"), ("yes",)), ("d", ("no",))]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n{"text": "y"}\n')
    with pytest.raises(InputError, match="row 2 has no label"):
        list(labelled_rows(str(path), USUAL))


def test_labels_are_in_the_order_of_labels_json_or_of_the_alphabet(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.touch()
    rows = [Row("x", labels=("d", "c", "e")), Row("y", labels=("a", "b", "c")), Row("z")]
    assert label_names(rows, str(path)) == ("a", "b", "c", "d", "e")
    (tmp_path / "labels.json").write_text('["z", "b", "a"]')
    assert label_names(rows, str(path)) == ("z", "b", "a")
    for content, words in (
        (b"no", "not a list of labels"),
        (b'["\xff"]', "not a list of labels"),
        (b'["a", "b", "a"]', "a label twice"),
    ):
        (tmp_path / "labels.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"labels\.json .*{words}"):
            label_names(rows, str(path))
