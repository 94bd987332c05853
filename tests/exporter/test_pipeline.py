"""Export from end to end: what an engines folder holds, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fpabee.exporter import ExportOptions, export, pipeline, segments
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
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def bert(tiny_models: Mapping[str, Path], ready_graphs: None) -> Path:
    """The tiny BERT, whose graphs need not be made again."""
    return tiny_models["bert"]


def spoil_segment_2(monkeypatch: pytest.MonkeyPatch, amount: float = 0.01) -> None:
    """Let the exporter write a wrong bias into segment 2."""
    right = segments.export_graph

    def wrong(module: Any, inputs: Any, outputs: Any, path: Path, positions: int) -> None:
        right(module, inputs, outputs, path, positions)
        if path.name == "segment_02.onnx":
            proto = onnx.load(path)
            weight = next(w for w in proto.graph.initializer if w.name == "head.classifier.bias")
            values = onnx.numpy_helper.to_array(weight) + np.float32(amount)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
            onnx.save(proto, path)

    monkeypatch.setattr(segments, "export_graph", wrong)


@pytest.mark.parametrize("name", ["pabee_bert", "fpabee_albert"])
def test_published_checkpoint_gives_its_logits_from_the_engine(
    name: str, golden_engines: dict[str, Path]
) -> None:
    rows = json.loads((GOLDEN / name / "expected.json").read_text(encoding="utf-8"))
    texts = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in rows]
    assert any(isinstance(text, tuple) for text in texts)
    with Engine.load(golden_engines[name]) as engine:
        logits = engine.trace(texts).logits
    expected = np.array([row["logits"] for row in rows]).transpose(1, 0, 2)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_says_where_the_model_comes_from_and_what_it_does(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    manifest = read_manifest(engines[family])
    source = tiny_models[family]
    config = load_checkpoint(source).exit_config
    assert manifest.schema_version == "1.0"
    assert manifest.model.model_type == family
    assert (manifest.model.layers, manifest.model.hidden_size) == (3, 32)
    assert manifest.model.shared_layers is (family == "albert")
    assert manifest.model.pooling == config.pooling.value
    assert manifest.task.labels == config.labels
    assert manifest.task.problem_type is config.problem_type
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert manifest.model.source_sha256 == {name: sha256_of(source / name) for name in names}
    assert {"torch", "transformers", "onnx"} <= manifest.versions.keys()
    target = manifest.targets[manifest.default_target]
    assert manifest.default_target == "onnxruntime-fp32"
    assert (target.backend, target.precision, target.row_invariant) == ("onnxruntime", "fp32", True)
    assert target.tolerance is not None
    assert 1e-5 <= target.tolerance <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_holds_what_the_manifest_names_with_its_hashes(
    family: str, engines: Mapping[str, Path]
) -> None:
    manifest = read_manifest(engines[family])
    named = {graph.file: graph.sha256 for graph in manifest.graphs.values()}
    named |= manifest.files | {manifest.tokenizer.file: manifest.tokenizer.sha256}
    found = {name for name in contents(engines[family]) if name != "manifest.json"}
    assert {name: sha256_of(engines[family] / name) for name in found} == named
    assert {"reference.npz", "verification.json", "tokenizer/tokenizer.json"} <= found


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_holds_the_logits_of_the_pytorch_model(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    with np.load(engines[family] / "reference.npz", allow_pickle=False) as reference:
        texts = [
            text if isinstance(text, str) else tuple(text)
            for text in json.loads(reference["texts"].tobytes())
        ]
        logits = reference["logits"]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_verification_is_recorded(family: str, engines: Mapping[str, Path]) -> None:
    record = json.loads((engines[family] / "verification.json").read_text())
    assert record["passed"] is True
    assert record["rows"] == len(BUILT_IN_TEXTS)
    assert list(record["graphs"]) == list(read_manifest(engines[family]).graphs)
    assert (record["label_agreement"], record["exit_agreement"]) == (1.0, 1.0)
    assert 0 < record["max_logit_difference"] < 1e-4


def test_the_same_model_gives_the_same_bytes(
    engines: Mapping[str, Path], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    export(tiny_models["bert"], tmp_path / "again")
    assert contents(tmp_path / "again") == contents(engines["bert"])


def test_chosen_exits_give_the_logits_of_those_exits(
    engines: Mapping[str, Path], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = export(tiny_models["mpnet"], tmp_path / "few", ExportOptions(exits=(2, 3))).folder
    manifest = read_manifest(folder)
    assert [(segment.exit, segment.layer) for segment in manifest.segments] == [(1, 2), (2, 3)]
    texts = ["good film", "", "the plot is bad but the music is good"]
    with Engine.load(engines["mpnet"]) as whole, Engine.load(folder) as few:
        expected = whole.trace(texts).logits[1:]
        np.testing.assert_allclose(few.trace(texts).logits, expected, rtol=0, atol=1e-5)
        assert {prediction.layer for prediction in few.predict(texts)} <= {2, 3}
    with np.load(folder / "reference.npz") as reference:
        assert reference["logits"].shape == (2, len(BUILT_IN_TEXTS), 5)


def test_one_early_exit_is_a_shorter_model(
    engines: Mapping[str, Path], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    manifest = export(tiny_models["bert"], tmp_path / "one", ExportOptions(exits=(1,))).manifest
    (graph,) = manifest.graphs.values()
    assert [spec.name for spec in graph.outputs] == ["logits"]
    assert manifest.model.layers == 1
    texts = ["good film", "play music"]
    with Engine.load(engines["bert"]) as whole, Engine.load(tmp_path / "one") as one:
        expected = whole.trace(texts).logits[:1]
        np.testing.assert_allclose(one.trace(texts).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exits", [(0,), (1, 4), (2, 1), (1, 1), (-1,)])
def test_exits_that_the_model_does_not_have_are_refused(
    exits: tuple[int, ...], bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"with 3 exits .*between 1 and 3"):
        export(bert, tmp_path / "engines", ExportOptions(exits=exits))
    assert list(tmp_path.iterdir()) == []


def test_result_tells_of_the_folder(bert: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    result = export(bert, tmp_path / "engines", progress=lambda *call: calls.append(call))
    assert result.folder == tmp_path / "engines"
    assert result.manifest == read_manifest(result.folder)
    assert result.size == sum(len(content) for content in contents(result.folder).values())
    record = json.loads((result.folder / "verification.json").read_text())
    assert result.agreement.to_dict() == record
    assert calls == [
        ("segment_01", 0, 3), ("segment_02", 1, 3), ("segment_03", 2, 3), ("verify", 3, 3)
    ]  # fmt: skip


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


def test_max_length_and_task_reach_the_runtime(
    tiny_models: Mapping[str, Path], ready_graphs: None, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_models["bert"], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["problem_type"]
    (source / "config.json").write_text(json.dumps(config))
    options = ExportOptions(problem_type=ProblemType.MULTI_LABEL, max_length=9)
    manifest = export(source, tmp_path / "engines", options).manifest
    assert manifest.tokenizer.max_length == 9
    assert manifest.task.problem_type is ProblemType.MULTI_LABEL


def test_tokens_that_the_model_does_not_know_are_refused(
    tiny_models: Mapping[str, Path], ready_graphs: None, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_models["bert"], tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "pabee_bert" / name, source)
    with pytest.raises(ModelError, match="tokenizer"):
        export(source, tmp_path / "engines")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def usual_umask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def test_everyone_may_read_the_folder(bert: Path, tmp_path: Path, usual_umask: None) -> None:
    folder = export(bert, tmp_path / "engines").folder
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


def test_missing_parents_of_the_output_are_made(bert: Path, tmp_path: Path) -> None:
    assert export(bert, tmp_path / "a" / "b" / "engines").folder.is_dir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["engines"]


def test_an_empty_folder_is_used(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    export(bert, tmp_path / "engines")
    assert (tmp_path / "engines" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_an_engines_folder_is_replaced_by_force_alone(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    old = engine_copy("albert")
    (old / "note.txt").write_text("of the old one")
    before = contents(old)
    with pytest.raises(ArtifactError, match=r"already holds an engines folder .*--force"):
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
def test_a_folder_that_is_not_ours_is_never_replaced(
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
    (tmp_path / "engines").write_text("mine")
    with pytest.raises(ArtifactError, match="will not be replaced"):
        export(bert, tmp_path / "engines", ExportOptions(force=True))
    assert (tmp_path / "engines").read_text() == "mine"


def test_a_newer_engines_folder_may_be_replaced(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    old = engine_copy()
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": "2.0"}))
    export(bert, old, ExportOptions(force=True))
    assert read_manifest(old).schema_version == "1.0"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_an_error(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ArtifactError, match="locked"):
        export(bert, tmp_path / "locked" / "engines")


def test_a_parent_that_is_a_file_is_an_error(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write in .*file"):
        export(bert, tmp_path / "file" / "engines")


@pytest.mark.parametrize("amount", [0.01, np.nan])
def test_failed_verification_names_the_segment_and_leaves_nothing(
    amount: float, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_segment_2(monkeypatch, amount)
    with pytest.raises(VerificationError, match="segment_02 differs"):
        export(bert, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


def test_failed_verification_keeps_the_old_folder(
    bert: Path,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = engine_copy("albert")
    before = contents(old)
    spoil_segment_2(monkeypatch)
    with pytest.raises(VerificationError):
        export(bert, old, ExportOptions(force=True))
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_chain_that_differs_leaves_nothing(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_segment_2(monkeypatch)
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
def test_interrupted_export_leaves_nothing(
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


def test_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
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


def test_output_through_a_link_leaves_nothing_half_done(
    bert: Path, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    engine_copy("albert", "real")
    (tmp_path / "link").symlink_to("real")
    try:
        export(bert, tmp_path / "link", ExportOptions(force=True))
        expected = "bert"
    except ArtifactError:
        expected = "albert"
    assert read_manifest(tmp_path / "link").model.model_type == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_output_into_the_current_folder_leaves_nothing_half_done(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        export(bert, ".")
    except ArtifactError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert read_manifest(tmp_path).model.model_type == "bert"
    assert not list(tmp_path.glob(".*"))
