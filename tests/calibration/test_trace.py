"""A kept trace is used while it fits, and one that is damaged or harmful is made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.trace import trace_rows
from fpabee.runtime import Engine
from fpabee.runtime.text_io import Row

ROWS = [Row(text, None, ("music",)) for text in ("rain", "the film", "turn on the light")]


@pytest.fixture(scope="module")
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


def changed(**arrays: Callable[[Any], Any]) -> Callable[[Path], object]:
    """A trace with other arrays, as the one that is there has its keys."""

    def change(path: Path) -> None:
        with np.load(path) as content:
            kept = dict(content)
        np.savez(path, **kept | {name: make(kept[name]) for name, make in arrays.items()})

    return change


def as_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def bomb(path: Path) -> None:
    with np.load(path) as content:
        kept = dict(content)
    kept["logits"] = np.zeros((3, 3, 10**6), np.float32)
    np.savez_compressed(path, **kept)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no archive": lambda path: path.write_bytes(b"damaged"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "an array": as_array,
    "a bomb": bomb,
    "fewer rows": changed(logits=lambda logits: logits[:, :2]),
    "no exits": changed(logits=lambda logits: logits[0]),
    "NaN": changed(logits=lambda logits: logits * np.float32("nan")),
    "words": changed(logits=lambda logits: logits.astype(str)),
    "another shape": changed(lengths=lambda lengths: lengths[:, None]),
    "a pickle": changed(lengths=lambda lengths: lengths.astype(object)),
    "deep JSON": changed(rows=lambda rows: np.frombuffer(b"[" * 10**5, np.uint8)),
    "other rows": changed(rows=lambda rows: np.frombuffer(b'[["rain", 1, []]]', np.uint8)),
    "another artifact": changed(artifact=lambda artifact: "another"),
    "other texts": changed(texts=lambda texts: "others"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_trace_that_does_not_fit_is_made_anew(
    engine: Engine, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    expected = trace_rows(engine, ROWS, tmp_path).logits
    (path,) = tmp_path.iterdir()
    damage(path)
    found = trace_rows(engine, ROWS, tmp_path)
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    with np.load(path, allow_pickle=False) as content:
        np.testing.assert_array_equal(content["logits"], found.logits)


def test_a_trace_that_fits_is_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trace_rows(engine, ROWS, tmp_path)
    monkeypatch.delattr(Engine, "trace")
    again = trace_rows(engine, ROWS, tmp_path)
    np.testing.assert_array_equal(again.logits, first.logits)
    np.testing.assert_array_equal(again.lengths, first.lengths)
