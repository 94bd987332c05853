"""A kept trace is used while it fits; a damaged or harmful one is replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.trace import trace_rows
from fpabee.runtime import Engine, ExitRule, Trace
from fpabee.runtime.encoding import Text
from fpabee.runtime.files import Row

from ..closeness import assert_close

ROWS = [Row(text, None, ("music",)) for text in ("rain", "the film", "turn on the light")]


@pytest.fixture(scope="module")
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


def changed(**arrays: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Changes some arrays of a trace."""

    def change(path: Path) -> None:
        with np.load(path) as content:
            kept = dict(content)
        np.savez(path, **kept | {name: make(kept[name]) for name, make in arrays.items()})

    return change


def bomb(path: Path) -> None:
    with np.load(path) as content:
        kept = dict(content)
    kept["logits"] = np.zeros((3, 3, 10**6), np.float32)
    np.savez_compressed(path, **kept)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "not an archive": lambda path: path.write_bytes(b"damaged"),
    "a bomb": bomb,
    "fewer exits": changed(logits=lambda logits: logits[:2]),
    "nine labels": changed(logits=lambda logits: logits[..., [0, 1, 2, 3, 3, 2, 1, 0, 0]]),
    "lengths of 0": changed(lengths=lambda lengths: 0 * lengths),
    "lengths that no row can have": changed(lengths=lambda lengths: lengths + 1_000_000),
    "NaN": changed(logits=lambda logits: logits * np.float32("nan")),
    "words": changed(logits=lambda logits: logits.astype(str)),
    "a pickle": changed(lengths=lambda lengths: lengths.astype(object)),
    "of other logits": changed(logits=np.negative),
    "of logits that differ by less": changed(logits=lambda logits: logits + np.float32(0.01)),
    "of other lengths": changed(lengths=lambda lengths: lengths + 1),
    "another artifact": changed(artifact=lambda artifact: "another", logits=np.negative),
    "a pipe": pipe,
    "other texts": changed(texts=lambda texts: "others", logits=np.negative),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_trace_that_does_not_fit_is_made_anew(
    engine: Engine, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    expected = trace_rows(engine, ROWS, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    found = trace_rows(engine, ROWS, tmp_path)
    assert_close(found.logits, expected.logits)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    with np.load(path, allow_pickle=False) as content:
        np.testing.assert_array_equal(content["logits"], found.logits)


def test_a_trace_that_fits_is_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Row(f"{row.text} {number}", None, row.labels) for number in range(20) for row in ROWS]
    first = trace_rows(engine, many, tmp_path)
    ran: list[Text] = []
    trace = Engine.trace

    def noting(self: Engine, texts: Sequence[Text], rule: ExitRule) -> Trace:
        ran.extend(texts)
        return trace(self, texts, rule=rule)

    monkeypatch.setattr(Engine, "trace", noting)
    again = trace_rows(engine, many, tmp_path)
    assert len({*ran}) == len(ran) == 16, "some of its rows run again"
    np.testing.assert_array_equal(again.logits, first.logits)
    np.testing.assert_array_equal(again.lengths, first.lengths)


def test_a_link_in_the_place_of_a_trace_is_replaced_and_not_followed(
    engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "calibration"
    trace_rows(engine, ROWS, folder)
    (path,) = folder.iterdir()
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    path.unlink()
    path.symlink_to(mine)
    trace_rows(engine, ROWS, folder)
    assert mine.read_bytes() == b"mine"
    assert [(file, file.is_symlink()) for file in folder.iterdir()] == [(path, False)]
