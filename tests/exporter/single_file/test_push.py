"""A model that is pushed to the hub is loaded from there, in one file or as segments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, snapshot_download

from fpabee.exporter.cli.pack import main
from fpabee.runtime import Certificate, Confidence, Engine, Promise, read_manifest
from fpabee.runtime.artifact.folder import hashes, write_manifest
from fpabee.runtime.artifact.manifest import with_operating_points, with_target

from ...doubles.hub import Hub
from .consumer import Consumer
from .test_packing import FP32, SINGLE

# Of the client, where it uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "owner/name"
CERTIFICATE = Certificate(
    confidence=95.0,
    promises=(
        Promise(of="flips", at_most=1.0, rows=1199),
        Promise(of="missed", at_most=2.0, label="music", rows=150),
    ),
)


@pytest.fixture
def folder(
    exit_0_engines: Mapping[str, Path], tmp_path: Path, set_points: Callable[..., None]
) -> Path:
    """An engines folder as a conversion leaves it, with figures that are made up."""
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    set_points(folder, FP32, flips=Confidence(threshold=0.6, exit_0_threshold=0.9))
    manifest = read_manifest(folder)
    target = manifest.targets[FP32]
    point = msgspec.structs.replace(
        target.operating_points["flips"],
        metric="agreement",
        score=0.9966,
        mean_depth=1.25,
        measured_speedup={"1": 1.81, "32": 1.8},
        versions={"onnxruntime": "1.32.0", "fpabee": "1.0.0"},
        hardware="some processor, 2 threads",
        certificate=CERTIFICATE,
    )
    target = with_operating_points(target, {"flips": point}, "flips")
    write_manifest(folder, with_target(manifest, FP32, target))
    (folder / "calibration").mkdir()
    (folder / "calibration" / "trace.npz").touch()
    return folder


def push(folder: Path, output: str, *options: str) -> Result:
    output = str(folder.parent / output)
    return CliRunner().invoke(main, [str(folder), "-o", output, "--push", NAME, *options])


def test_both_forms_are_loaded_by_the_name(hub: Hub, folder: Path) -> None:
    result = push(folder, "packed")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"uploaded with {folder} to {hub.url}/{NAME}\n")
    repository = hub.repositories[NAME]
    assert repository.private
    assert len(repository.commits) == 1, "nobody sees a part of it"
    packed = {path.name for path in (folder.parent / "packed").iterdir()}
    named = {file for file, _ in hashes(read_manifest(folder))}
    assert repository.files.keys() == packed | named | {"manifest.json"}
    with Engine.load(NAME, check=True) as held, Engine.load(folder) as plain:
        assert held.operating_point == "flips"
        assert held.predict(SINGLE) == plain.predict(SINGLE)
        expected = [answer.exit for answer in plain.predict(SINGLE[:9])]
    snapshot = Path(snapshot_download(NAME, allow_patterns=["*.json", "model.onnx"]))
    _, exits = Consumer(snapshot).onnxruntime(SINGLE[:9])
    assert exits.tolist() == expected
    repository.private = False
    result = push(folder, "again", "--json", "--layout", "transformers.js", "--quiet")
    assert json.loads(result.stdout)["repository"] == f"{hub.url}/{NAME}"
    assert not repository.private, "who owns a repository decides who sees it"
    assert {"model.onnx", "onnx/model.onnx"} <= repository.files.keys()


def test_the_card_says_what_was_promised_and_measured(hub: Hub, folder: Path) -> None:
    assert push(folder, "packed").exit_code == 0
    text = hub.repositories[NAME].files["README.md"].decode()
    card: Any = ModelCard(text)
    assert (card.data.library_name, card.data.tags) == ("onnx", ["early-exit", "fpabee", "onnx"])
    for part in (
        "at most 1 % flips (tested on 1,199 texts) and "
        "at most 2 % missed of 'music' (tested on 150 texts), with 95 % confidence",
        "agreement, on 100 texts (5-fold cross-fitting): 0.9966 (0.34% changed)",
        "Layers per text: 1.25 of 3.",
        "Times as fast as full depth: 1.81 for single texts, 1.80 for files.",
        "Measured on some processor, 2 threads, with onnxruntime 1.32.0, fpabee 1.0.0.",
        f'Engine.load("{NAME}")',
    ):
        assert part in text, part
    local = (folder.parent / "packed" / "README.md").read_text()
    assert NAME not in local
    assert text.startswith(local)


def test_what_the_hub_refuses_is_one_line(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    result = push(folder, "packed", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {NAME} on the hub: Client error '401")
    assert result.stderr.count("\n") == 1
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.full = True
    result = push(folder, "again", "--quiet")
    assert result.exit_code == 1
    assert f"error: {NAME} on the hub: Error while uploading " in result.stderr
    assert hub.repositories[NAME].files == {}
    hub.full = False
    for kept in ("packed", "again"):
        assert (folder.parent / kept / "model.onnx").is_file(), "it is complete"
    assert push(folder, "last", "--quiet").exit_code == 0
