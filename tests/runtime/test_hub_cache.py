"""An engines folder as Hugging Face's `snapshot_download` leaves it: links into `blobs/`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fpabee.calibration.cli import main as calibrate
from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import MANIFEST_NAME
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


def blobs_of(snapshot: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (snapshot / "../../blobs").iterdir()}


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


def test_a_calibration_leaves_the_blobs_as_they_are(snapshot: Path, tmp_path: Path) -> None:
    before, chosen = blobs_of(snapshot), random.Random(0)
    rows = [
        {"text": " ".join(chosen.choices(["the", "good", "film", "rain"], k=4)), "label": label}
        for label in 30 * ["music", "weather"]
    ]
    data = tmp_path / "dev.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    invoke(calibrate, snapshot, "--data", data, "--threads", 1, "--quiet", "--max-drop", 5)
    assert blobs_of(snapshot) == before
    assert not (snapshot / MANIFEST_NAME).is_symlink()
    manifest = read_manifest(snapshot)
    assert manifest.targets[manifest.default_target].operating_points
    with Engine.load(snapshot, threads=1, check=True) as engine:
        assert engine.operating_point


def test_a_blob_that_was_changed_is_found(snapshot: Path) -> None:
    path = snapshot / read_manifest(snapshot).graphs["segment_02"].file
    path.resolve().write_bytes(b"changed")
    result = CliRunner().invoke(inspect, [str(snapshot), "--check"])
    assert result.exit_code == 1
    assert "segment_02.onnx is damaged" in result.stdout
