"""Parquet inputs, through pyarrow; read in small batches.

On some damaged files, pyarrow ends the whole process when it is asked for the metadata of a column
chunk (`RowGroupMetaData.column`), but raises an error when it reads the rows. So nothing here asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError, RowError
from .rows import ReadOptions, Row

# Few, because a long value that the file holds once may be the value of every row.
_BATCH_ROWS = 16
_BUFFER_BYTES = 2**20


def parquet_rows(path: Path, options: ReadOptions) -> Iterator[Row | RowError]:
    """One row for each row of a Parquet file.

    Args:
        path: the file.
        options: which columns are text and labels; the others are passed through.

    Raises:
        InputError: the file is damaged, or a column is missing or has the wrong type.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer size, whole row groups are read.
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            options.check(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                for at in range(batch.num_rows):
                    number += 1
                    yield row_at(batch, at, options, f"{path}, row {number}")
    # UnicodeDecodeError: the name of a column is not UTF-8.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as Parquet: {line}", "copy the file again"
        ) from error


def row_at(batch: Any, at: int, options: ReadOptions, where: str) -> Row | RowError:
    """A row of a table or batch of pyarrow, or why it cannot be read.

    Args:
        batch: the table.
        at: the place of the row in it, from 0.
        options: which columns are text and labels; the others are passed through.
        where: file and row, for messages.
    """
    content = {}
    try:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            value = column[at].as_py()
            is_text = name in (options.text_column, options.pair_column)
            content[name] = value if is_text else _plain(value)
        return options.row(content, where, table=True)
    except RowError as error:
        return error
    # Not UTF-8, a time beyond Python's years or in an unknown time zone, or deep nesting.
    except (ArithmeticError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        return RowError(
            f'{where}: the column "{name}" holds a {column.type} that cannot be read: {reason}',
            "write it as a string in UTF-8, or leave the column out",
        )


def _plain(value: Any) -> Any:
    """A value in terms of JSON: dates, decimals, infinity and the like as strings, bytes in base64.

    NaN is None, because that is what it stands for in most tables.
    """
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))
