"""Engines folders that are loaded by the name of their repository on the hub."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from fpabee.commands.inspect import main as inspect
from fpabee.exporter.checkpoint import resolve_model_dir
from fpabee.runtime import ArtifactError, Engine, MissingExtraError, ModelError, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.hub import engines_folder, repository_of

from ..doubles.hub import Hub, Repository
from ..doubles.hub import serve as double_of_the_hub
from .running import Run, check_refused

NAME = "owner/name"
TEXTS = ["the film is not bad", "rain"]


@pytest.fixture
def repository(hub: Hub, engines: Mapping[str, Path]) -> Repository:
    """A repository with the engines folder of the tiny BERT."""
    return hub.add(NAME, engines["bert"])


def refused(says: str, revision: str | None = None) -> None:
    with (
        pytest.raises(ArtifactError, match=says) as caught,
        Engine.load(NAME, revision=revision) as engine,
    ):
        engine.warm_up(tokens=1)
    assert caught.value.hint


def test_only_what_the_target_runs_is_downloaded(
    hub: Hub, engine_copy: Callable[..., Path], engines: Mapping[str, Path]
) -> None:
    folder = engine_copy()
    (folder / "README.md").touch()
    (folder / "int8.onnx").write_bytes(b"what another target runs")
    manifest = read_manifest(folder)
    graph = msgspec.structs.replace(
        manifest.graphs["segment_01"], file="int8.onnx", sha256=sha256_of(folder / "int8.onnx")
    )
    precisions = {"int8": manifest.graphs | {"segment_01": graph}}
    EnginesFolder(folder, manifest).with_manifest(precisions=precisions).write()
    hub.add(NAME, folder)
    with Engine.load(NAME, check=True) as held, Engine.load(engines["bert"]) as plain:
        assert held.predict(TEXTS) == plain.predict(TEXTS)
    first, *others = hub.downloaded()
    assert first == "manifest.json"
    graphs = [graph.file for graph in manifest.graphs.values()]
    assert {*others} == {manifest.tokenizer.file, *manifest.files, *graphs}
    with Engine.load(Path(NAME)):
        assert hub.downloaded() == ["manifest.json"], "the rest is in the cache"
    snapshot = engines_folder(NAME, every_target=True)
    assert hub.downloaded() == ["manifest.json", "int8.onnx"]
    assert (snapshot / "int8.onnx").readlink().parts[-2] == "blobs", "each file is a link"


def test_a_revision_is_a_commit(
    hub: Hub, repository: Repository, engines: Mapping[str, Path]
) -> None:
    (first,) = repository.commits
    albert = engines["albert"]
    paths = [path for path in albert.rglob("*") if path.is_file()]
    repository.commit({path.relative_to(albert).as_posix(): path.read_bytes() for path in paths})
    with Engine.load(NAME) as new, Engine.load(NAME, revision=first) as old:
        assert (old.manifest.model.model_type, new.manifest.model.model_type) == ("bert", "albert")
    refused("owner/name has no revision 'v9' -> check the name, the revision", "v9")


def test_a_folder_that_is_here_is_taken(
    hub: Hub,
    repository: Repository,
    engines: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    refused("engines folder owner/name does not exist")
    (tmp_path / NAME).symlink_to(engines["albert"])
    with Engine.load(NAME) as engine:
        assert engine.manifest.model.model_type == "albert"
    refused("owner/name is a path here, which has no revision 'v1' -> leave out the revision", "v1")
    assert hub.requests == []


def test_the_double_is_there_when_the_hub_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: Mapping[str, Path]
) -> None:
    """The tests pass where the environment forbids the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with double_of_the_hub(tmp_path) as hub:
        hub.add(NAME, engines["bert"])
        assert engines_folder(NAME).is_dir()


