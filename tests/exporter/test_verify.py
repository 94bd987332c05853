"""An export is compared with its model: graph by graph, and as a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from fpabee.exporter import segments
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.verify import (
    BUILT_IN_TEXTS,
    check_chain,
    check_graphs,
    reference_logits,
)
from fpabee.runtime import FPabee, ProblemType, Text
from fpabee.runtime.agreement import Logits
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Task
from fpabee.runtime.encoding import TextEncoder
from fpabee.runtime.engine import Engine
from fpabee.runtime.errors import VerificationError

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_an_export_agrees_with_its_model(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    model = load_checkpoint(tiny_models[family])
    manifest = read_manifest(engines[family])
    rows = TextEncoder(engines[family], manifest.tokenizer).encode(BUILT_IN_TEXTS)
    cut = segments.cut(model, (1, 2, 3))
    worst = check_graphs(model, cut, manifest, engines[family], rows)
    assert list(worst) == list(manifest.graphs)
    assert max(worst.values()) < TOLERANCE
    with Engine.load(engines[family]) as engine:
        expected = reference_logits(model, rows)
        agreement = check_chain(engine, BUILT_IN_TEXTS, expected, worst)
    assert agreement.rows == len(BUILT_IN_TEXTS)
    assert agreement.max_logit_difference < 1e-5
    assert agreement.graphs == worst


@pytest.mark.parametrize("amount", [1e-2, np.nan])
@pytest.mark.parametrize(
    ("family", "first", "second"),
    [("bert", "segment_02", "segment_03"), ("albert", "block_01", "head_02")],
)
def test_the_first_bad_graph_is_named(
    family: str,
    first: str,
    second: str,
    amount: float,
    engine_copy: Callable[..., Path],
    tiny_models: Mapping[str, Path],
) -> None:
    folder = engine_copy(family)
    manifest = read_manifest(folder)
    for name in (first, second):
        spoil(folder / manifest.graphs[name].file, amount)
    model = load_checkpoint(tiny_models[family])
    rows = TextEncoder(folder, manifest.tokenizer).encode(BUILT_IN_TEXTS)
    with pytest.raises(VerificationError, match=f"^{first} differs from its PyTorch module"):
        check_graphs(model, segments.cut(model, (1, 2, 3)), manifest, folder, rows)


def spoil(path: Path, amount: float) -> None:
    """Shift what a graph gives: the logits of one with a head, or ALBERT's hidden states."""
    proto = onnx.load(path)
    ends = ("classifier.bias", "full_layer_layer_norm.bias")
    (weight,) = [weight for weight in proto.graph.initializer if weight.name.endswith(ends)]
    values = onnx.numpy_helper.to_array(weight) + np.float32(amount)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, path)


@dataclass
class FakeEngine:
    """Returns prepared logits: for all texts together, and for one text alone."""

    together: Logits
    alone: Logits
    rule: FPabee = field(default_factory=lambda: FPabee(threshold=0.1))

    @property
    def manifest(self) -> Any:
        task = Task(problem_type=ProblemType.SINGLE_LABEL, labels=("a", "b", "c"))
        return SimpleNamespace(task=task)

    def trace(self, texts: Sequence[Text]) -> Any:
        if len(texts) > 1:
            return SimpleNamespace(logits=self.together)
        row = int(str(texts[0]))
        return SimpleNamespace(logits=self.alone[:, row : row + 1])


@pytest.mark.parametrize("amount", [1e-3, np.nan, np.inf])
@pytest.mark.parametrize("exit_number", [1, 2, 3])
@pytest.mark.parametrize("is_alone", [False, True])
def test_the_chain_must_agree_for_texts_together_and_alone(
    is_alone: bool, exit_number: int, amount: float
) -> None:
    expected = np.random.default_rng(0).normal(0, 3, (3, 4, 3)).astype(np.float32)
    found = expected.copy()
    found[exit_number - 1, 1, 2] += amount
    engine = FakeEngine(expected if is_alone else found, found if is_alone else expected)
    with pytest.raises(VerificationError, match=f"from exit {exit_number} on"):
        check_chain(cast(Engine, engine), ["0", "1", "2", "3"], expected, {})


def test_the_larger_of_the_two_differences_is_recorded() -> None:
    expected = np.random.default_rng(0).normal(0, 3, (3, 4, 3)).astype(np.float32)
    engine = FakeEngine(expected, expected + np.float32(5e-5))
    agreement = check_chain(cast(Engine, engine), ["0", "1", "2", "3"], expected, {})
    assert agreement.max_logit_difference == pytest.approx(5e-5, rel=0.02)


def test_built_in_texts_hold_the_difficult_ones() -> None:
    texts = [text for text in BUILT_IN_TEXTS if isinstance(text, str)]
    pairs = [text for text in BUILT_IN_TEXTS if isinstance(text, tuple)]
    assert "" in texts
    assert any(not text.isascii() for text in texts)
    assert max(len(text) for text in texts) > 1000
    assert {(bool(first), bool(second)) for first, second in pairs} == {
        (True, True),
        (True, False),
        (False, True),
    }
