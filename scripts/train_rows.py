"""Rows to train on: files as `fpabee-run` reads them, and data sets of the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpabee.runtime.errors import InputError
from fpabee.runtime.text_io import Columns, Row, TextFormat, read_rows

_TEXT_COLUMNS = ("text", "sentence", "sentence1", "premise")
_PAIR_COLUMNS = ("text_pair", "sentence2", "hypothesis")
_LABEL_COLUMNS = ("label", "labels")


def load_rows(
    source: str,
    labelled: bool = True,
    text_format: TextFormat | None = None,
    columns: Columns | None = None,
) -> list[Row]:
    """Rows of a file, or of a `datasets` name `OWNER/NAME[/CONFIG]:SPLIT`.

    Args:
        source: the file or the name.
        labelled: whether every row must have a label.
        text_format: of a file; default: by its name.
        columns: what holds the text, its pair, and the labels; default: what `read_rows` looks
            for, and of a data set also the usual names, such as `sentence1` and `sentence2`.

    Raises:
        InputError: it cannot be read or loaded, or a row has no label.
    """
    if Path(source).exists() or ":" not in source:
        rows = list(read_rows(source, text_format, columns))
    else:
        rows = list(_hub_rows(source, columns or Columns()))
    for number, row in enumerate(rows, start=1):
        if labelled and row.labels is None:
            raise InputError(
                f"{source}, row {number} has no label", 'add "label" or "labels" to every row'
            )
    return rows


def label_names(rows: Sequence[Row], train: str) -> tuple[str, ...]:
    """The labels of the task: `labels.json` beside the training file, or those that occur."""
    listed = Path(train).parent / "labels.json"
    if Path(train).is_file() and listed.is_file():
        return tuple(json.loads(listed.read_text(encoding="utf-8")))
    return tuple(sorted({label for row in rows for label in row.labels or ()}))


def _hub_rows(source: str, columns: Columns) -> Iterator[Row]:
    data = _load(source)
    texts = _TEXT_COLUMNS if columns.text == Columns().text else (columns.text,)
    pairs = _PAIR_COLUMNS if columns.text_pair is None else (columns.text_pair,)
    labels = _LABEL_COLUMNS if columns.label is None else (columns.label,)
    text, pair, label = (
        next((name for name in names if name in data.features), None)
        for names in (texts, pairs, labels)
    )
    if text is None or label is None or (pair is None and columns.text_pair is not None):
        expected = [texts, labels] if columns.text_pair is None else [texts, pairs, labels]
        raise InputError(
            f"{source} has the columns {', '.join(data.features)}; expected "
            f"{', and '.join(' or '.join(names) for names in expected)}",
            "name them with --text-column, --text-pair-column and --label-column",
        )
    kind = data.features[label]
    names = getattr(getattr(kind, "feature", kind), "names", None)
    for item in data:
        yield Row(item[text], item[pair] if pair else None, _labels_of(item[label], names))


def _labels_of(value: Any, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Label names; None for a row without, which data sets of classes mark with -1."""
    values = value if isinstance(value, list) else [value]
    if any(one is None or (names and one < 0) for one in values):
        return None
    return tuple(names[one] if names else str(one) for one in values)


def _load(source: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.rpartition(":")
    parts = name.split("/")
    try:
        if not all((*parts, split)):
            raise ValueError("a name or the split is empty")
        return load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{source} cannot be loaded: {first}",
            "give a file, or OWNER/NAME[/CONFIG]:SPLIT of a data set that is on the hub",
        ) from error
