"""A packed ranking: documents leave as in the engine, if a batch holds all of their query."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from fpabee.exporter.single_file import pack
from fpabee.runtime import BackendError, Engine, TopK
from fpabee.runtime.check import EXPORT_LIMIT
from fpabee.runtime.encoding import Text

from ...closeness import assert_close
from ...conftest import WORDS
from .consumer import Consumer

GOLDEN = Path(__file__).parents[2] / "golden" / "1.0"
FP32 = "onnxruntime-fp32"
TOP = 3
RULE = TopK(top=TOP, threshold=(-0.3, -0.2, 0.0))
FEW = [
    "bert",
    "mpnet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("albert", "roberta", "modernbert")),
]


def pairs(query: str, documents: int, seed: int) -> list[Text]:
    drawn = random.Random(seed)
    return [(query, " ".join(drawn.choices(WORDS, k=1 + n % 20))) for n in range(documents)]


@pytest.fixture
def packed(
    ranking_engines: Mapping[str, Path], set_points: Callable[..., None], tmp_path: Path
) -> Callable[[str], tuple[Path, Consumer]]:
    """Packs a ranking, and gives its engines folder and what runs the file."""

    def make(family: str) -> tuple[Path, Consumer]:
        folder = Path(shutil.copytree(ranking_engines[family], tmp_path / "engines"))
        set_points(folder, FP32, "changed-5", **{"changed-5": RULE})
        made = pack(folder, tmp_path / "packed", FP32)
        assert made.operating_point == "changed-5"
        return folder, Consumer(tmp_path / "packed")

    return make


@pytest.mark.parametrize("family", FEW)
def test_a_batch_of_a_query_ranks_like_the_engine(
    family: str, packed: Callable[[str], tuple[Path, Consumer]]
) -> None:
    pytest.importorskip("openvino")
    folder, consumer = packed(family)
    first = pairs("play the good music", 40, 0)
    second = pairs("is it not sun", 30, 1)
    # The rows of two queries, mixed; each row says which query and which document it is.
    order = np.random.default_rng(0).permutation(70)
    both = [*first, *second]
    with Engine.load(folder) as engine:
        every = [
            engine.rank(str(some[0][0]), [str(pair[1]) for pair in some], all=True)
            for some in (first, second)
        ]
        whole = engine.trace(both).logits[-1, :, 0]
    exits = np.zeros(70, np.int64)
    for start, found in zip((0, 40), every, strict=True):
        for each in found:
            exits[start + each.index] = each.exit
    last = exits.max()
    for run in (consumer.onnxruntime, consumer.openvino()):
        logits, left_at = consumer.in_batches(run, [both[n] for n in order], 70, padding=2)
        np.testing.assert_array_equal(left_at, exits[order])
        assert len({*left_at.tolist()}) == 3
        scores = np.zeros(70)
        scores[order] = logits[:, 0]
        assert_close(scores[exits == last, None], whole[exits == last, None], EXPORT_LIMIT)
        for start, end in ((0, 40), (40, 70)):
            stays = exits[start:end] == last
            assert scores[start:end][~stays].max() < scores[start:end][stays].min()
            ranking = [each.index for each in every[start // 40]][:TOP]
            assert np.argsort(-scores[start:end])[:TOP].tolist() == ranking


def test_the_card_is_about_rankings_and_its_example_runs(
    packed: Callable[[str], tuple[Path, Consumer]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, consumer = packed("bert")
    card = (consumer.folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-ranking" in card
    assert "classifier" not in card
    assert f"set of the best {TOP} documents" in card
    assert "Layers per document: " in card
    example, check, in_openvino = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _: str(consumer.folder))
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(compile(check, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("right here")
    kept = names["texts"]
    assert min(kept["exits"]) < max(kept["exits"]), "some leave and some stay"
    pytest.importorskip("openvino")
    exec(compile(in_openvino, "README.md", "exec"), names)
    assert names["compiled"].get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    answers = names["compiled"]({name: np.array(ids) for name, ids in kept["inputs"].items()})
    assert answers["exit"].tolist() == kept["exits"]
    assert np.abs(answers["logits"] - kept["logits"]).max() <= kept["tolerance"]


def test_the_card_does_not_count_layers_that_scores_saved(tmp_path: Path) -> None:
    """The file takes no scores, so it runs more layers than its operating point."""
    pack(GOLDEN / "reranker", tmp_path / "file")
    card = (tmp_path / "file" / "README.md").read_text(encoding="utf-8")
    assert "as fpabee runs its segments with the scores of a search" in card
    assert "Layers per document" not in card
    assert "Times as fast" not in card


def test_documents_of_other_queries_do_not_count(
    packed: Callable[[str], tuple[Path, Consumer]],
) -> None:
    """No query has more than the wanted documents, so all of them run all layers."""
    _, consumer = packed("bert")
    rows = [(f"{word} {number}", "the sun") for number in range(8) for word in WORDS[:TOP]]
    _, exits = consumer.in_batches(consumer.onnxruntime, rows, len(rows))
    assert set(exits) == {3}


def test_small_batches_compare_fewer_documents(
    packed: Callable[[str], tuple[Path, Consumer]],
) -> None:
    _, consumer = packed("bert")
    rows = pairs("play the good music", 40, 0)
    _, whole = consumer.in_batches(consumer.onnxruntime, rows, 40)
    _, small = consumer.in_batches(consumer.onnxruntime, rows, 8)
    _, alone = consumer.in_batches(consumer.onnxruntime, rows, 1)
    assert whole.mean() < small.mean() < alone.mean() == 3


def test_rows_that_cannot_be_read_do_not_count(
    packed: Callable[[str], tuple[Path, Consumer]],
) -> None:
    """Neither their own logits nor those that they would have change anything."""
    _, consumer = packed("bert")
    rows = pairs("play the good music", 30, 0)
    inputs = consumer.inputs(rows)
    logits, exits = consumer.onnxruntime({name: value[3:] for name, value in inputs.items()})
    inputs["attention_mask"][:3, 0] = 0
    found, found_exits = consumer.onnxruntime(inputs)
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found_exits[3:], exits)
    assert_close(found[3:], logits)


def test_no_plan_is_built(ranking_engines: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="plans of rankings"):
        pack(ranking_engines["bert"], tmp_path / "plan", "tensorrt-rtx-fp16")
