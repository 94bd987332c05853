"""Packed copies of tiny engines folders."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter.single_file import Packed, pack
from fpabee.exporter.targets import build_targets
from fpabee.runtime import (
    Confidence,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Pabee,
    Pcee,
)
from fpabee.runtime.encoding import Text

from ...conftest import WORDS
from ..conftest import require
from .consumer import Consumer

FP32 = "onnxruntime-fp32"
INT8 = "onnxruntime-int8"
RULES: dict[str, ExitRule] = {
    "bert": Confidence(threshold=(0.7, 0.6, 0.5), exit_0_threshold=0.9),
    "albert": FPabee(threshold=0.9, exit_0_threshold=0.9),
    "mpnet": Pabee(patience=1, exit_0_threshold=0.8),
    "camembert": FPabee(threshold=0.7, patience=2, exit_0_threshold=0.9),
    "deberta-v2": Pcee(threshold=0.6, patience=2, exit_0_threshold=0.9),
    "distilbert": Confidence(threshold=0.9, label_thresholds=(0.4, 1), exit_0_threshold=0.9),
    "electra": Epee(threshold=0.5, patience=1, exit_0_threshold=0.9),
    "modernbert": Energy(threshold=0.2, exit_0_threshold=0.5),
    "roberta": Entropy(threshold=0.3, min_exit=1),
    "xlm-roberta": Pabee(patience=2, exit_0_threshold=0.9),
}


def texts(count: int, pairs: bool) -> list[Text]:
    """Texts of no words up to more than any model takes, or pairs of them."""
    words = random.Random(3)
    found = [" ".join(words.choices(WORDS, k=n % 23)) for n in range(count)]
    found[5] = "rain " * 100
    if not pairs:
        return [*found]
    return [("", "the sun"), ("the sun", ""), ("", ""), *zip(found[3:], found[:2:-1], strict=True)]


SINGLE = texts(120, pairs=False)
PAIRS = texts(80, pairs=True)


@dataclass
class Made:
    """A packed folder.

    Attributes:
        engines: the engines folder that was packed.
        folder: the packed folder.
        packed: what `pack` says about it.
    """

    engines: Path
    folder: Path
    packed: Packed

    @property
    def consumer(self) -> Consumer:
        return Consumer(self.folder)

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")


PackCopy = Callable[..., Made]


@pytest.fixture
def pack_copy(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> PackCopy:
    """Packs a copy of the engines folder of a family, with one rule as the point `fast`."""

    def make(
        family: str = "bert",
        rule: ExitRule | None = None,
        target: str = FP32,
        **options: Any,
    ) -> Made:
        engines = tmp_path / "engines"
        if not engines.exists():
            engine_copy(family, exit_0=True)
            if target == INT8:
                add_int8(engines, monkeypatch)
        set_points(engines, target, "fast", fast=rule or RULES[family])
        folder = tmp_path / "packed"
        return Made(engines, folder, pack(engines, folder, target, "fast", **options))

    return make


def add_int8(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the int8 graphs for ONNX Runtime, and remove those in fp32, which nothing reads then."""
    pytest.importorskip("nncf")
    require(monkeypatch, 0.0)  # a tiny random model has no robust answers
    assert build_targets(folder, [INT8], SINGLE[7:107]).refused == {}
    shutil.rmtree(folder / "onnx")
