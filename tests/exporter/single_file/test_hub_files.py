"""The model card says what was promised and measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub import ModelCard

from fpabee.exporter.single_file import pack
from fpabee.runtime import Certificate, Confidence, Promise, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import with_operating_points

from ...runtime.running import line_with
from .test_packing import FP32

CERTIFICATE = Certificate(
    confidence=95.0,
    promises=(
        Promise(of="changed_answers", at_most=1.0, rows=1199),
        Promise(of="missed", at_most=2.0, label="music", rows=150),
    ),
)


@pytest.fixture
def folder(engine_copy: Callable[..., Path], set_points: Callable[..., None]) -> Path:
    """An engines folder as a conversion leaves it, with figures that are made up."""
    folder = engine_copy(exit_0=True)
    set_points(folder, FP32, changed_answers=Confidence(threshold=0.6, exit_0_threshold=0.9))
    manifest = read_manifest(folder)
    target = manifest.targets[FP32]
    point = msgspec.structs.replace(
        target.operating_points["changed_answers"],
        metric="agreement",
        score=0.9966,
        mean_depth=1.25,
        measured_speedup={"1": 1.81, "32": 1.8},
        versions={"onnxruntime": "1.32.0", "fpabee": "1.0.0"},
        hardware="some processor, 2 threads",
        certificate=CERTIFICATE,
    )
    target = with_operating_points(target, {"changed_answers": point}, "changed_answers")
    EnginesFolder(folder, manifest).with_target(FP32, target).write()
    return folder


def test_the_card_says_what_was_promised_and_measured(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "packed")
    text = (tmp_path / "packed" / "README.md").read_text()
    card: Any = ModelCard(text)
    assert (card.data.library_name, card.data.tags) == ("onnx", ["early-exit", "fpabee", "onnx"])
    for facts in (
        ("1 % changed answers (tested on 1,199", "2 % missed of 'music' (tested on 150", "95 %"),
        ("agreement", "100 texts", "5-fold cross-fitting", "0.9966", "0.34%"),
        ("1.25 of 3",),
        ("1.81 for single texts", "1.80 for files"),
        ("some processor, 2 threads", "onnxruntime 1.32.0", "fpabee 1.0.0"),
    ):
        assert line_with(text, *facts)
