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
from fpabee.runtime.files import ReadOptions, Row, read_rows
from fpabee.runtime.files.parquet_process import end_of
from fpabee.runtime.files.rows import class_name

_TEXT_COLUMNS: tuple[str, ...] = ("text", "sentence", "sentence1", "premise")
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
_PAIR_COLUMNS: tuple[str, ...] = ("text_pair", "sentence2", "hypothesis")


def load_rows(
    source: str,
    labelled: bool = True,
    options: ReadOptions | None = None,
) -> list[Row]:
    """Rows of a file, or of a `datasets` name `OWNER/NAME[/CONFIG]:SPLIT`.

    Args:
        source: the file or the name.
        labelled: whether every row must have a label.
        options: how it is read; None: as `read_rows` does, and the columns of a data set may
            also have other usual names, such as `sentence1` and `sentence2`.

    Raises:
        InputError: it cannot be read or loaded, or a row has no label.
        RowError: a row that cannot be read.
    """
    reading = options or ReadOptions()
    if Path(source).exists() or ":" not in source:
        rows = list(read_rows(source, reading))
    else:
        if reading.input_format is not None or reading.literal_quotes:
            raise InputError(
                f"{source} is a data set, no file that is read in some format",
                "leave out --input-format and --no-quotes",
            )
        rows = list(_hub_rows(source, labelled, reading))
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


def _hub_rows(source: str, labelled: bool, options: ReadOptions) -> Iterator[Row]:
    data = _load(source)
    texts, pairs = _TEXT_COLUMNS, _PAIR_COLUMNS
    if options.text_column != ReadOptions.text_column:
        texts = (options.text_column,)
    if options.text_pair_column is not None:
        pairs = (options.text_pair_column,)
    text, pair, label = (
        next((name for name in names if name in data.features), None)
        for names in (texts, pairs, options.label_names)
    )
    wanted = [texts]
    wanted += [] if options.text_pair_column is None else [pairs]
    wanted += [options.label_names] if labelled or options.label_column is not None else []
    if text is None or any(data.features.keys().isdisjoint(names) for names in wanted):
        raise InputError(
            f"{source} has the columns {', '.join(data.features)}; expected "
            f"{', and '.join(' or '.join(names) for names in wanted)}",
            "name them with --text-column, --text-pair-column and --label-column",
        )
    kind = data.features.get(label)
    classes = getattr(getattr(kind, "feature", kind), "names", None) or ()
    named = replace(options, text_column=text, text_pair_column=pair, label_column=label)
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
