"""The files of exit 0: added to a model_dir, refused if they do not fit it, and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from one_graph import write_one_graph
from safetensors.numpy import load_file, save_file

from fpabee.exporter import export
from fpabee.exporter.checkpoint import load_checkpoint, load_config, save_checkpoint
from fpabee.exporter.exit_0_files import (
    EXIT_0_FILE,
    load_exit_0,
    save_exit_0,
    unigrams_of,
)
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import ExitZeroSpec, FirstStageSpec
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text, TextEncoder
from fpabee.runtime.errors import ModelError
from fpabee.runtime.exit_0 import ExitZero
from fpabee.runtime.first_stage import FirstStage

from ..bad_input.cases import change_config
from ..closeness import assert_close
from ..conftest import make_model

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS: list[Text] = ["a good film", "turn on the light", ("rain", "the sun"), ("the sun", "rain")]


def random_exit_0(vocabulary: int, labels: int, buckets: int = 64) -> ExitZero:
    random = np.random.default_rng(7)
    table = random.normal(size=(vocabulary + buckets, labels)).astype(np.float16)
    weights = np.eye(labels, dtype=np.float32)
    return ExitZero(vocabulary, table, weights, np.ones(labels, np.float32))


def read(folder: Path) -> ExitZero | None:
    config = load_config(folder)
    exit_0 = load_exit_0(folder, config, len(config.id2label))
    assert not isinstance(exit_0, FirstStage)
    return exit_0


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A published checkpoint, with exit 0."""
    folder = Path(shutil.copytree(GOLDEN / "pabee_bert", tmp_path / "bert"))
    save_exit_0(folder, random_exit_0(load_config(folder).vocab_size, 3))
    return folder


def test_exit_0_is_added_without_another_change(bert: Path, tmp_path: Path) -> None:
    source = GOLDEN / "pabee_bert"
    assert read(source) is None, "checkpoints without it stay valid"
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, bert))
    block = {"exit_0": {"unigrams": 200, "buckets": 64}}
    assert new == old | {"fpabee": block}
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in bert.iterdir()} == names | {EXIT_0_FILE}
    for name in names - {"config.json"}:
        assert sha256_of(bert / name) == sha256_of(source / name)
    assert load_checkpoint(bert).exit_config == load_checkpoint(source).exit_config
    assert [path.name for path in tmp_path.iterdir()] == ["bert"], "nothing is left beside it"

    given = random_exit_0(200, 3)
    found = read(bert)
    assert found is not None
    assert found.arrays.keys() == given.arrays.keys()
    for name, array in given.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)

    other = ExitZero(200, given.table, given.weights, np.full(3, 5, np.float32))
    save_exit_0(bert, other)
    again = read(bert)
    assert again is not None
    assert again.bias.tolist() == [5, 5, 5]
    save_checkpoint(load_checkpoint(bert), bert)
    assert read(bert) is None
    assert not (bert / EXIT_0_FILE).exists(), "a model that replaces another has its own exit 0"


def test_vocabularies_of_more_than_65536_tokens_share_unigrams() -> None:
    assert [unigrams_of(size) for size in (30522, 65536, 250_002)] == [30522, 65536, 65536]


Damage = Callable[[Path], object]


def change(**arrays: Any) -> Damage:
    """Replaces arrays of the file; None drops them."""

    def damage(folder: Path) -> None:
        new = load_file(folder / EXIT_0_FILE) | arrays
        kept = {name: array for name, array in new.items() if array is not None}
        save_file(kept, folder / EXIT_0_FILE)

    return damage


def with_block(block: object) -> Damage:
    """What `config.json` says about exit 0."""
    return lambda folder: change_config(folder, fpabee=block)


