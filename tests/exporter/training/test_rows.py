"""Rows to train on: of files, and of data sets of the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from fpabee.runtime.errors import InputError
from fpabee.runtime.files import ReadOptions, Row, TextFormat

PAIRS: dict[str, list[Any]] = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
CLASSES = datasets.ClassLabel(names=["no", "yes"])


@pytest.fixture(scope="module")
def rows(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_rows")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Stores a data set and returns the name that loads its training part."""

    def store(columns: dict[str, list[Any]], **features: Any) -> str:
        folder = tmp_path / "owner" / "name"
        folder.mkdir(parents=True)
        data = datasets.Dataset.from_dict(columns)
        for name, feature in features.items():
            data = data.cast_column(name, feature)
        data.to_parquet(str(folder / "train.parquet"))
        return "owner/name:train"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # For the child process that reads the files.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return store


def seen(rows: list[Row]) -> list[tuple[object, tuple[str, ...] | None]]:
    return [(row.content, row.labels) for row in rows]


def write_rows(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(path)


def test_multi_label_rows_may_have_no_label_at_all(rows: ModuleType, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x", "labels": []}])
    assert [row.labels for row in rows.load_rows(path)] == [()]


def test_row_without_label_is_named(rows: ModuleType, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y"}])
    with pytest.raises(InputError, match="row 2 has no label"):
        rows.load_rows(path)
    assert [row.text for row in rows.load_rows(path, labelled=False)] == ["x", "y"]


def test_rows_of_tables_are_read_too(rows: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,text_pair,label\n"a, b",c,yes\nd,,no\n')
    assert rows.load_rows(str(tmp_path / "train.csv")) == [
        Row("a, b", "c", ("yes",), line=2),
        Row("d", None, ("no",), line=3),
    ]
    (tmp_path / "train.tsv").write_text("text\tlabels\na\tx|y\n")
    (row,) = rows.load_rows(str(tmp_path / "train.tsv"))
    assert row.labels == ("x", "y")


def test_labels_beside_the_file_come_first(rows: ModuleType, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"text": "x", "label": "b"}])
    seen = [Row("x", labels=("b",)), Row("y", labels=("a", "b")), Row("z")]
    assert rows.label_names(seen, path) == ("a", "b"), "in order"
    (tmp_path / "labels.json").write_text('["z", "b", "a"]')
    assert rows.label_names(seen, path) == ("z", "b", "a")


def test_a_data_set_of_classes(rows: ModuleType, stored: Callable[..., str]) -> None:
    found = rows.load_rows(stored(PAIRS, label=CLASSES))
    assert seen(found) == [(("a", "b"), ("yes",)), (("c", "d"), ("no",))]


def test_a_data_set_of_several_classes_a_row(rows: ModuleType, stored: Callable[..., str]) -> None:
    columns = {"text": ["a", "b"], "labels": [[0, 1], []]}
    found = rows.load_rows(stored(columns, labels=datasets.Sequence(CLASSES)))
    assert seen(found) == [("a", ("no", "yes")), ("b", ())]


def test_columns_of_a_data_set_can_be_named(rows: ModuleType, stored: Callable[..., str]) -> None:
    name = stored(PAIRS | {"body": ["x", "y"], "kind": ["u", "v"]})
    options = ReadOptions(text_column="body", text_pair_column="sentence1", label_column="kind")
    found = rows.load_rows(name, options=options)
    assert seen(found) == [(("x", "a"), ("u",)), (("y", "c"), ("v",))]


def test_a_row_of_no_class_has_no_label(rows: ModuleType, stored: Callable[..., str]) -> None:
    name = stored(PAIRS | {"label": [1, -1]}, label=CLASSES)
    with pytest.raises(InputError, match="owner/name:train, row 2 has no label"):
        rows.load_rows(name)
    assert [row.labels for row in rows.load_rows(name, labelled=False)] == [("yes",), None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReadOptions(text_column="body"), "expected body, and labels or label"),
        (ReadOptions(text_pair_column="other"), "or premise, and other, and labels or label"),
        (ReadOptions(label_column="kind"), "or premise, and kind"),
    ],
)
def test_a_column_that_is_not_there(
    rows: ModuleType, stored: Callable[..., str], options: ReadOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rows.load_rows(stored(PAIRS), options=options)
    assert "has the columns sentence1, sentence2, label" in str(caught.value)
    assert "--label-column" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/script:train", "scripts are no longer supported"),
        ("owner/name:dev", 'Unknown split "dev"'),
        ("owner/name/big:train", "'big' not found"),
        ("owner/name:", "a name or the split is empty"),
        (":train", "a name or the split is empty"),
    ],
)
def test_a_data_set_that_is_not_there(
    rows: ModuleType, stored: Callable[..., str], name: str, message: str
) -> None:
    stored(PAIRS)
    Path("owner/script").mkdir()
    Path("owner/script/script.py").touch()
    with pytest.raises(InputError, match=f"^{name} cannot be loaded: .*{message}") as caught:
        rows.load_rows(name)
    assert "OWNER/NAME[/CONFIG]:SPLIT" in str(caught.value)


