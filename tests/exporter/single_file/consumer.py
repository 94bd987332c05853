"""What runs a packed graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fpabee.runtime.backends.onnxruntime import session_options
from fpabee.runtime.encoding import Text

Inputs = dict[str, NDArray[np.int64]]
Answers = tuple[NDArray[np.float32], NDArray[np.int64]]
Run = Callable[[Inputs], Answers]

_PADDING = 7


@dataclass
class Consumer:
    """A program that knows the packed folder only: it tokenizes with what is in it.

    Attributes:
        folder: the folder.
        settings: of the rule, which are inputs of the graph of a plan.
    """

    folder: Path
    settings: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        load: Any = AutoTokenizer.from_pretrained
        self.tokenizer = load(self.folder)
        self.model = next(self.folder.rglob("model*.onnx"))
        self.session = onnxruntime.InferenceSession(str(self.model), session_options())

    def inputs(self, texts: Sequence[Text], padding: int = 0) -> Inputs:
        """The inputs of a batch, padded on the right.

        Args:
            texts: the texts.
            padding: how many tokens longer than its longest text, up to the limit of the model.
        """
        first = [text[0] if isinstance(text, tuple) else text for text in texts]
        second = [text[1] for text in texts if isinstance(text, tuple)] or None
        encoded = self.tokenizer(first, second, padding=True, truncation=True, return_tensors="np")
        names = [each.name for each in self.session.get_inputs()]
        assert set(names) == {*encoded, *self.settings}
        most = self.tokenizer.model_max_length - encoded["input_ids"].shape[1]
        extra = [(0, 0), (0, min(padding, most))]
        # Any token may stand where the mask says that there is none.
        ids = {"input_ids": _PADDING}
        return {
            name: np.pad(encoded[name].astype(np.int64), extra, constant_values=ids.get(name, 0))
            for name in encoded
        } | self.settings

    def onnxruntime(self, inputs: Inputs) -> Answers:
        """The answers of ONNX Runtime to a batch."""
        logits, exits = self.session.run(["logits", "exit"], inputs)
        return logits, exits

    def openvino(self) -> Run:
        """What runs a batch in OpenVINO."""
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(self.model, "CPU", settings)

        def run(inputs: Inputs) -> Answers:
            results = compiled(inputs)
            return results["logits"], results["exit"]

        return run

    def in_batches(self, run: Run, texts: Sequence[Text], size: int, padding: int = 0) -> Answers:
        """The answers to texts in batches of this size, see `inputs`."""
        answers = [
            run(self.inputs(texts[start : start + size], padding))
            for start in range(0, len(texts), size)
        ]
        logits = np.concatenate([logits for logits, _ in answers])
        exits = np.concatenate([exits for _, exits in answers])
        return logits, exits
