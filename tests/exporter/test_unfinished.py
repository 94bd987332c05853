"""Finished steps stay unless an error says what to change."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fpabee.exporter.unfinished import unfinished
from fpabee.runtime.errors import ArtifactError, BackendError, CheckError, InputError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finish_a_step_and_fail(target: Path, error: Exception) -> None:
    with unfinished(target, "conversion", "0" * 64) as steps:
        (steps / "logits").touch()
        raise error


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (ZeroDivisionError(), True),
        (CheckError("the export differs"), True),
        (BackendError("the device failed"), True),
        (FULL, True),
        (InputError("too few texts"), False),
        (ArtifactError("the folder has appeared"), False),
    ],
)
def test_what_is_not_a_mistake_of_the_user_keeps_finished_steps(
    error: Exception, is_kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raised = ArtifactError if error is FULL else type(error)
    with pytest.raises(raised) as caught:
        finish_a_step_and_fail(tmp_path / "engines", error)
    assert len([*tmp_path.rglob("logits")]) == is_kept
    said = f"{caught.value} {caplog.text}"
    assert ("engines.partial keeps the finished steps" in said) == is_kept
    assert [*tmp_path.iterdir()] == [tmp_path / "engines.partial"] * is_kept


def test_nothing_is_said_of_steps_that_are_not_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        unfinished(tmp_path / "engines", "conversion", "0" * 64),
    ):
        raise ZeroDivisionError
    assert caplog.text == ""
    assert [*tmp_path.iterdir()] == []
