"""Times are measured once for the same files, machine and threads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.calibration import costs
from fpabee.calibration.costs import TimedEngine
from fpabee.runtime import Budget, Engine, Entropy

LENGTHS = np.array([3, 9], np.intp)


def change(**fields: Any) -> Any:
    """Overwrites fields of the stored file."""

    def write(path: Path, patch: pytest.MonkeyPatch) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


@pytest.mark.parametrize(
    ("settings", "between", "again"),
    [
        ({}, lambda path, patch: None, False),
        ({"again": True}, lambda path, patch: None, True),
        ({"threads": 2}, lambda path, patch: None, True),
        ({"thresholds": (0.3, 0.5)}, lambda path, patch: None, True),
        ({}, lambda path, patch: patch.setattr(costs, "artifact_sha256", lambda *_: "other"), True),
        (
            {},
            lambda path, patch: patch.setattr(costs, "environment", lambda: {"cpu": "another"}),
            True,
        ),
        ({}, lambda path, patch: path.write_bytes(b"\xff{"), True),
        ({}, lambda path, patch: path.write_text("[" * 100_000), True),
        ({}, lambda path, patch: path.write_text("{}" + " " * 2**21), True),
        ({}, lambda path, patch: path.unlink(), True),
        ({}, change(models={"1": {"batch": 1, "lengths": [], "seconds": []}}), True),
        ({}, change(models={"1": {"batch": 1, "lengths": [9], "seconds": [[1], [-1], [1]]}}), True),
        ({}, change(speedups={"1": {json.dumps(Entropy(threshold=0.1).to_dict()): 0}}), True),
    ],
)
def test_stored_times_are_used_where_they_fit(
    settings: dict[str, Any],
    between: Any,
    again: bool,
    engines: Mapping[str, Path],
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "times.json"
    given: dict[str, Any] = {"threads": 1, "again": False, "thresholds": ()}
    with Engine.load(engines["bert"], threads=1) as engine:
        found = []
        for options in (given, given | settings):
            measured.clear()
            timed = TimedEngine(engine, path, **options)
            assert timed.speedup([], Budget(exit=3), 1) == 1.0
            found += [timed.costs(LENGTHS, 1), timed.speedup([], Entropy(threshold=0.1), 1)]
            timed.store()
            if options is given:
                assert len(measured) == 2
                between(path, monkeypatch)
    assert bool(measured) is again
    assert found[:2] == found[2:]
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"]
