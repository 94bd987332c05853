"""`Engine.check`: a target that is not the exported model is refused, even if its hash matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fpabee.runtime import ArtifactError, CheckError, Engine
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import REFERENCE_NAME
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.backends.base import Execution
from fpabee.runtime.backends.buffers import Bucket
from fpabee.runtime.check import requirements_of
from fpabee.runtime.encoding import EncodedRow

from ..bad_input.cases import corrected, manifest
from ..doubles.calls import before


def test_the_engines_max_length_does_not_matter(engines: Mapping[str, Path]) -> None:
    with Engine.load(engines["bert"], threads=1, check=True, max_length=4) as engine:
        assert engine.predict(["the film is not bad"])[0].truncated


def test_the_reference_has_batches_with_padding(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a head that attends to padding would pass."""
    padding = []

    def count(_: Execution, encoded: Sequence[EncodedRow], bucket: Bucket) -> None:
        padding.append(sum(bucket.sequence - len(row) for row in encoded))

    before(monkeypatch, Execution, "begin", count)
    Engine.load(engines["bert"], threads=1, check=True).close()
    assert sum(padding) > 10


def swap_logits(folder: Path, logits: np.ndarray[Any, Any]) -> None:
    texts, _ = read_reference(EnginesFolder.read(folder))
    corrected(REFERENCE_NAME, lambda _: write_reference(folder, texts, logits))(folder)


@pytest.mark.parametrize("how", [lambda z: z + 2e-3, lambda z: -z])
def test_other_logits_are_refused(
    engine_copy: Callable[..., Path], how: Callable[[Any], Any]
) -> None:
    folder = engine_copy()
    _, logits = read_reference(EnginesFolder.read(folder))
    swap_logits(folder, how(logits).astype(np.float32))
    with pytest.raises(CheckError, match="not the model that was exported"):
        Engine.load(folder, threads=1, check=True)
    Engine.load(folder, threads=1).close()
    swap_logits(folder, logits + np.float32(5e-4))
    Engine.load(folder, threads=1, check=True).close()  # the rounding of another machine


def test_another_machine_may_differ_ten_times_as_much(engines: Mapping[str, Path]) -> None:
    usual = EnginesFolder.read(engines["bert"])
    target = msgspec.structs.replace(usual.manifest.targets["onnxruntime-fp32"], tolerance=2e-3)
    changed = usual.with_target("onnxruntime-fp32", target)
    assert requirements_of("onnxruntime-fp32", changed.manifest).logits == 0.02


def test_a_damaged_reference_is_refused(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    some = np.zeros((3, 2, 4), np.float32)
    text = np.frombuffer(b'["a"]', np.uint8)
    many = np.zeros((3, 10**6, 4), np.float32)
    archives: list[tuple[dict[str, Any], str]] = [
        ({"logits": some}, "cannot be read"),
        ({"texts": some, "logits": some}, "cannot be read"),
        ({"texts": np.array([{}], object), "logits": some}, "cannot be read"),
        ({"texts": text, "logits": some}, r"\[3, 2, 4\]; expected float32 of shape \[3, 1, 4\]"),
        ({"texts": text, "logits": many}, r"cannot be read: it unpacks to \d+ bytes"),
        ({"texts": text, "logits": some[:, :1].astype(np.float64)}, "float64 logits"),
        ({"texts": text, "logits": some[:, :1] * np.float32("nan")}, "NaN"),
    ]
    for content, says in archives:
        save = np.savez_compressed if content["logits"] is many else np.savez
        corrected(REFERENCE_NAME, partial(save, **content))(folder)
        with pytest.raises(ArtifactError, match=says):
            read_reference(EnginesFolder.read(folder))
    corrected(REFERENCE_NAME, lambda at: at.write_bytes(at.read_bytes()[:-9]))(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_reference(EnginesFolder.read(folder))


def test_a_folder_without_a_reference_is_refused(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    manifest(lambda content: content["files"].pop(REFERENCE_NAME))(folder)
    with pytest.raises(ArtifactError, match=r"has no reference\.npz to check it with"):
        Engine.load(folder, threads=1, check=True)