def test_a_hub_that_cannot_be_reached(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n'owner/none' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.setattr(rows, "_PREPARE", "raise SystemExit(1)")
    with pytest.raises(InputError, match="cannot be loaded: Couldn't reach 'owner/none' on"):
        rows.load_rows("owner/none:train")


def test_a_part_of_a_data_set(rows: ModuleType, stored: Callable[..., str]) -> None:
    name = stored(PAIRS, label=CLASSES)
    assert seen(rows.load_rows(f"{name}[:1]")) == [(("a", "b"), ("yes",))]


def test_rows_for_a_teacher_need_no_label(rows: ModuleType, stored: Callable[..., str]) -> None:
    name = stored({"sentence": ["a", "b"]})
    assert seen(rows.load_rows(name, labelled=False)) == [("a", None), ("b", None)]
    with pytest.raises(InputError, match="or premise, and labels or label"):
        rows.load_rows(name)


def test_labels_of_a_data_set_are_split(rows: ModuleType, stored: Callable[..., str]) -> None:
    name = stored({"text": ["a"], "kind": ["x;y"]})
    (row,) = rows.load_rows(name, options=ReadOptions(label_column="kind", label_separator=";"))
    assert row.labels == ("x", "y")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, 'row 2 has no string field "text"'),
        ({"text": [["a", "b"], ["c", "d"]]}, 'row 1 has no string field "text"'),
        ({"text": ["a", "b"], "text_pair": [1, 2]}, 'row 1: "text_pair" is a int'),
        ({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}]}, 'row 1: "label" is not a name'),
    ],
)
def test_a_row_of_a_data_set_that_is_none(
    rows: ModuleType, stored: Callable[..., str], columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(InputError, match=f"owner/name:train, {message}"):
        rows.load_rows(stored({"label": ["x", "y"]} | columns))


@pytest.mark.parametrize("options", [ReadOptions(TextFormat.CSV), ReadOptions(literal_quotes=True)])
def test_a_data_set_is_read_in_no_format(
    rows: ModuleType, stored: Callable[..., str], options: ReadOptions
) -> None:
    with pytest.raises(InputError, match="owner/name:train is a data set") as caught:
        rows.load_rows(stored(PAIRS), options=options)
    assert "--input-format and --no-quotes" in str(caught.value)


def test_a_number_of_no_class_is_a_label(rows: ModuleType, stored: Callable[..., str]) -> None:
    found = rows.load_rows(stored({"text": ["a", "b"], "label": [1, -1]}))
    assert [row.labels for row in found] == [("1",), ("-1",)]


def test_a_data_set_on_which_the_library_aborts(
    rows: ModuleType, stored: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = stored(PAIRS)
    (tmp_path / "datasets.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"{name} cannot be loaded: .* crashed \(SIGABRT\)"):
        rows.load_rows(name)


def test_the_files_of_a_data_set_are_read_by_a_child(
    rows: ModuleType, stored: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stored(PAIRS)

    def aborts(*_: object, **__: object) -> None:
        raise AssertionError("read in this process")

    monkeypatch.setattr(Parquet, "_generate_tables", aborts)
    assert len(rows.load_rows(name, labelled=False)) == 2
