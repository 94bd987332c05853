"""Every room has a row for every kind of model in its table."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fpabee.exporter.single_file.kinds import KINDS as IN_ONE_FILE
from fpabee.exporter.training import trainer
from fpabee.exporter.training.options import FEWEST_LABELS
from fpabee.runtime.serving import server
from fpabee.runtime.tasks.kinds import _KINDS

METHODS = {kind.method for kind in _KINDS.values()}
WITH_LABELS = {problem_type for problem_type, kind in _KINDS.items() if kind.method == "predict"}


@pytest.mark.parametrize("table", [server._FORMATS, IN_ONE_FILE], ids=["serving", "single file"])
def test_tables_by_method_have_every_kind(table: Mapping[str, object]) -> None:
    assert table.keys() == METHODS


@pytest.mark.parametrize("table", [trainer._LABELS, FEWEST_LABELS], ids=["loss", "fewest labels"])
def test_tables_of_training_have_every_kind_with_labels(table: Mapping[object, object]) -> None:
    assert table.keys() == WITH_LABELS
