"""One run of the classifier over all texts: its logits, and what a head could read at each layer.

The states of a layer are the input of the next one, so nothing is computed twice, and the logits
are those of the classifier itself.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...calibration.progress import Progress
from ...runtime.artifact.folder import write_whole
from ...runtime.artifact.manifest import MASK_FILL
from ...runtime.encoding import EncodedRow
from ...runtime.errors import InputError
from ..model import predict
from ..staging import reserve
from .classifier import Classifier

_BATCH = 32
_BATCH_TOKENS = 4096  # few, because every worker has the states of a batch in memory
_MOST_WORKERS = 4
_MOST_BYTES = 4 * 2**30  # of states in a file
# If not even so many units fit, rows contribute fewer tokens than their task asks for.
_ENOUGH_UNITS = 200
_FEWEST_TOKENS = 32
_LARGEST = 65504.0  # of fp16


@dataclass(frozen=True)
class States:
    """What heads of all layers but the last read: states of the tokens of rows, after the norm.

    Attributes:
        rows: numbers of the rows, ascending if those that were asked for are.
        starts: `[rows + 1]` where the tokens of each row begin.
        tokens: `[tokens, layers - 1, hidden]` float16; the first token of each row comes first.
    """

    rows: NDArray[np.intp]
    starts: NDArray[np.int64]
    tokens: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[rows]` how many tokens each row has here."""
        return np.diff(self.starts)

    def batch(self, places: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """The states of some rows, padded to the longest of them.

        Args:
            places: which of `rows`.

        Returns:
            The states `[layers - 1, places, tokens, hidden]` float32, and the attention bias
            `[places, 1, 1, tokens]` float32, 0 on tokens and MASK_FILL on padding.
        """
        starts = self.starts[places, None]
        lengths = self.starts[places + 1, None] - starts
        token = np.arange(lengths.max())
        # Padding repeats the last token.
        states = torch.from_numpy(self.tokens[starts + np.minimum(token, lengths - 1)])
        by_layer = states.permute(2, 0, 1, 3).to(
            torch.float32, memory_format=torch.contiguous_format
        )
        bias = np.where(token < lengths, np.float32(0), np.float32(MASK_FILL))
        return by_layer, torch.from_numpy(bias)[:, None, None]


class _WithStates(nn.Module):
    """A classifier that also gives states of every layer but the last.

    Args:
        classifier: the classifier.
        most: the most tokens of a row.
    """

    def __init__(self, classifier: Classifier, most: int) -> None:
        super().__init__()
        self.model = classifier.model
        self.most = most
        self._norm = classifier.backbone.norm() or nn.Identity()
        # ALBERT gives the states of every layer of a group, which counts as one layer here.
        self._step = getattr(self.model.config, "inner_group_num", 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """`[rows, labels + values]`: the logits, then the states `[tokens, layers - 1, hidden]`.

        Of longer rows, there are tokens at even distances, and the first.
        """
        output = self.model(**inputs, output_hidden_states=True)
        lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
        kept = lengths.clamp_max(self.most)
        token = torch.arange(int(kept.max()), device=lengths.device)
        place = (token * lengths // kept).clamp_max(lengths - 1)
        row = torch.arange(len(lengths), device=lengths.device)[:, None]
        # The first states are the embeddings.
        states = [
            self._norm(hidden[row, place])
            for hidden in output.hidden_states[self._step : -1 : self._step]
        ]
        values = torch.stack(states, dim=2).clamp(-_LARGEST, _LARGEST).flatten(1)
        return torch.cat([output.logits, values], dim=1)


def most_tokens(classifier: Classifier) -> int:
    """How many tokens have states that fit into the file."""
    states = (classifier.layers - 1) * int(classifier.model.config.hidden_size)
    return _MOST_BYTES // (np.dtype(np.float16).itemsize * states)


@dataclass(frozen=True)
class Taught:
    """The rows that teach heads, and how much of them is kept.

    Attributes:
        rows: numbers of the rows whose states are kept: those that train, then others.
        trained: how many of them train.
        units: `[rows]` the unit of each of these rows, such as its query; all rows of a unit take
            part, or none. None: each row is one.
        needed: numbers of the rows that are run even if their states are not kept; None: all.
        fewest_tokens: of a row whose tokens are not all kept.
    """

    rows: NDArray[np.intp]
    trained: int
    units: NDArray[np.intp] | None = None
    needed: NDArray[np.intp] | None = None
    fewest_tokens: int = _FEWEST_TOKENS


class _StatesFile:
    """A file of states, mapped into memory.

    Args:
        path: the file.
        rows: numbers of the rows whose states it holds.
        tokens: `[rows]` how many tokens each of them has.
    """

    def __init__(self, path: Path, rows: NDArray[np.intp], tokens: NDArray[np.intp]) -> None:
        self._path = path
        self._rows = rows
        self._starts = np.concatenate([[0], np.cumsum(tokens)])
        self._places = {number: place for place, number in enumerate(rows.tolist())}

    @contextmanager
    def new(self, shape: tuple[int, int]) -> Iterator[None]:
        """Make the file, which is deleted if an error comes before the end.

        Args:
            shape: of the states of a token: layers without the last one, and hidden size.

        Raises:
            OSError: there is no space.
        """
        with _new_file(self._path, (int(self._starts[-1]), *shape)) as self._states:
            yield

    def write(self, row: int, values: NDArray[np.float32]) -> None:
        """Write the states of a row, if the file holds it.

        Args:
            row: its number.
            values: `[tokens, layers - 1, hidden]`; what follows the tokens of the row is padding.
        """
        place = self._places.get(row)
        if place is not None:
            start = self._starts[place]
            stop = self._starts[place + 1]
            self._states[start:stop] = values[: stop - start]

    def flush(self) -> None:
        """Have all that was written in the file."""
        self._states.flush()

    def read(self) -> States:
        """The states; changes of them stay in memory."""
        return States(self._rows, self._starts, np.load(self._path, mmap_mode="c"))


def run_classifier(
    classifier: Classifier,
    rows: Sequence[EncodedRow],
    padding: Mapping[str, float],
    taught: Taught,
    folder: Path,
    progress: Progress,
) -> tuple[NDArray[np.float32], States]:
    """Run rows once, unless the folder has the results already.

    States fill at most 4 GiB. Where those of all tokens are more, long rows contribute tokens at
    even distances, but at least `fewest_tokens`; and where even that is too much, fewer units take
    part. Where only a few units would, rows contribute down to 32 tokens.

    Args:
        classifier: the classifier.
        rows: tokenized rows.
        padding: see `model_inputs`.
        taught: the rows whose states are kept.
        folder: where logits and states are kept; states may be larger than the memory.
        progress: called with (what, rows done, rows).

    Returns:
        The logits `[rows, labels]`, NaN for rows that were not run; and the states, which are
        mapped from a file.

    Raises:
        InputError: not even the states of one unit that trains and one other fit.
        OSError: there is no space for the states.
        ArtifactError: the logits cannot be written.
    """
    lengths = np.array([len(row) for row in rows])
    # Altered rows may be others than those of a run that was interrupted.
    tokens_of_all = np.concatenate([(row.input_ids, row.token_type_ids) for row in rows], axis=1)
    digest = hashlib.sha256(lengths.tobytes() + tokens_of_all.tobytes()).hexdigest()[:16]
    logits_file = folder / f"logits-{digest}.npy"
    units = np.arange(len(taught.rows)) if taught.units is None else taught.units
    most, kept = _fitting(
        lengths[taught.rows],
        units,
        taught.trained,
        most_tokens(classifier),
        taught.fewest_tokens,
    )
    numbers = taught.rows[kept]
    file = _StatesFile(folder / f"states-{digest}.npy", numbers, lengths[numbers].clip(max=most))
    if not logits_file.is_file():
        run = np.arange(len(rows))
        if taught.needed is not None:
            run = np.union1d(numbers, taught.needed)
        shape = (classifier.layers - 1, int(classifier.model.config.hidden_size))
        logits = np.full((len(rows), len(classifier.labels)), np.nan, np.float32)
        done = 0
        with file.new(shape):
            for part, outputs in _outputs(classifier, rows, padding, _batches(run, lengths), most):
                progress("run the classifier", done, len(run))
                done += len(part)
                logits[part] = outputs[:, : len(classifier.labels)]
                values = outputs[:, len(classifier.labels) :].reshape(len(part), -1, *shape)
                for number, of_row in zip(part.tolist(), values, strict=True):
                    file.write(number, of_row)
            file.flush()
            content = io.BytesIO()
            np.save(content, logits)
            write_whole(logits_file, content.getvalue())  # last: it says that both are complete
    return np.load(logits_file), file.read()


def _outputs(
    classifier: Classifier,
    rows: Sequence[EncodedRow],
    padding: Mapping[str, float],
    parts: Sequence[NDArray[np.intp]],
    most: int,
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Numbers of rows, part by part, with what `_WithStates` gives for them."""
    model = _WithStates(classifier, most)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def outputs_of(numbers: NDArray[np.intp]) -> NDArray[np.float32]:
        some = [rows[number] for number in numbers]
        return predict(model, some, padding, lambda each: each, batch=_BATCH)

    return zip(parts, _at_once(outputs_of, parts), strict=True)


def _batches(numbers: NDArray[np.intp], lengths: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Rows of similar length in batches, the longest first."""
    order = numbers[np.argsort(-lengths[numbers], kind="stable")]
    batches = []
    while len(order):
        size = max(1, min(_BATCH, _BATCH_TOKENS // lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def _at_once(
    run: Callable[[NDArray[np.intp]], NDArray[np.float32]], parts: Sequence[NDArray[np.intp]]
) -> Iterator[NDArray[np.float32]]:
    """What a function of PyTorch gives for parts, several of which run at once, in their order.

    The threads of a CPU are shared out among up to four workers. Beside other work, threads that
    share a part would wait for each other most of the time. Results of up to eight parts are kept.
    """
    threads = torch.get_num_threads()
    of_each = threads if torch.cuda.is_available() else -(-threads // _MOST_WORKERS)
    workers = threads // of_each
    try:
        with ThreadPoolExecutor(workers, "classify", torch.set_num_threads, (of_each,)) as pool:
            for start in range(0, len(parts), 2 * workers):
                yield from pool.map(run, parts[start : start + 2 * workers])
    finally:
        torch.set_num_threads(threads)  # a part of the setting is that of the whole process


def _fitting(
    lengths: NDArray[np.intp],
    units: NDArray[np.intp],
    trained: int,
    most_tokens: int,
    fewest: int,
) -> tuple[int, NDArray[np.intp]]:
    """How many tokens a row contributes at most, and which rows take part.

    Args:
        lengths: tokens of each row.
        units: the unit of each row.
        trained: how many rows train; the others are of other units.
        most_tokens: the most tokens of all rows together.
        fewest: tokens of a row whose tokens are not all kept, if enough units fit.

    Raises:
        InputError: not even one unit of each part fits.
    """
    both = [np.unique(units[:trained]), np.unique(units[trained:])]
    enough = min(1.0, _ENOUGH_UNITS / sum(map(len, both)))
    most = int(lengths.max())
    while most > min(fewest, _FEWEST_TOKENS):
        wanted = 1.0 if most > fewest else enough
        if wanted * lengths.clip(max=most).sum() <= most_tokens:
            break
        most -= 1
    tokens = lengths.clip(max=most)
    share = 1.0
    while True:
        counts = [min(len(part), max(1, int(share * len(part)))) for part in both]
        # At even distances.
        some = [
            part[np.arange(count) * len(part) // max(1, count)]
            for part, count in zip(both, counts, strict=True)
        ]
        kept = np.flatnonzero(np.isin(units, np.concatenate(some)))
        total = tokens[kept].sum()
        if total <= most_tokens:
            return most, kept
        if max(counts) == 1:
            raise InputError(
                f"the hidden states of two queries are more than {_MOST_BYTES / 2**30:.0f} GiB",
                "give fewer documents to each query, or a smaller `max_length`",
            )
        share *= min(0.99, most_tokens / total)


@contextmanager
def _new_file(path: Path, shape: tuple[int, ...]) -> Iterator[np.memmap[Any, np.dtype[np.float16]]]:
    """Numbers that are mapped from a new file, which is deleted if an error comes before the end.

    Its space is reserved first: the system ends a process for which there is no space when it
    writes to what it has mapped.

    Raises:
        OSError: there is not enough space.
    """
    try:
        values = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        with path.open("rb+") as file:
            reserve(file, path.stat().st_size)
        yield values
    except BaseException:
        with suppress(OSError):  # Windows keeps a file that is mapped
            path.unlink()
        raise
