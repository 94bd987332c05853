"""The tables by kind of model have an entry for each kind."""

from __future__ import annotations

from fpabee.commands import run
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.files.jobs import JOBS
from fpabee.runtime.files.records import SCHEMAS
from fpabee.runtime.tasks import unnamed_task

METHODS = {kind: unnamed_task(kind, 1).method for kind in ProblemType}


def test_every_kind_of_model_has_a_job() -> None:
    assert JOBS.keys() == run._KINDS.keys() == set(METHODS.values())


def test_every_kind_of_classifier_has_a_schema() -> None:
    assert SCHEMAS.keys() == {kind for kind, method in METHODS.items() if method == "predict"}
