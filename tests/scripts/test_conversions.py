"""The study of conversions: what certifies has not trained the classifier, and what tables say."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conversions
import numpy as np
import pytest
from conversions import (
    Run,
    as_graph,
    compared,
    graph_runner,
    halves,
    logits_of,
    tables,
    texts_for,
)
from numpy.typing import NDArray

from fpabee.calibration.scoring import LabelledLogits
from fpabee.runtime import ProblemType

from ..closeness import assert_exported
from ..exporter.convert.conftest import TEXTS, make_telling


def test_the_texts_of_a_conversion_have_not_trained_the_classifier(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "conversions").mkdir()
    for part, count in (("train", 100), ("dev", 10)):
        with gzip.open(tmp_path / "data" / f"{part}.jsonl.gz", "wt") as file:
            for number in range(count):
                row = {"text": f"{part} {number}", "text_pair": "b", "label": "x"}
                file.write(json.dumps(row) + "\n")
    run = Run("encoder", "data", 1, rows=90)
    trained, others = halves(run, 42, 100)
    assert (len(trained), len(others), len({*trained, *others})) == (45, 45, 90)
    every, some = (texts_for(run, 42, size, tmp_path, tmp_path) for size in (None, 20))
    rows = [json.loads(line) for line in every.read_text().splitlines()]
    expected = [f"train {number}" for number in others] + [f"dev {number}" for number in range(10)]
    assert [row.pop("text") for row in rows] == expected
    assert rows == [{"text_pair": "b"}] * 55
    chosen = some.read_text().splitlines()
    assert len(chosen) == 20
    assert {*chosen} < {*every.read_text().splitlines()}


@pytest.mark.filterwarnings("ignore")  # of the exporter of PyTorch
def test_a_graph_gives_the_logits_of_its_classifier(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = make_telling(tiny_models["bert"], tmp_path / "model", "single_label_classification")
    texts = list(pairwise(TEXTS[:40]))
    file = as_graph(model, tmp_path / "graph")
    logits, _ = logits_of(model, texts)
    # OpenVINO computes in bf16 on some processors.
    assert_exported(graph_runner(model, file, openvino=False)(texts), logits)


@pytest.mark.parametrize(("agrees", "saved"), [(True, 0.5), (False, 0.0)])
def test_draws_certify_what_agrees(
    agrees: bool, saved: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(1000)]
    texts.write_text("\n".join(lines))
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[:300]))

    def of(rows: Sequence[object]) -> NDArray[np.float32]:
        last = np.where(np.arange(len(rows)) % 2, 9, -9)
        return np.stack([last, -last], axis=1).astype(np.float32)

    def traced(engine: object, rows: Sequence[object], *_: object) -> LabelledLogits:
        last = of(rows)
        early = last if agrees else -last
        lengths = np.full(len(rows), 5)
        return LabelledLogits(np.stack([early, last]), lengths, None, ProblemType.SINGLE_LABEL)

    task = SimpleNamespace(labels=("no", "yes"))
    manifest = SimpleNamespace(task=task, exit_layers=(3, 6))
    engine = nullcontext(SimpleNamespace(manifest=manifest))
    monkeypatch.setattr("conversions.Engine.load", lambda *_: engine)
    monkeypatch.setattr(conversions, "trace_rows", traced)
    monkeypatch.setattr(conversions, "logits_of", lambda _, rows: (of(rows), None))
    average = conversions.drawn(tmp_path / "model", texts, tmp_path / "engines", tmp_path)
    assert average == {"saved": saved, "changed": 0.0}


def test_the_tables_say_what_was_found() -> None:
    test = compared([{"a"}, {"b"}, {"a", "b"}], [{"a"}, {"a"}, {"b"}], [{"a"}, {"b"}, {"c"}])
    assert test == {"changed": 2, "accuracy": 2 / 3}
    point = {"certificate": {"promises": []}, "held_out": {"mean_depth": 3.0}}
    target = {"target": conversions.FP32, "points": [point]}
    refused = {"certificate": None, "held_out": {"mean_depth": 6.0}}
    failed = {"target": "onnxruntime-int8", "points": [refused]}
    form = {"pooling": "attention", "width": 64, "queries": 4, "every": 1}
    found: dict[str, Any] = {
        "classifier": {"rows": 3, "accuracy": 0.5},
        "all": {
            "targets": [target, failed],
            "exit_layers": [0, 3, 6],
            "texts": 1234,
            "cpu_s": 61.2,
            "chosen": {"form": form, "agreement": [0.8, 0.95]},
        },
        "all drawn": {"saved": 0.45, "changed": 0.0061},
        f"all {conversions.FP32}": test | {"saved": 0.4},
        "all onnxruntime-int8": test | {"saved": 0.0},
        "exit 0 alone": {"changed": 1, "saved": 0.1},
        "times": {
            "graph-onnxruntime": {"single": [2.0, 4.0, 6.0], "file": [3.0, 3.0, 3.0]},
            conversions.FP32: {"single": [1.0, 1.0, 4.0], "file": [1.0, 2.0, 3.0]},
        },
    }
    lines = list(tables({"trec-42": found}))
    for line in (
        "| trec-42 | all | 1,234 | `onnxruntime-fp32` | yes | 50.0% | 40.0% | 2 of 3 | 66.7% "
        "| 50.0% | 61 s |",
        "| classifier | conversion | `onnxruntime-fp32`: saved | `onnxruntime-int8`: saved |",
        "| trec-42 | all | 50.0% | no |",
        "| trec-42 | exit 0 alone |  |  |  |  | 10.0% | 1 of 3 |  | 50.0% |  |",
        "| trec-42 | all | 45.0% | 0.61% |",
        "| trec-42 | all | attention with 4 queries, hidden layer of 64, every 1 | 80.0 95.0 |",
        "| trec-42 | `onnxruntime-fp32` | 2.00 | 1.50 |",
    ):
        assert line in lines
