"""One run of the classifier over all texts: its logits, and what a head could read at each layer.

The states of a layer are the input of the next one, so nothing is computed twice, and the logits
are those of the classifier itself.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...calibration.progress import Progress
from ...runtime.artifact.folder import write_whole
from ...runtime.encoding import EncodedRow
from ..backbones.base import attention_bias
from ..model import predict, token_weights
from .classifier import Classifier

_BLOCK = 512  # rows whose states are in memory at once


class _WithStates(nn.Module):
    """A classifier that also gives the pooled states of every layer but the last.

    Args:
        classifier: the classifier.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model
        self._norm = classifier.backbone.norm() or nn.Identity()
        # ALBERT gives the states of every layer of a group, which counts as one layer here.
        self._step = getattr(self.model.config, "inner_group_num", 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """`[rows, labels + values]`: the logits, then the states `[layers - 1, 2, hidden]`."""
        output = self.model(**inputs, output_hidden_states=True)
        weights = token_weights(attention_bias(inputs["attention_mask"]))
        # The first states are the embeddings.
        states = map(self._norm, output.hidden_states[self._step : -1 : self._step])
        pooled = [
            part for hidden in states for part in ((weights @ hidden).squeeze(1), hidden[:, 0])
        ]
        return torch.cat([output.logits, *pooled], dim=1)


def run_classifier(
    classifier: Classifier,
    rows: Sequence[EncodedRow],
    padding: Mapping[str, float],
    taught: NDArray[np.intp],
    folder: Path,
    progress: Progress,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run all rows once, unless the folder has the results already.

    Args:
        classifier: the classifier.
        rows: tokenized rows.
        padding: see `model_inputs`.
        taught: numbers of the rows whose states are kept.
        folder: where logits and states are kept; states may be larger than the memory.
        progress: called with (what, rows done, rows).

    Returns:
        The logits `[rows, labels]`, and the states `[taught, layers - 1, 2, hidden]`, in which the
        mean over tokens comes before the first token; the latter are mapped from a file.

    Raises:
        OSError: there is no space for the states.
        ArtifactError: the logits cannot be written.
    """
    logits_file = folder / "logits.npy"
    states_file = folder / "states.npy"
    if not logits_file.is_file():
        model = _WithStates(classifier)
        labels = len(classifier.labels)
        hidden = int(classifier.model.config.hidden_size)
        shape = (len(taught), classifier.layers - 1, 2, hidden)
        logits = np.empty((len(rows), labels), np.float32)
        place = np.full(len(rows), -1)
        place[taught] = np.arange(len(taught))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        # Rows of similar length are in one block.
        order = np.argsort([len(row) for row in rows], kind="stable")
        with _new_file(states_file, shape) as states:
            for start in range(0, len(rows), _BLOCK):
                progress("classify the texts", start, len(rows))
                numbers = order[start : start + _BLOCK]
                some = [rows[number] for number in numbers]
                # In small batches, because long texts need much memory.
                outputs = predict(model, some, padding, lambda each: each, batch=32)
                logits[numbers] = outputs[:, :labels]
                kept = place[numbers] >= 0
                states[place[numbers[kept]]] = outputs[kept, labels:].reshape(-1, *shape[1:])
            states.flush()
            content = io.BytesIO()
            np.save(content, logits)
            write_whole(logits_file, content.getvalue())  # last: it says that both are complete
    return np.load(logits_file), np.load(states_file, mmap_mode="c")


@contextmanager
def _new_file(path: Path, shape: tuple[int, ...]) -> Iterator[np.memmap[Any, np.dtype[np.float32]]]:
    """Numbers that are mapped from a new file, which is deleted if an error comes before the end.

    Its space is reserved first: the system ends a process for which there is no space when it
    writes to what it has mapped.

    Raises:
        OSError: there is not enough space.
    """
    try:
        values = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        elif values.nbytes > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        yield values
    except BaseException:
        with suppress(OSError):  # Windows keeps a file that is mapped
            path.unlink()
        raise
