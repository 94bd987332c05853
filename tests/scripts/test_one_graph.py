"""One graph of the whole model gives the logits of the last exit of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from one_graph import write_one_graph

from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text

from ..closeness import assert_close

TEXTS: list[Text] = ["turn on the light", "", "book a table " * 5, ("a", "the plot")]


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_one_graph_gives_the_logits_of_the_last_exit(
    engines: Mapping[str, Path], tmp_path: Path, family: str
) -> None:
    source = engines[family]
    old = read_manifest(source)
    manifest = write_one_graph(source, tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.exit_layers == old.exit_layers[-1:]
    with Engine.load(source) as before, Engine.load(tmp_path) as after:
        expected = before.trace(TEXTS).logits[-1:]
        found = after.trace(TEXTS).logits
    assert_close(found, expected)
    stored, logits = read_reference(EnginesFolder(tmp_path, manifest))
    texts, expected = read_reference(EnginesFolder(source, old))
    assert stored == texts
    np.testing.assert_array_equal(logits, expected[-1:])
