"""Rate and remaining time."""

from __future__ import annotations

import pytest

from fpabee.runtime.cli import run_progress as progress_module
from fpabee.runtime.cli.run_progress import Meter, progress
from fpabee.runtime.files.summary import Summary


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: _Clock, share: float | None) -> Meter:
    return Meter(lambda: share, clock)


@pytest.mark.parametrize(
    ("share", "rows", "completed", "read", "seconds", "expected"),
    [
        (0.5, 100, 0, 100, 10, ("100 rows, 10 rows/s, 0:10 left", 0.5)),
        # Twice as much is read as is done.
        (0.5, 100, 0, 200, 10, ("100 rows, 10 rows/s, 0:30 left", 0.25)),
        # What an earlier run has done took no time.
        (0.5, 100, 50, 100, 10, ("100 rows, 5 rows/s, 0:20 left", 0.5)),
        (0.001, 1000, 0, 1000, 10, ("1000 rows, 100 rows/s, 2:46:30 left", 0.001)),
        (None, 100, 0, 100, 10, ("100 rows, 10 rows/s", None)),
        (1.0, 100, 0, 100, 10, ("100 rows, 10 rows/s, 0:00 left", 1.0)),
    ],
)
def test_meter(
    share: float | None,
    rows: int,
    completed: int,
    read: int,
    seconds: float,
    expected: tuple[str, float | None],
) -> None:
    clock = _Clock()
    found = meter(clock, share)
    clock.now += seconds
    assert found.state(rows, completed, read) == expected


def test_where_nobody_looks_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = object.__new__(Summary)
    summary.rows, summary.completed = 10, 0
    with progress(False, lambda: 0.5) as advance:
        advance(summary, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_module, "_LINE_SECONDS", 0.0)
    with progress(False, lambda: 0.5) as advance:
        advance(summary, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("10 rows, ")
    assert err.endswith(" left\n")
    with progress(True, lambda: 0.5) as advance:
        advance(summary, 10)
    assert capsys.readouterr().err == ""
