"""Export from end to end: what an engines folder holds, and what remains when an export fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpabee.exporter import ExportOptions, export, pipeline
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.verify import BUILT_IN_TEXTS
from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import ArtifactError, InputError, ModelError, VerificationError

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("bert", "albert", "mpnet")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def bert(tiny_models: Mapping[str, Path], ready_graphs: None) -> Path:
    """The tiny BERT, whose graphs are taken from an earlier export."""
    return tiny_models["bert"]


@pytest.mark.parametrize("name", ["pabee_bert", "fpabee_albert"])
def test_published_checkpoint_gives_its_logits_from_the_engine(
    name: str, golden_engines: Mapping[str, Path]
) -> None:
    rows = json.loads((GOLDEN / name / "expected.json").read_text(encoding="utf-8"))
    texts = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in rows]
    assert any(isinstance(text, tuple) for text in texts)
    with Engine.load(golden_engines[name]) as engine:
        logits = engine.trace(texts).logits
    expected = np.array([row["logits"] for row in rows]).transpose(1, 0, 2)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_describes_the_model_and_itself(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    folder, source = engines[family], tiny_models[family]
    manifest, config = read_manifest(folder), load_checkpoint(source).exit_config
    assert manifest.schema_version == "1.0"
    assert manifest.model.model_type == family
    assert (manifest.model.layers, manifest.model.hidden_size) == (3, 32)
    assert manifest.model.shared_layers is (family == "albert")
    assert manifest.model.pooling == config.pooling.value
    assert (manifest.task.labels, manifest.task.problem_type) == (
        config.labels,
        config.problem_type,
    )
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert manifest.model.source_sha256 == {name: sha256_of(source / name) for name in names}
    assert {"torch", "transformers", "onnx"} <= manifest.versions.keys()
    target = manifest.targets[manifest.default_target]
    assert manifest.default_target == "onnxruntime-fp32"
    assert (target.backend, target.precision, target.row_invariant) == ("onnxruntime", "fp32", True)
    assert target.tolerance is not None
    assert 1e-5 <= target.tolerance <= 1e-4
    named = {graph.file: graph.sha256 for graph in manifest.graphs.values()}
    named |= manifest.files | {manifest.tokenizer.file: manifest.tokenizer.sha256}
    found = contents(folder).keys() - {"manifest.json"}
    assert {name: sha256_of(folder / name) for name in found} == named
    assert {"reference.npz", "verification.json", "tokenizer/tokenizer.json"} <= found
    record = json.loads((folder / "verification.json").read_text())
    assert (record["passed"], record["rows"]) == (True, len(BUILT_IN_TEXTS))
    assert list(record["graphs"]) == list(manifest.graphs)
    assert (record["label_agreement"], record["exit_agreement"]) == (1.0, 1.0)
    assert 0 < record["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_holds_the_logits_of_the_pytorch_model(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    with np.load(engines[family] / "reference.npz", allow_pickle=False) as reference:
        stored, logits = json.loads(reference["texts"].tobytes()), reference["logits"]
    texts = [text if isinstance(text, str) else tuple(text) for text in stored]
    assert texts == list(BUILT_IN_TEXTS)
    assert logits.dtype == np.float32
    model = load_checkpoint(tiny_models[family])
    with Engine.load(engines[family]) as engine:
        found = engine.trace(texts).logits
        (row,) = engine.encode(["turn the lights off"])
        one = engine.trace(["turn the lights off"]).logits
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    ids = torch.from_numpy(row.input_ids)[None]
    with torch.no_grad():
        np.testing.assert_allclose(one, model(ids, torch.ones_like(ids)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "exits"), [("mpnet", (2, 3)), ("bert", (1,))])
def test_chosen_exits_give_the_logits_of_those_exits(
    family: str,
    exits: tuple[int, ...],
    engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    options = ExportOptions(exits=exits)
    manifest = export(tiny_models[family], tmp_path / "few", options).manifest
    layers = list(enumerate(exits, start=1))
    assert [(segment.exit, segment.layer) for segment in manifest.segments] == layers
    assert manifest.model.layers == exits[-1]
    texts = ["good film", "", "the plot is bad but the music is good"]
    with Engine.load(engines[family]) as whole, Engine.load(tmp_path / "few") as few:
        expected = whole.trace(texts).logits[[number - 1 for number in exits]]
        np.testing.assert_allclose(few.trace(texts).logits, expected, rtol=0, atol=1e-5)
        assert {prediction.layer for prediction in few.predict(texts)} <= {*exits}
    with np.load(tmp_path / "few" / "reference.npz") as reference:
        assert reference["logits"].shape[:2] == (len(exits), len(BUILT_IN_TEXTS))


@pytest.mark.parametrize("exits", [(0,), (1, 4), (2, 1), (1, 1)])
def test_exits_that_the_model_does_not_have_are_refused(
    exits: tuple[int, ...], bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"with 3 exits .*between 1 and 3"):
        export(bert, tmp_path / "engines", ExportOptions(exits=exits))
    assert list(tmp_path.iterdir()) == []


def test_the_result_describes_a_folder_that_is_always_the_same(
    engines: Mapping[str, Path], bert: Path, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = tmp_path / "a" / "b" / "engines"
    result = export(bert, folder, progress=lambda *call: calls.append(call))
    assert result.folder == folder
    assert result.manifest == read_manifest(folder)
    assert result.size == sum(len(content) for content in contents(folder).values())
    assert result.agreement.to_dict() == json.loads((folder / "verification.json").read_text())
    assert calls == [
        ("segment_01", 0, 3), ("segment_02", 1, 3), ("segment_03", 2, 3), ("verify", 3, 3)
    ]  # fmt: skip
    assert contents(folder) == contents(engines["bert"])
    assert [path.name for path in folder.parent.iterdir()] == ["engines"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("more.jsonl", '{"text": "good film"}\n{"text": "rain", "text_pair": "sun"}\n'),
        ("more.csv", "text_pair,text\n,good film\nsun,rain\n"),
    ],
)
def test_verify_data_is_verified_too(bert: Path, tmp_path: Path, name: str, content: str) -> None:
    data = tmp_path / name
    data.write_text(content)
    result = export(bert, tmp_path / "engines", ExportOptions(verify_data=data))
    assert result.agreement.rows == len(BUILT_IN_TEXTS) + 2
    with np.load(result.folder / "reference.npz") as reference:
        texts = json.loads(reference["texts"].tobytes())
    assert texts[-2:] == ["good film", ["rain", "sun"]]


def test_missing_verify_data_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.txt does not exist"):
        export(bert, tmp_path / "engines", ExportOptions(verify_data=tmp_path / "missing.txt"))
    assert list(tmp_path.iterdir()) == []


def test_max_length_and_task_reach_the_runtime(bert: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(bert, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["problem_type"]
    (source / "config.json").write_text(json.dumps(config))
    options = ExportOptions(problem_type=ProblemType.MULTI_LABEL, max_length=9)
    manifest = export(source, tmp_path / "engines", options).manifest
    assert manifest.tokenizer.max_length == 9
    assert manifest.task.problem_type is ProblemType.MULTI_LABEL


@pytest.fixture
def usual_umask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def test_everyone_may_read_the_folder(bert: Path, tmp_path: Path, usual_umask: None) -> None:
    (tmp_path / "engines").mkdir()  # an empty folder is used
    folder = export(bert, tmp_path / "engines").folder
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


@pytest.mark.parametrize("schema_version", ["1.0", "2.0"])
def test_an_engines_folder_is_replaced_by_force_alone(
    schema_version: str, bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    old = engine_copy("albert")
    manifest = json.loads((old / "manifest.json").read_text()) | {"schema_version": schema_version}
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old / "note.txt").write_text("in the old folder")
    before = contents(old)
    with pytest.raises(ArtifactError, match=r"already holds an engines folder .*force"):
        export(bert, old)
    assert contents(old) == before
    export(bert, old, ExportOptions(force=True))
    assert read_manifest(old).model.model_type == "bert"
    assert not (old / "note.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {"manifest.json": '{"name": "a web application", "icons": []}', "app.js": "code"},
        {"manifest.json": "not even JSON"},
    ],
    ids=["no manifest", "manifest of something else", "damaged manifest"],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_someone_else_is_never_replaced(
    force: bool, files: dict[str, str], bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(ArtifactError, match="mine"):
        export(bert, folder, ExportOptions(force=force))
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_a_file_is_never_replaced(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="will not be replaced"):
        export(bert, tmp_path / "file", ExportOptions(force=True))
    with pytest.raises(ArtifactError, match=r"cannot write in .*file"):
        export(bert, tmp_path / "file" / "engines")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_an_error(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ArtifactError, match="locked"):
        export(bert, tmp_path / "locked" / "engines")


@pytest.mark.parametrize("amount", [0.01, np.nan])
def test_failed_verification_names_the_segment_and_keeps_the_old_folder(
    amount: float,
    bert: Path,
    engine_copy: Callable[..., Path],
    spoil_segment_2: Callable[[float], None],
    tmp_path: Path,
) -> None:
    spoil_segment_2(amount)
    old = engine_copy("albert")
    before = contents(old)
    with pytest.raises(VerificationError, match="segment_02 differs"):
        export(bert, old, ExportOptions(force=True))
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_chain_that_differs_leaves_nothing(
    bert: Path,
    spoil_segment_2: Callable[[float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_segment_2(0.01)
    monkeypatch.setattr(pipeline, "check_graphs", lambda *_: {})
    with pytest.raises(VerificationError, match="from exit 2 on"):
        export(bert, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    error: BaseException,
    expected: type[BaseException],
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "check_graphs", fail)
    with pytest.raises(expected):
        export(bert, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    bert: Path,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = engine_copy("albert")
    before = contents(old)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == old:
            monkeypatch.setattr(Path, "replace", replace)
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        export(bert, old, ExportOptions(force=True))
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_link_keeps_its_place(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    engine_copy("albert", "real")
    (tmp_path / "link").symlink_to("real")
    export(bert, tmp_path / "link", ExportOptions(force=True))
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "real").model.model_type == "bert"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_current_folder_is_written(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(bert, ".")
    assert read_manifest(tmp_path).model.model_type == "bert"
    assert not list(tmp_path.glob(".*"))
