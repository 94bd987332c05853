"""What is wrong with the model and the texts of a conversion, found before PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...runtime.files import read_rows
from ...runtime.files.queries import read_queries
from ..early import Config
from ..paths import check_model_dir
from .options import ConvertOptions
from .texts import read_texts, split


def check_inputs(classifier: str | Path, texts: str | Path, options: ConvertOptions) -> None:
    """Check what can be known of a model and texts within a second or so.

    Args:
        classifier: as in `convert`.
        texts: as in `convert`.
        options: as in `convert`.

    Raises:
        ModelError: the length is impossible for the model.
        InputError: the model lacks a label, a column is not there, or the texts are too few.
        RowError: a row cannot be read.
    """
    config = Config(check_model_dir(classifier))
    config.check_length(options.max_length)
    if options.bound is not None:
        config.check_labels(options.bound.thresholds)
    others = options.train_texts
    files = [Path(each) for each in (texts, others) if each is not None]
    if not all(path.is_file() for path in files):
        return  # a pipe can be read only once
    _CHECKS[config.method](files, options)


def _check_queries(files: Sequence[Path], options: ConvertOptions) -> None:
    for path in files:
        next(read_queries(path))


def _check_texts(files: Sequence[Path], options: ConvertOptions) -> None:
    reading = options.reading
    group = options.group_column
    for path in files:
        next(read_rows(path, reading))
    if group is not None:
        own, *train = (read_texts(path, reading, group) for path in files)
        split(own, group, next(iter(train), None))


_CHECKS = {"predict": _check_texts, "rank": _check_queries}
"""What is checked in files, by the method of `Engine` that asks the model."""
