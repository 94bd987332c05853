"""Rows to train on: files as `fpabee-run` reads them, and data sets of the `datasets` library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fpabee.runtime.errors import InputError
from fpabee.runtime.files import Columns, Row, TextFormat, read_rows
from fpabee.runtime.files.parquet_process import end_of
from fpabee.runtime.files.rows import class_name

_TEXT_COLUMNS = ("text", "sentence", "sentence1", "premise")
# Errors that are raised are left to be raised again by the caller's own call.
_PREPARE = """
import json, sys
sys.path[:] = sys.argv[2:]
from datasets import load_dataset
given = json.loads(sys.argv[1])
try:
    load_dataset(*given["names"], split=given["split"])
except Exception:
    sys.exit(1)
"""
_PAIR_COLUMNS = ("text_pair", "sentence2", "hypothesis")


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
        RowError: a row that cannot be read.
    """
    if Path(source).exists() or ":" not in source:
        rows = list(read_rows(source, text_format, columns))
    else:
        if text_format is not None or not (columns or Columns()).quotes:
            raise InputError(
                f"{source} is a data set, no file that is read in some format",
                "leave out --input-format and --no-quotes",
            )
        rows = list(_hub_rows(source, labelled, columns or Columns()))
    for number, row in enumerate(rows, start=1):
        if labelled and row.labels is None:
            raise InputError(
                f"{source}, row {number} has no label",
                "give every row one, or name its column with --label-column",
            )
    return rows


def label_names(rows: Sequence[Row], train: str) -> tuple[str, ...]:
    """The labels of the task: `labels.json` beside the training file, or those that occur."""
    listed = Path(train).parent / "labels.json"
    if Path(train).is_file() and listed.is_file():
        return tuple(json.loads(listed.read_text(encoding="utf-8")))
    return tuple(sorted({label for row in rows for label in row.labels or ()}))


def _hub_rows(source: str, labelled: bool, columns: Columns) -> Iterator[Row]:
    data = _load(source)
    texts: tuple[str, ...] = _TEXT_COLUMNS if columns.text == Columns().text else (columns.text,)
    pairs: tuple[str, ...] = _PAIR_COLUMNS if columns.text_pair is None else (columns.text_pair,)
    text, pair, label = (
        next((name for name in names if name in data.features), None)
        for names in (texts, pairs, columns.label_names)
    )
    wanted = [texts]
    wanted += [] if columns.text_pair is None else [pairs]
    wanted += [columns.label_names] if labelled or columns.label is not None else []
    if text is None or any(data.features.keys().isdisjoint(names) for names in wanted):
        raise InputError(
            f"{source} has the columns {', '.join(data.features)}; expected "
            f"{', and '.join(' or '.join(names) for names in wanted)}",
            "name them with --text-column, --text-pair-column and --label-column",
        )
    kind = data.features.get(label)
    classes = getattr(getattr(kind, "feature", kind), "names", None) or ()
    named = replace(columns, text=text, text_pair=pair, label=label)
    for number, item in enumerate(data, start=1):
        content = {name: item[name] for name in (text, pair, label) if name is not None}
        if label is not None and classes:
            content[label] = class_name(content[label], classes)
        yield named.row(content, f"{source}, row {number}", number)


def _load(source: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.partition(":")
    parts = name.split("/")
    try:
        if not all((*parts, split)):
            raise ValueError("a name or the split is empty")
        names = ["/".join(parts[:2]), *parts[2:]]
        _prepare(source, names, split)
        return load_dataset(*names, split=split)
    # The last where a data set is a script, which is not run.
    except (OSError, ValueError, TypeError, DatasetsError, RuntimeError) as error:
        raise InputError(
            f"{source} cannot be loaded: {' '.join(str(error).split())}",
            "give a file, or OWNER/NAME[/CONFIG]:SPLIT of a data set that is on the hub",
        ) from error


def _prepare(source: str, names: Sequence[str], split: str) -> None:
    """Convert the files of a data set in a child process, on which a damaged one may abort.

    The library keeps what it converts, so that afterwards only its own files are read.
    """
    given = json.dumps({"names": names, "split": split})
    command = [sys.executable, "-c", _PREPARE, given, *sys.path]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code < 0:
        raise InputError(
            f"{source} cannot be loaded: the reader crashed ({end_of(code)})",
            "load it again without the files that are kept of it, or give a file",
        )
