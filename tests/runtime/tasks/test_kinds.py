"""Every room has a row for every kind of model in its table."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

import fpabee
from fpabee.exporter.single_file.kinds import KINDS as IN_ONE_FILE
from fpabee.exporter.single_file.rules import OUTPUTS
from fpabee.exporter.training import trainer
from fpabee.exporter.training.options import FEWEST_LABELS
from fpabee.runtime.serving import server
from fpabee.runtime.tasks.kinds import KINDS

METHODS = {kind.method for kind in KINDS.values()}
WITH_LABELS = {problem_type for problem_type, kind in KINDS.items() if kind.method == "predict"}


@pytest.mark.parametrize("table", [server._FORMATS, IN_ONE_FILE], ids=["serving", "single file"])
def test_tables_by_method_have_every_kind(table: Mapping[str, object]) -> None:
    assert table.keys() == METHODS


@pytest.mark.parametrize("table", [trainer._LABELS, FEWEST_LABELS], ids=["loss", "fewest labels"])
def test_tables_of_training_have_every_kind_with_labels(table: Mapping[object, object]) -> None:
    assert table.keys() == WITH_LABELS


def test_outputs_in_a_graph_have_every_kind() -> None:
    assert OUTPUTS.keys() == KINDS.keys()


# The rooms that know the kinds of models: what logits mean, the manifest, and what a checkpoint
# says of itself.
KNOW = ("runtime/tasks/", "runtime/artifact/")
OF_CHECKPOINTS = ("checkpoint", "early", "exit_config", "convert/classifier")
SOURCES = Path(fpabee.__file__).parent


def asks_the_kind(node: ast.AST) -> bool:
    """Whether code compares a type of task, reads `ranks`, or asks for the rule of rankings."""
    words = ast.unparse(node)
    if isinstance(node, ast.Compare):
        return "ProblemType." in words
    if isinstance(node, ast.Call):
        return words.startswith("isinstance(") and "TopK" in words
    return isinstance(node, ast.Attribute) and node.attr == "ranks"


def test_only_rooms_that_know_the_kinds_ask_for_them() -> None:
    paths = [
        path.relative_to(SOURCES).as_posix()
        for room in ("runtime", "exporter", "calibration", "commands")
        for path in sorted(SOURCES.joinpath(room).resolve().rglob("*.py"))
        for path in [SOURCES / room / path.relative_to(SOURCES.joinpath(room).resolve())]
    ]
    asking = {
        path
        for path in paths
        for node in ast.walk(ast.parse((SOURCES / path).read_text(encoding="utf-8")))
        if asks_the_kind(node)
    }
    checkpoints = {f"exporter/{name}.py" for name in OF_CHECKPOINTS}
    assert {path for path in asking if not path.startswith(KNOW)} <= checkpoints
    assert "runtime/tasks/ranking.py" in asking, "the search finds what it looks for"