def cut(folder: Path) -> None:
    (folder / EXIT_0_FILE).write_bytes((folder / EXIT_0_FILE).read_bytes()[:-10])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: (folder / EXIT_0_FILE).unlink(), "is missing, but config.json"),
    "cut": (cut, "is not an exit 0: "),
    "an array is missing": (change(bias=None), "is not an exit 0: 'bias'"),
    "other buckets": (
        change(table=np.zeros((232, 3), np.float16)),
        "it has 32 buckets, expected 64",
    ),
    "vocabulary": (
        lambda folder: save_exit_0(folder, random_exit_0(1000, 3)),
        "it has 1000 unigrams, but the vocabulary 200",
    ),
    "labels": (
        lambda folder: save_exit_0(folder, random_exit_0(200, 2)),
        "gives 2 logits for 3 labels",
    ),
    "an empty block": (with_block({"exit_0": {}}), "is not an exit 0: 'unigrams'"),
    "a wrong block": (with_block({"exit_0": "yes"}), "is not an exit 0: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_the_model_is_refused(name: str, bert: Path) -> None:
    damage, message = DAMAGES[name]
    damage(bert)
    with pytest.raises(ModelError, match=message) as caught:
        read(bert)
    assert caught.value.hint == "train the model again"


STAGE = FirstStage(FirstStageSpec(weights=(0.5, -1.0, 2.0), bias=3.0))


def test_a_ranking_keeps_its_exit_0_in_the_configuration(tmp_path: Path) -> None:
    source = make_model("bert", tmp_path / "model", ranks=True)
    names = {path.name for path in source.iterdir()}
    save_exit_0(source, STAGE)
    assert {path.name for path in source.iterdir()} == names
    assert load_exit_0(source, load_config(source), 1, method="rank") == STAGE
    manifest = export(source, tmp_path / "engines").manifest
    assert (manifest.first_stage, manifest.exit_0) == (STAGE.spec, None)
    assert manifest.exit_layers == (0, 1, 2, 3)
    texts, logits = read_reference(EnginesFolder(tmp_path / "engines", manifest))
    assert logits.shape == (4, len(texts), 1)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"weights": [1, 2], "bias": 0}, "length 3"),
        ({"weights": [1, 2, 1e31], "bias": 0}, "weights"),
        ({"weights": [1, 2, 3]}, "bias"),
        ({"unigrams": 200, "buckets": 64}, "weights"),
        ("yes", "Expected `object`"),
    ],
    ids=str,
)
def test_a_damaged_exit_0_of_a_ranking_is_refused(block: Any, says: str, tmp_path: Path) -> None:
    config = SimpleNamespace(fpabee={"exit_0": block})
    with pytest.raises(ModelError, match=f"has no exit 0 of a ranking.*{says}") as caught:
        load_exit_0(tmp_path, config, 1, method="rank")
    assert caught.value.hint


def test_a_classifier_has_no_exit_0_of_a_ranking(bert: Path) -> None:
    save_exit_0(bert, STAGE)
    with pytest.raises(ModelError, match="is not an exit 0"):
        read(bert)


def test_an_export_has_exit_0_and_one_graph_leaves_it_out(
    tiny_models: Mapping[str, Path], tmp_path: Path, ready_graphs: None
) -> None:
    source = Path(shutil.copytree(tiny_models["bert"], tmp_path / "model"))
    given = random_exit_0(load_config(source).vocab_size, 4)
    save_exit_0(source, given)
    first = export(source, tmp_path / "engines")
    folder = first.folder
    manifest = first.manifest
    assert manifest == read_manifest(folder)
    digest = sha256_of(folder / "exit_0.npz")
    expected = ExitZeroSpec(file="exit_0.npz", sha256=digest, unigrams=given.unigrams, buckets=64)
    assert manifest.exit_0 == expected
    assert manifest.exit_layers == (0, 1, 2, 3)
    exit_0 = ExitZero.load(EnginesFolder(folder, manifest))
    assert exit_0 is not None
    rows = TextEncoder(folder, manifest.tokenizer).encode(TEXTS)
    np.testing.assert_array_equal(exit_0(rows), given(rows))
    texts, logits = read_reference(EnginesFolder(folder, manifest))
    expected_logits = exit_0(TextEncoder(folder, manifest.tokenizer).encode(texts))
    assert_close(logits[0], expected_logits)
    assert len(logits) == len(manifest.exit_layers)

    (tmp_path / "one").mkdir()
    one = write_one_graph(folder, tmp_path / "one")
    assert (one.exit_0, one.exit_layers) == (None, (3,))
    _, logits_of_one = read_reference(EnginesFolder(tmp_path / "one", one))
    np.testing.assert_array_equal(logits_of_one, logits[-1:])
