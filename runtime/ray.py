"""Classify the rows of a Ray dataset, on as many machines as a cluster has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import InputError, RowError
from .files import ReadOptions, Row
from .files.parquet import row_at
from .files.records import SCHEMAS, arrow_type, records
from .hub import repository_of
from .machine import require

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

__all__ = ["Classify", "classify"]


class Classify:
    """Classifies batches; for `Dataset.map_batches` with `batch_format="pyarrow"`.

    Each actor of Ray makes one, which loads the engine. `classify` sets the options of
    `map_batches` that it needs.

    Args:
        engines: the engines folder, at a path that every machine can read, or `owner/name` on the
            hub, as for `Engine.load`.
        text_column: the column of the text.
        text_pair_column: the column of the second text; default: `text_pair`, if there is one.
        probabilities: whether there is a column `probabilities.NAME` for each label.
        skip_errors: whether a row without a text gets a message in the column `error`, and nulls as
            its answer. Otherwise it ends the job.
        **load: arguments of `Engine.load`, such as `target`, `revision` and `threads`.

    Raises:
        FpabeeError: as `Engine.load`, or `InputError`: the model ranks documents.
    """

    def __init__(
        self,
        engines: str | Path,
        *,
        text_column: str = "text",
        text_pair_column: str | None = None,
        probabilities: bool = False,
        skip_errors: bool = False,
        **load: Any,
    ) -> None:
        self._reading = ReadOptions(text_column=text_column, text_pair_column=text_pair_column)
        self._engine = Engine.load(engines, **load)
        self._engine.core.check_method("predict")
        schema = SCHEMAS[self._engine.manifest.task.problem_type]
        self._schema = schema(self._engine.labels, probabilities=probabilities, errors=skip_errors)
        self._names = self._schema.results

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Add the answers to a batch.

        Returns:
            All columns of the batch and, as in a Parquet file of predictions: `label` and
            `score`, or for a multi-label model `labels` and `scores`; `exit`, `layer`, and
            `truncated`; and the columns of the arguments that are set.

        Raises:
            InputError: the column of the text is missing; the batch has a column with the name of
                an answer; or a text is not a string.
            FpabeeError: as in `Engine.predict`.
        """
        import pyarrow

        texts = self._texts(batch)
        items = [
            row_at(texts, at, self._reading, f"row {at} of a batch") for at in range(batch.num_rows)
        ]
        if not self._schema.errors:
            for item in items:
                if isinstance(item, RowError):
                    raise item
        answers = iter(self._engine.predict([row.content for row in items if isinstance(row, Row)]))
        made = map(self._schema.flat, records(items, answers, self._schema.record))
        types = pyarrow.schema([(name, arrow_type(name)) for name in self._names])
        answered = pyarrow.Table.from_pylist(list(made), types)
        for name in answered.column_names:
            batch = batch.append_column(name, answered[name])
        return batch

    def _texts(self, batch: pyarrow.Table) -> pyarrow.Table:
        """The columns of the batch that hold texts."""
        self._reading.check(batch.column_names, "the dataset")
        taken = set(self._names) & set(batch.column_names)
        if taken:
            raise InputError(
                f'the dataset has a column "{min(taken)}", which is the name of an answer',
                "rename or drop the column first: dataset.rename_columns, dataset.drop_columns",
            )
        return batch.select(
            name
            for name in (self._reading.text_column, self._reading.pair_column)
            if name in batch.column_names
        )


def classify(
    dataset: Dataset,
    engines: str | Path,
    *,
    actors: int | tuple[int, int] = (1, 8),
    threads: int = 1,
    gpus: float = 0,
    batch_size: int = 4096,
    **options: Any,
) -> Dataset:
    """Classify a dataset.

    Args:
        dataset: the dataset, whose columns are kept.
        engines: as for `Classify`. A relative path is taken from the folder of this process.
        actors: how many actors run, or the fewest and the most; Ray starts more while batches
            wait. Each actor loads the model once.
        threads: the CPUs of an actor. With one thread for each, more actors classify more rows a
            second than more threads.
        gpus: the GPUs of an actor.
        batch_size: most rows of a batch.
        **options: other arguments of `Classify`.

    Returns:
        The dataset that `Classify` describes. Like every dataset of Ray it is computed when it is
        read, and its rows may be in another order.

    Raises:
        MissingExtraError: Ray is not installed.

    Example:
        ```python
        import ray

        from fpabee.runtime.ray import classify

        texts = ray.data.read_parquet("texts/")
        classify(texts, "/shared/engines", actors=(1, 32)).write_parquet("answers/")
        ```
    """
    require("ray")
    from ray.data import ActorPoolStrategy

    engines = engines if repository_of(engines) else Path(engines).absolute()
    fewest, most = (actors, actors) if isinstance(actors, int) else actors
    # A block is the work of one actor, and Ray makes one block of a million short texts.
    return dataset.repartition(target_num_rows_per_block=batch_size).map_batches(
        Classify,
        fn_constructor_kwargs={"engines": engines, "threads": threads, **options},
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=threads,
        num_gpus=gpus or None,
        udf_modifying_row_count=False,
    )
