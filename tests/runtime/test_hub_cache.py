"""An engines folder as Hugging Face's `snapshot_download` leaves it: links into `blobs/`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from fpabee.commands.inspect import main as inspect
from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import sha256_of

TEXTS = ["the film is not bad", "rain"]


@pytest.fixture
def snapshot(engine_copy: Callable[..., Path], tmp_path: Path) -> Path:
    """`snapshots/<revision>/`, in which every file is a link to `../../blobs/<hash>`."""
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    engine_copy().rename(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = blobs / sha256_of(path)
        path.rename(blob)
        up = len(path.relative_to(folder.parent).parts) * [".."]
        path.symlink_to(Path(*up, "blobs", blob.name))
        assert path.is_file()
    return folder


def test_it_gives_what_a_plain_folder_gives(snapshot: Path, engines: Mapping[str, Path]) -> None:
    with (
        Engine.load(engines["bert"], threads=1) as plain,
        Engine.load(snapshot, threads=1, check=True) as held,
    ):
        assert held.predict(TEXTS) == plain.predict(TEXTS)
    shown = CliRunner().invoke(inspect, [str(snapshot), "--check"]).stdout
    assert re.search(r"hashes: (\d+) of \1 files are intact", shown)
    assert "reproduces the exported model" in shown
