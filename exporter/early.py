"""The configuration of a model, read without PyTorch, which takes seconds to load.

Here, whatever is missing, odd or damaged passes: the model itself is checked later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from ..runtime.artifact.folder import BAD_JSON
from ..runtime.artifact.manifest import ProblemType, Task
from ..runtime.artifact.untrusted.tokenizer_content import check_file
from ..runtime.encoding import tokenizer_errors
from ..runtime.errors import ModelError
from ..runtime.tasks import task_of
from .exit_0_files import CONFIG_BLOCK
from .exit_config import check_layers
from .paths import CONFIG_NAME


class Config:
    """The part of config.json that is read.

    Args:
        folder: a folder with it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            content = (folder / CONFIG_NAME).read_bytes()
            self._content = msgspec.json.decode(content, type=dict[str, Any])
        except (OSError, *BAD_JSON):
            self._content = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels in any order; empty: not known."""
        names = self._content.get("id2label")
        return tuple(map(str, names.values())) if isinstance(names, dict) else ()

    @property
    def method(self) -> str:
        """The method of `Engine` that asks it, as far as is known: `predict` or `rank`."""
        kind = self._content.get("problem_type")
        ranks = len(self.labels) == 1 and kind in (None, ProblemType.RANKING.value)
        return "rank" if ranks else "predict"

    def check_labels(self, thresholds: Mapping[str, float]) -> None:
        """Refuse thresholds of labels that the model does not have.

        Raises:
            InputError: it does not have one of them.
        """
        if self.labels:
            task = Task(problem_type=ProblemType.MULTI_LABEL, labels=self.labels)
            task_of(task).decision_thresholds(thresholds)

    def check_layers(self, layers: Sequence[int] | None) -> None:
        """Refuse exits after layers that the encoder does not have.

        Raises:
            ModelError: they are not ascending layers of it.
        """
        count = self._number("num_hidden_layers", "n_layers")
        if layers is not None and count is not None:
            check_layers(layers, count)

    def check_exits(self, numbers: Sequence[int] | None) -> None:
        """Refuse exits that a model with exits does not have.

        Raises:
            ModelError: they are not ascending numbers of its exits.
        """
        block = self._content.get(CONFIG_BLOCK)
        exits = block.get("exits") if isinstance(block, dict) else None
        layers = self._number("num_hidden_layers", "n_layers")
        count = len(exits) if isinstance(exits, list) else layers
        if numbers is not None and count is not None:
            check_exits(numbers, count)

    def check_length(self, max_length: int | None) -> None:
        """Refuse a length that leaves no room for text, or that has no positions.

        Raises:
            ModelError: it is too small or too large.
        """
        if max_length is None:
            return
        positions = self._number("max_position_embeddings", "n_positions")
        if positions is not None and max_length > positions:
            raise ModelError(
                f"max_length {max_length} is impossible for this model, which has {positions} "
                "positions",
                "give a smaller `max_length`",
            )
        special = self._special_tokens()
        if special is not None and max_length <= special:
            raise ModelError(
                f"max_length {max_length} leaves no room for text beside {special} special tokens",
                f"give `max_length` of at least {special + 1}",
            )

    def _special_tokens(self) -> int | None:
        """How many special tokens a pair of texts gets."""
        path = self._folder / "tokenizer.json"
        try:
            with tokenizer_errors("the tokenizer", ModelError):
                content = path.read_bytes()
                check_file(content)
                tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except ModelError:
            return None
        return int(tokenizer.num_special_tokens_to_add(is_pair=True))

    def _number(self, *names: str) -> int | None:
        """The first of some settings that is a whole number."""
        values = [self._content.get(name) for name in names]
        return next((value for value in values if type(value) is int), None)


def check_exits(numbers: Sequence[int], count: int) -> None:
    """Refuse exits that a model does not have.

    Args:
        numbers: of the exits to keep.
        count: how many the model has.

    Raises:
        ModelError: they are not ascending numbers from 1 to `count`.
    """
    if list(numbers) != sorted(set(numbers)) or numbers[0] < 1 or numbers[-1] > count:
        raise ModelError(
            f"exits {','.join(map(str, numbers))} do not fit a model with {count} exits",
            f"give `exits` as ascending numbers between 1 and {count}",
        )
