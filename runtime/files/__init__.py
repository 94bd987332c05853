"""Rows in, predictions out: all that reads texts and labels, and writes results.

Reading, one row at a time, so that memory stays flat:

- `sources`: files and standard input, in the format that their names tell (`formats`)
- `rows`: what a row is, the options that say how it is read, and labels as numbers
- `lines` (plain text, JSON lines, CSV, TSV) and `parquet`

Writing:

- `records`: what is written for a row, as a line of JSON or as a row of CSV or Parquet
- `destination`: the output as a whole, and the rows of a file that is not complete yet
- `jobs`: what is done with each row, by the kind of model
- `run`: from rows to records, block by block, and what it counted

`.txt`: each line is a text, and an empty line is an empty text, so that results line up with the
file. `.jsonl`: each line is an object with `text`, optionally `text_pair`, `label` or `labels`, and
any other fields. `.csv`, `.tsv`: a header row names the same columns; an empty `text_pair` or
`label` means that there is none, and `labels` are separated by `|`. `.parquet`: the same columns,
with `labels` a list. All but Parquet may be compressed (`.gz`). UTF-8, with or without a byte order
mark. `-` is standard input, as text or JSON lines unless the options say otherwise.
"""

from .formats import TextFormat
from .rows import ReadOptions, Row
from .sources import STANDARD_INPUT, Inputs, read_rows

__all__ = [
    "STANDARD_INPUT",
    "Inputs",
    "ReadOptions",
    "Row",
    "TextFormat",
    "read_rows",
]
