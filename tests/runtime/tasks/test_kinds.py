"""Every room has a row for every kind of model in its table."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import fpabee
from fpabee.calibration.scoring import METRICS
from fpabee.runtime import InputError, ProblemType
from fpabee.runtime.tasks import row_of
from fpabee.runtime.tasks.classification import Classification
from fpabee.runtime.tasks.kinds import CLASSIFICATION, KINDS

SOURCES = Path(fpabee.__file__).parent
# The code of every module, by its path.
TREES = {
    f"{room}/{path.relative_to(SOURCES / room).as_posix()}": ast.parse(path.read_text("utf-8"))
    for room in ("runtime", "exporter", "calibration", "commands")
    for path in sorted((SOURCES / room).rglob("*.py"))
}
METHODS = {kind.method for kind in KINDS.values()}


def is_by_kind(node: ast.AST) -> bool:
    """Whether code is a table by the type of the task, or by the method of `Engine` that asks."""
    if not isinstance(node, ast.Dict):
        return False
    keys = [ast.unparse(key) for key in node.keys if key]
    return any(key.startswith("ProblemType.") or key.strip("'") in METHODS for key in keys)


TABLES = [
    f"{path.removesuffix('.py').replace('/', '.')}.{ast.unparse(target)}"
    for path, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and is_by_kind(node.value)
    for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
]
# The kinds that have no row in a table, and why.
WITHOUT = {
    "runtime.files.records.SCHEMAS": {ProblemType.RANKING: "its job makes the record of a query"},
    "calibration.scoring.METRICS": {ProblemType.RANKING: "only fpabee-convert certifies rerankers"},
    "exporter.training.trainer._LABELS": {ProblemType.RANKING: "rerankers are trained elsewhere"},
    "exporter.training.options.FEWEST_LABELS": {ProblemType.RANKING: "as for the losses"},
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_have_every_kind(table: str) -> None:
    module, _, name = table.rpartition(".")
    keys = getattr(import_module(f"fpabee.{module}"), name).keys()
    every = METHODS if keys & METHODS else {*ProblemType}
    assert keys == every - WITHOUT.get(table, {}).keys()


def test_the_search_finds_the_tables() -> None:
    assert len(TABLES) == 16
    assert WITHOUT.keys() <= {*TABLES}
    assert {"runtime.tasks.kinds.KINDS", "runtime.files.jobs.JOBS"} <= {*TABLES}


def test_a_kind_without_a_row_is_refused() -> None:
    assert row_of(METRICS, ProblemType.MULTI_LABEL, "calibrated")[0] == "exact_match"
    with pytest.raises(InputError, match="rerankers cannot be calibrated -> give a model for s"):
        row_of(METRICS, ProblemType.RANKING, "calibrated")


def test_classification_is_what_gives_labels() -> None:
    labelling = {kind for kind, task in KINDS.items() if issubclass(task, Classification)}
    assert {*CLASSIFICATION} == labelling


# The rooms that know the kinds of models: what logits mean, the manifest, and what a checkpoint
# says of itself.
KNOW = ("runtime/tasks/", "runtime/artifact/")
OF_CHECKPOINTS = ("early", "exit_config", "convert/classifier")


def asks_the_kind(node: ast.AST) -> bool:
    """Whether code compares a type of task, reads `ranks`, or asks for the rule of rankings."""
    words = ast.unparse(node)
    if isinstance(node, ast.Compare):
        return "ProblemType." in words
    if isinstance(node, ast.Call):
        return words.startswith("isinstance(") and "TopK" in words
    return isinstance(node, ast.Attribute) and node.attr == "ranks"


def test_only_rooms_that_know_the_kinds_ask_for_them() -> None:
    asking = {
        path for path, tree in TREES.items() for node in ast.walk(tree) if asks_the_kind(node)
    }
    checkpoints = {f"exporter/{name}.py" for name in OF_CHECKPOINTS}
    assert {path for path in asking if not path.startswith(KNOW)} <= checkpoints
    assert "runtime/tasks/ranking.py" in asking, "the search finds what it looks for"