def test_what_was_downloaded_needs_no_network(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("owner/name is not a folder here, and the hub cannot be reached -> .* HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    engines_folder(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Engine.load(NAME) as engine:
        assert len(engine.predict(TEXTS)) == 2
    assert hub.requests == []


@pytest.mark.parametrize("how", ["refuses", "is silent", "fails"])
def test_a_hub_or_proxy_that_does_not_answer_is_asked_once(
    how: str,
    hub: Hub,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client prints a line, and sleeps, before it tries again."""
    monkeypatch.setattr("fpabee.runtime.hub._PATIENCE", 0.2)
    engines_folder(NAME)
    monkeypatch.setattr(time, "sleep", Mock(side_effect=AssertionError))
    hub.requests.clear()
    hub.fails = True
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if how == "is silent":
            listening.listen()
        url = hub.url if how == "fails" else f"http://127.0.0.1:{listening.getsockname()[1]}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with Engine.load(NAME) as engine:  # which is in the cache
            assert len(engine.predict(TEXTS)) == 2
        with pytest.raises(ArtifactError, match=r"owner/other .* the hub cannot be reached"):
            engines_folder("owner/other")
        with pytest.raises(ModelError, match=r"owner/other .* the hub cannot be reached"):
            resolve_model_dir("owner/other")
    asked = [request for request in hub.requests if "owner/other" in request]
    assert len(asked) == (2 if how == "fails" else 0)


@pytest.mark.parametrize("path", ["modle", "./modle", ".cache/modle", "../modle", "a/b/c", "a/b/"])
def test_a_path_is_no_name_of_a_repository(path: str) -> None:
    assert repository_of(path) is None
    assert repository_of("owner/name") == "owner/name"


def test_a_repository_that_cannot_be_used_is_refused(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = repository.files
    repository.commit({"manifest.json": files["manifest.json"].replace(b'"1.0', b'"7.0')})
    refused(r"has schema 7\.0")
    outside = files["manifest.json"].replace(b"onnx/fp32/segment_01.onnx", b"../../outside")
    repository.commit({"manifest.json": outside})
    refused(r"owner/name on the hub: .*outside")
    del repository.commits[repository.commit(files)]["onnx/fp32/segment_02.onnx"]
    refused("owner/name has no onnx/fp32/segment_02.onnx")
    damaged = bytes(len(files["onnx/fp32/segment_02.onnx"]))
    repository.commit({"onnx/fp32/segment_02.onnx": damaged})
    refused(r"segment_02\.onnx is damaged: sha256")
    repository.commits.clear()
    repository.commit({"config.json": b"{}"})
    refused("owner/name has no manifest.json -> if it is a model, make engines of it with")
    repository.gated = True
    refused("owner/name is gated: .* set HF_TOKEN")
    del hub.repositories[NAME]
    refused("owner/name is not a folder here, and the hub has no such repository")
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "huggingface_hub" else find(n))
    missing = (
        r"owner/name is not a folder .* needs huggingface_hub.* -> pip install huggingface-hub"
    )
    with pytest.raises(MissingExtraError, match=missing):
        Engine.load(NAME)


def test_plans_of_strangers_do_not_run_unasked(
    hub: Hub, engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    plan = msgspec.structs.replace(manifest.targets["onnxruntime-fp32"], backend="tensorrt")
    engines = EnginesFolder(folder, manifest).with_target("tensorrt-fp32-sm90", plan)
    engines = engines.with_manifest(default_target="tensorrt-fp32-sm90")
    engines.write()
    hub.add(NAME, folder)
    monkeypatch.setattr("fpabee.runtime.targets.why_not", lambda *_: None)  # as with a GPU
    refused("tensorrt-fp32-sm90 of owner/name would run here, .* -> choose this `target`")
    for target in manifest.targets:
        assert read_manifest(engines_folder(NAME, target)) == engines.manifest


def test_commands_take_the_name(
    hub: Hub,
    repository: Repository,
    run: Run,
    engines: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    result = run(NAME, texts, "--quiet")
    assert result.records == run(engines["bert"], texts, "--quiet").records
    assert result.err == ""
    shown = CliRunner().invoke(inspect, [NAME, "--check"]).stdout
    assert re.search(r"hashes: (\d+) of \1 files are intact", shown)
    assert "reproduces the exported model" in shown
    check_refused(run("owner/other", texts), "the hub has no such repository")
