"""The rows of a training: from files and from Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fpabee.exporter.training.examples import label_names, load_rows
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import ReadOptions, Row, TextFormat

PAIRS: dict[str, list[Any]] = {"text": ["a", "c"], "text_pair": ["b", "d"], "label": [1, 0]}
USUAL = ReadOptions()
CLASSES = datasets.ClassLabel(names=["no", "yes"])

Store = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Stores a dataset and returns the name that loads its training part."""

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
    return store


def seen(rows: list[Row]) -> list[tuple[object, tuple[str, ...] | None]]:
    return [(row.content, row.labels) for row in rows]


def test_rows_of_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,text_pair,label\n"a, b",c,yes\nd,,no\n')
    rows = seen(load_rows(str(tmp_path / "train.csv"), USUAL))
    assert rows == [(("a, b", "c"), ("yes",)), ("d", ("no",))]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n{"text": "y"}\n')
    with pytest.raises(InputError, match="row 2 has no label"):
        load_rows(str(path), USUAL)


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


BODY = PAIRS | {"body": ["x", "y"], "kind": ["u", "v"]}
DATASETS: dict[str, tuple[dict[str, list[Any]], dict[str, Any], ReadOptions, list[Any]]] = {
    "class names": (PAIRS, {"label": CLASSES}, ReadOptions(),
                    [(("a", "b"), ("yes",)), (("c", "d"), ("no",))]),
    "several classes": ({"text": ["a", "b"], "labels": [[0, 1], []]},
                        {"labels": datasets.Sequence(CLASSES)}, ReadOptions(),
                        [("a", ("no", "yes")), ("b", ())]),
    "numbers that are not classes": ({"text": ["a", "b"], "label": [1, -1]}, {}, ReadOptions(),
                                     [("a", ("1",)), ("b", ("-1",))]),
    "named columns": (BODY, {},
                      ReadOptions(text_column="body", label_column="kind"),
                      [(("x", "b"), ("u",)), (("y", "d"), ("v",))]),
}  # fmt: skip


@pytest.mark.parametrize("case", DATASETS)
def test_rows_of_datasets_are_read(case: str, store: Store) -> None:
    columns, features, chosen, expected = DATASETS[case]
    assert seen(load_rows(store(columns, **features), chosen)) == expected


def test_a_row_of_unknown_class_has_no_label(store: Store) -> None:
    name = store(PAIRS | {"label": [1, -1]}, label=CLASSES)
    with pytest.raises(InputError, match="owner/name:train, row 2 has no label"):
        load_rows(name, USUAL)
    assert seen(load_rows(f"{name}[:1]", USUAL)) == [(("a", "b"), ("yes",))]
    with pytest.raises(InputError, match="owner/name:train is a dataset"):
        load_rows(name, ReadOptions(input_format=TextFormat.CSV))


def test_a_dataset_that_cannot_be_loaded_is_named(store: Store) -> None:
    store(PAIRS)
    Path("owner/script").mkdir()
    Path("owner/script/script.py").touch()
    for name, reason in (
        ("owner/script:train", "scripts are no longer supported"),
        ("owner/name:dev", 'Unknown split "dev"'),
        ("owner/name/big:train", "'big' not found"),
        ("owner/name:", "its name or its split is empty"),
    ):
        with pytest.raises(InputError, match=f"^{name} cannot be loaded: .*{reason}") as caught:
            load_rows(name, USUAL)
        assert "OWNER/NAME[/CONFIG]:SPLIT" in caught.value.hint
