"""An engines folder as Hugging Face's `snapshot_download` leaves it: links into `blobs/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.cli.inspect import main as inspect
from fpabee.runtime.cli.run import main as run

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


def invoke(command: click.Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_gives_what_a_plain_folder_gives(
    snapshot: Path, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    with Engine.load(engines["bert"], threads=1) as plain, Engine.load(snapshot, threads=1) as held:
        assert held.predict(TEXTS) == plain.predict(TEXTS)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    for folder, output in ((snapshot, "held"), (engines["bert"], "plain")):
        given = ("--input", tmp_path / "in.txt", "--output", tmp_path / f"{output}.jsonl")
        invoke(run, folder, *given, "--threads", 1, "--quiet", "--check")
    assert (tmp_path / "held.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    shown = invoke(inspect, snapshot, "--check")
    assert "hashes: 6 of 6 files are intact" in shown
    assert "reproduces the exported model" in shown
