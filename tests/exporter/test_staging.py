"""A folder is replaced by a process that `kill -9` may end at any step."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from fpabee.exporter import staging as staging_module
from fpabee.exporter.staging import staging
from fpabee.runtime.artifact.folder import checked_file, read_manifest

from ..child_process import Child, Report

FILES = ("graph", "manifest")


def replace_and_die(target: Path, steps: int) -> None:
    """Replace a folder, and end this process as `kill -9` does, after some steps."""
    left = iter(range(steps))

    def hook(event: str, _: object) -> None:
        """Called before each step that opens, makes, renames or deletes something."""
        if event != "os.kill" and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with staging(target) as folder:
        for name in FILES:
            (folder / name).write_text(f"new {steps}")
    os._exit(0)


def kills(report: Report, target: str) -> None:
    """Replace a folder, each time a step further; reports what is there after each kill."""
    for steps in count(1):
        child = os.fork()
        if not child:
            replace_and_die(Path(target), steps)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        contents = [Path(target, name).read_text() for name in FILES]
        report((code, contents, len([*Path(target).parent.iterdir()])))
        if code == 0:
            return


def kills_exports(report: Report, model_dir: str, target: str, seconds: float) -> None:
    """Export into a folder, and kill that at random moments; reports how each export ended."""
    from fpabee.exporter.pipeline import ExportOptions, export

    started = time.monotonic()
    took = 0.0
    while not took or time.monotonic() < started + seconds:
        child = os.fork()
        if not child:
            if took:  # nothing handles this signal, so that it ends the process like `kill -9`
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0, took))
            export(model_dir, target, ExportOptions(force=True))
            os._exit(0)
        report(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        took = took or time.monotonic() - started
        for graph in read_manifest(Path(target)).graphs.values():
            checked_file(Path(target), graph.file, graph.sha256)
        assert len([*Path(target).parent.iterdir()]) <= 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="swaps two folders in one step")
def test_exports_that_are_killed_at_random_moments(
    tiny_models: Mapping[str, Path], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seconds = pytestconfig.getoption("--seconds")
    target = tmp_path / "engines"
    places = {"model_dir": str(tiny_models["bert"]), "target": str(target)}
    ended = Child(kills_exports, seconds=seconds, **places).wait(seconds + 300)
    assert ended.failure == ""
    assert ended.reports[0] == 0
    assert {*ended.reports[1:]} <= {0, -signal.SIGALRM}


@pytest.mark.skipif(sys.platform != "linux", reason="swaps two folders in one step")
def test_a_kill_leaves_the_old_folder_or_the_new_one_and_little_else(tmp_path: Path) -> None:
    target = tmp_path / "engines"
    target.mkdir()
    for name in FILES:
        (target / name).write_text("old")
    other = tmp_path / ".engines-20261129"
    other.mkdir()
    ended = Child(kills, target=str(target)).wait(60)
    assert ended.failure == ""
    assert {code for code, *_ in ended.reports} == {-signal.SIGKILL, 0}
    assert len(ended.reports) > 10
    assert all(first == second for _, (first, second), _ in ended.reports)
    assert len({contents[0] for _, contents, _ in ended.reports}) > 2
    # The next process deletes what was left, but nothing that a process is writing or a user made.
    assert max(entries for *_, entries in ended.reports) <= 3
    assert sorted(tmp_path.iterdir()) == [other, target]
    with staging(target) as one, staging(target) as two:
        assert one.is_dir()
        assert two.is_dir()


def test_a_folder_that_another_process_deleted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take it for one that was left, before it is locked."""
    deleted: list[Path] = []

    @contextmanager
    def locked(folder: Path) -> Iterator[None]:
        if not deleted:
            deleted.append(folder)
            folder.rmdir()
        with lock_of_folder(folder):
            yield

    lock_of_folder = staging_module.locked
    monkeypatch.setattr(staging_module, "locked", locked)
    with staging(tmp_path / "engines") as folder:
        assert folder not in deleted
        (folder / "graph").write_text("new")
    assert (tmp_path / "engines" / "graph").read_text() == "new"


def test_what_belongs_to_a_longer_name_is_not_deleted(tmp_path: Path) -> None:
    other = tmp_path / ".engines-v2-0123abcd.unfinished"
    left = tmp_path / ".engines-0123abcd.unfinished"
    for folder in (other, left):
        folder.mkdir()
    with staging(tmp_path / "engines"):
        assert other.exists()
        assert not left.exists()
