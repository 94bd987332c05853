"""Export from end to end: what an engines folder holds, and what remains when an export fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fpabee.exporter import ExportOptions, export, pipeline, staging
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.pipeline import BUILT_IN_TEXTS
from fpabee.exporter.targets.check import check_chain
from fpabee.runtime import Engine, Trace
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import SCHEMA_VERSION
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.check import BATCH_LIMIT, EXPORT_LIMIT, Agreement
from fpabee.runtime.encoding import Text
from fpabee.runtime.errors import ArtifactError, CheckError

from ..bad_input.cases import change_json
from ..closeness import assert_exported
from ..doubles.hub import Hub

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
def test_published_checkpoint_gives_its_logits_in_pytorch_and_from_the_engine(
    name: str, golden_engines: Mapping[str, Path]
) -> None:
    rows = json.loads((GOLDEN / name / "expected.json").read_text(encoding="utf-8"))
    texts = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in rows]
    assert "" in texts
    assert any(isinstance(text, tuple) for text in texts)
    assert not all(row["text"].isascii() for row in rows)
    with Engine.load(golden_engines[name]) as engine:
        assert engine.manifest.exit_layers == (2, 4), "the exits that were chosen"
        logits = engine.trace(texts).logits
    model = load_checkpoint(GOLDEN / name)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / name)
    for row, found in zip(rows, logits.transpose(1, 0, 2), strict=True):
        inputs = tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")
        with torch.no_grad():
            every = model(**{name: inputs[name] for name in tokenizer.model_input_names})[:, 0]
        assert_exported(every, row["logits"])
        assert_exported(found, np.array(row["logits"])[[1, 3]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_describes_the_model_and_itself(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    folder = engines[family]
    source = tiny_models[family]
    manifest = read_manifest(folder)
    config = load_checkpoint(source).exit_config
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.model.model_type == family
    assert (manifest.model.layers, manifest.model.hidden_size) == (3, 32)
    assert manifest.model.shared_layers is (family == "albert")
    assert manifest.model.pooling == config.pooling.value
    assert (manifest.task.labels, manifest.task.problem_type) == (
        config.labels,
        config.problem_type,
    )
    assert {"torch", "transformers", "onnx"} <= manifest.versions.keys()
    target = manifest.targets[manifest.default_target]
    assert manifest.default_target == "onnxruntime-fp32"
    assert (target.backend, target.precision) == ("onnxruntime", "fp32")
    assert target.tolerance is not None
    assert BATCH_LIMIT <= target.tolerance <= EXPORT_LIMIT
    named = {graph.file: graph.sha256 for graph in manifest.graphs.values()}
    named |= manifest.files | {manifest.tokenizer.file: manifest.tokenizer.sha256}
    found = contents(folder).keys() - {"manifest.json"}
    assert {name: sha256_of(folder / name) for name in found} == named
    assert {"reference.npz", "verification.json", "tokenizer/tokenizer.json"} <= found
    texts, logits = read_reference(EnginesFolder(folder, manifest))
    assert texts == list(BUILT_IN_TEXTS)
    assert logits.dtype == np.float32


def test_the_result_describes_a_folder_that_is_always_the_same(
    engines: Mapping[str, Path], bert: Path, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = tmp_path / "a" / "b" / "engines"
    result = export(bert, folder, progress=lambda *call: calls.append(call))
    assert result.folder == folder
    assert result.manifest == read_manifest(folder)
    assert result.size == sum(len(content) for content in contents(folder).values())
    record = result.agreement.to_dict()
    assert record == json.loads((folder / "verification.json").read_text())
    assert (record["passed"], record["rows"]) == (True, len(BUILT_IN_TEXTS))
    assert (record["label_agreement"], record["exit_agreement"]) == (1.0, 1.0)
    assert record["max_logit_difference"] <= EXPORT_LIMIT
    assert calls == [
        ("segment_01", 0, 3), ("segment_02", 1, 3), ("segment_03", 2, 3), ("check", 3, 3)
    ]  # fmt: skip
    # PyTorch may compute other last digits, for example with another number of threads.
    measured = {"manifest.json", "reference.npz", "verification.json"}
    found = contents(folder)
    expected = contents(engines["bert"])
    assert found.keys() == expected.keys()
    for name in found.keys() - measured:
        assert found[name] == expected[name], name
    (texts, logits), (same_texts, same_logits) = (
        read_reference(EnginesFolder.read(place)) for place in (folder, engines["bert"])
    )
    assert texts == same_texts
    assert_exported(logits, same_logits)
    assert [path.name for path in folder.parent.iterdir()] == ["engines"]


def test_a_model_that_came_from_the_hub_is_named(bert: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add("someone/tiny-bert", bert)
    for model, base_model in (("someone/tiny-bert", "someone/tiny-bert"), (bert, "")):
        result = export(model, tmp_path / "engines", ExportOptions(force=True))
        assert read_manifest(result.folder).base_model == base_model


def test_the_folder_has_usual_permissions(bert: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    folder = tmp_path / "engines"
    usual.mkdir()
    (usual / "file").touch()
    folder.mkdir()  # an empty folder is used
    export(bert, folder)
    for path in (folder, *folder.rglob("*")):
        expected = usual if path.is_dir() else usual / "file"
        assert path.stat().st_mode == expected.stat().st_mode


def test_an_engines_folder_of_any_version_is_replaced_by_force_alone(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    old = engine_copy("albert")
    more = {"schema_version": "2.0", "files": {"onnx/older.onnx": "0" * 64}}
    change_json(old / "manifest.json", lambda m: m.update(more))
    (old / "onnx" / "older.onnx").write_text("of the old model")
    before = contents(old)
    with pytest.raises(ArtifactError, match=r"already holds an engines folder .*force"):
        export(bert, old)
    assert contents(old) == before
    export(bert, old, ExportOptions(force=True))
    assert read_manifest(old).model.model_type == "bert"
    assert not (old / "onnx" / "older.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_what_is_not_ours_is_never_replaced(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "folder" / "manifest.json"
    mine.parent.mkdir()
    for content in ('{"name": "a web application", "icons": []}', "not even JSON"):
        mine.write_text(content)
        for place in (mine.parent, mine):
            with pytest.raises(ArtifactError, match="will not be replaced"):
                export(bert, place, ExportOptions(force=True))
        assert contents(mine.parent) == {"manifest.json": content.encode()}
    late = tmp_path / "appears during the export"

    def late_file(*given: Any) -> Agreement:
        late.write_text("mine")
        return check_chain(*given)

    monkeypatch.setattr(pipeline, "check_chain", late_file)
    with pytest.raises(ArtifactError, match="will not be replaced"):
        export(bert, late)
    assert late.read_text() == "mine"


def test_a_mounted_disk_is_refused_before_anything_is_made(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(ArtifactError, match=r"mounted disk, .* -> give a folder in it as `output`"):
        export(bert, tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("amount", "texts"),
    [(0.001, BUILT_IN_TEXTS), (0.001, BUILT_IN_TEXTS[7:8]), (np.nan, BUILT_IN_TEXTS)],
)
def test_a_chain_that_differs_is_named_and_the_old_folder_stays(
    amount: float,
    texts: Sequence[Text],
    bert: Path,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For all texts together, or for a text alone."""
    trace = Engine.trace

    def wrong(engine: Engine, given: Sequence[Text], **options: Any) -> Trace:
        found = trace(engine, given, **options)
        if tuple(given) == texts:
            found.logits[1:] += amount
        return found

    old = engine_copy("albert")
    before = contents(old)
    monkeypatch.setattr(Engine, "trace", wrong)
    with pytest.raises(CheckError, match="from exit 2 on"):
        export(bert, old, ExportOptions(force=True))
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


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
    monkeypatch.setattr(pipeline, "check_chain", Mock(side_effect=error))
    with pytest.raises(expected):
        export(bert, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = engine_copy("albert")
    before = contents(old)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == old:
            monkeypatch.setattr(Path, "replace", replace)
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)  # as on other systems
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        export(bert, old, ExportOptions(force=True))
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_link_and_the_current_folder_keep_their_place(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine_copy("albert", "real")
    (tmp_path / "link").symlink_to("real")
    export(bert, tmp_path / "link", ExportOptions(force=True))
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(real).model.model_type == "bert"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    monkeypatch.chdir(real)
    export(bert, ".", ExportOptions(force=True))
    assert not list(real.glob(".*"))
