"""What runs a packed graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fpabee.runtime.backends.onnxruntime import session_options
from fpabee.runtime.encoding import Text

Answers = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass
class Consumer:
    """A program that knows the packed folder only: it tokenizes with what is in it."""

    folder: Path

    def __post_init__(self) -> None:
        load: Any = AutoTokenizer.from_pretrained
        self.tokenizer = load(self.folder)
        self.model = next(self.folder.rglob("model*.onnx"))
        self.session = onnxruntime.InferenceSession(str(self.model), session_options())

    def inputs(self, texts: Sequence[Text]) -> dict[str, NDArray[np.int64]]:
        """The inputs of a batch, padded to its longest text."""
        first = [text[0] if isinstance(text, tuple) else text for text in texts]
        second = [text[1] for text in texts if isinstance(text, tuple)] or None
        found = self.tokenizer(first, second, padding=True, truncation=True, return_tensors="np")
        names = [each.name for each in self.session.get_inputs()]
        assert set(names) == {*found}
        return {name: found[name].astype(np.int64) for name in names}

    def onnxruntime(self, texts: Sequence[Text]) -> Answers:
        logits, exits = self.session.run(["logits", "exit"], self.inputs(texts))
        return logits, exits

    def openvino(self) -> Callable[[Sequence[Text]], Answers]:
        """What runs a batch in OpenVINO."""
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(self.model, "CPU", settings)

        def run(texts: Sequence[Text]) -> Answers:
            found = compiled(self.inputs(texts))
            return found["logits"], found["exit"]

        return run


def in_batches(
    run: Callable[[Sequence[Text]], Answers], texts: Sequence[Text], size: int
) -> Answers:
    """The answers to texts in batches of this size."""
    found = [run(texts[start : start + size]) for start in range(0, len(texts), size)]
    logits, exits = (np.concatenate(each) for each in zip(*found, strict=True))
    return logits, exits
