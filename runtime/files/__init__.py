"""Read texts and labels: one row at a time, so that memory stays flat.

`.txt`: a line is a text, and an empty line an empty text, so that results line up with
the file. `.jsonl`: a line is an object with `text`, optionally `text_pair`, `label` or
`labels`, and any other field. `.csv`, `.tsv`: a header row names the same columns; an empty
`text_pair` or `label` is none, and `labels` are separated by `|`. `.parquet`: the same
columns, with `labels` a list. All but Parquet also with `.gz`. UTF-8, with or without a byte
order mark. `-` is standard input, as text or JSON lines unless said otherwise.
"""

from .rows import LABEL_SEPARATOR, ReadOptions, Row, TextFormat
from .sources import STANDARD_INPUT, Inputs, read_rows

__all__ = [
    "LABEL_SEPARATOR",
    "STANDARD_INPUT",
    "Inputs",
    "ReadOptions",
    "Row",
    "TextFormat",
    "read_rows",
]
