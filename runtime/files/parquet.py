"""Parquet, through pyarrow: the extra `parquet`. Read in small batches.

pyarrow may end the process on a damaged file: `parquet_process` reads such files in a child.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError, MissingExtraError, RowError
from .rows import ReadOptions, Row, class_name

# Few: a long value that stands in the file once may be that of every row.
_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20
_DICTIONARY_BYTES = 8 * 2**20


def load_pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing() from error
    return pyarrow, parquet


def check_pyarrow() -> None:
    """Check that pyarrow is installed, without importing it.

    Raises:
        MissingExtraError: it is not.
    """
    if util.find_spec("pyarrow") is None:
        raise _missing()


def _missing() -> MissingExtraError:
    return MissingExtraError(
        "Parquet needs pyarrow, not installed here", "pip install 'fpabee[parquet]'"
    )


def parquet_rows(
    path: Path, options: ReadOptions, progress: Callable[[float], None]
) -> Iterator[Row | RowError]:
    """A row for each row of a Parquet file.

    Args:
        path: the file.
        options: which columns are text and labels; the others are passed through.
        progress: told the share of the rows that has been read.

    Raises:
        InputError: the file is damaged, or lacks a column or has it in another type.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, parquet = load_pyarrow()
    try:
        metadata = parquet.read_metadata(path)
        # Without the buffer, a row group of a million rows is read at once. Without a
        # dictionary, a long text that the file holds once is there once for each row; with one,
        # all texts of a row group are there at once.
        with parquet.ParquetFile(
            path,
            metadata=metadata,
            read_dictionary=_few_texts(metadata),
            buffer_size=_BUFFER_BYTES,
        ) as file:
            options.check(file.schema_arrow.names, str(path))
            _check_types(pyarrow, file.schema_arrow, options, path)
            names = _class_names(file.schema_arrow, options)
            total = max(1, metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for start in range(batch.num_rows):
                    number += 1
                    yield _row(batch, start, options, names, f"{path}, row {number}", number)
                progress(number / total)
    # The last where a column's name is no text.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as Parquet: {line}", "copy the file again"
        ) from error


def _few_texts(metadata: Any) -> list[str]:
    """The columns of strings and bytes, also those within others, that are small in the file."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    found = []
    for number in range(metadata.num_columns):
        column = metadata.schema.column(number)
        sizes = (group.column(number).total_uncompressed_size for group in groups)
        is_text = column.physical_type == "BYTE_ARRAY" and column.converted_type != "DECIMAL"
        if is_text and max(sizes, default=0) <= _DICTIONARY_BYTES:
            found.append(column.path)
    return found


def _row(
    batch: Any, at: int, options: ReadOptions, names: dict[str, list[str]], where: str, number: int
) -> Row | RowError:
    try:
        content = {
            name: _value(column[at], f'{where}: the column "{name}"')
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        for name, known in names.items():
            content[name] = class_name(content[name], known)
        return options.row(content, where, number, table=True)
    except RowError as error:
        return error


def _value(scalar: Any, where: str) -> Any:
    """A value as JSON has it."""
    try:
        return _plain(scalar.as_py())
    except UnicodeDecodeError as error:
        raise RowError(f"{where} is not UTF-8: {error.reason}", "write the file again") from error
    # A time outside of Python's years or in a zone that is not known here, or deep nesting.
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise RowError(
            f"{where} holds a {scalar.type} that cannot be read: {' '.join(str(error).split())}",
            "write it as a string, or leave the column out",
        ) from error


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates, decimals and the like as strings, bytes in base64."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return msgspec.to_builtins(value) if isinstance(value, bytes) else str(value)


def _check_types(pyarrow: Any, schema: Any, options: ReadOptions, path: Path) -> None:
    for name in (options.text_column, options.pair_name):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
        types = pyarrow.types
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)) and (
            str(kind) != "string_view"
        ):
            raise InputError(
                f'{path}: the column "{name}" is {kind}, not a string',
                "choose another with --text-column or --text-pair-column",
            )


def _class_names(schema: Any, options: ReadOptions) -> dict[str, list[str]]:
    """Names of numbered labels, which the `datasets` library keeps beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: features.get(name, {}) for name in options.label_names}
        # Of several labels a row, the feature is a list of classes.
        found = {name: kind.get("feature", kind).get("names") for name, kind in kinds.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {
        name: [str(part) for part in known]
        for name, known in found.items()
        if isinstance(known, list) and name in schema.names
    }
