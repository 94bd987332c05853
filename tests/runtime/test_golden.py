"""What fpabee 1.0.0 wrote is read by every later version, with the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from fpabee.commands import inspect
from fpabee.runtime import read_manifest

from .running import Run, execute

GOLDEN = Path(__file__).parents[1] / "golden" / "1.0"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("point", ["kept", "fast"])
def test_texts_have_the_same_answers(run: Run, point: str) -> None:
    result = run(GOLDEN / "engines", GOLDEN / "texts.jsonl", "--scores", "--operating-point", point)

    expected = records(GOLDEN / f"{point}.jsonl")
    assert {record["exit"] for record in expected} >= {0, 2}
    for found, record in zip(result.records, expected, strict=True):
        numbers = {name: record[name] for name in ("score", "probabilities")}
        near = {name: pytest.approx(value, abs=1e-4) for name, value in numbers.items()}
        assert found == record | near


def test_documents_have_the_same_ranks(run: Run) -> None:
    result = run(GOLDEN / "reranker", GOLDEN / "queries.jsonl")

    expected = records(GOLDEN / "ranked.jsonl")
    documents = [document for record in expected for document in record["results"]]
    assert {document["exit"] for document in documents} == {0, 1, 2}
    for found, record in zip(result.records, expected, strict=True):
        results = [
            document | {"score": pytest.approx(document["score"], abs=1e-4)}
            for document in record["results"]
        ]
        assert found == record | {"results": results}


@pytest.mark.parametrize(
    ("folder", "point", "files", "promise"),
    [
        ("engines", "kept", 7, "at most 20 % changed answers, with 95 % confidence"),
        ("reranker", "changed-10", 6, "at most 10 % changed answers, with 95 % confidence"),
    ],
)
def test_the_folder_passes_the_check(
    capfd: pytest.CaptureFixture[str], folder: str, point: str, files: int, promise: str
) -> None:
    result = execute(inspect.main, capfd, [GOLDEN / folder, "--check", "--json"])

    check = json.loads(result.out)["check"]
    assert (result.code, check["passed"], check["files"]) == (0, True, files)
    target = read_manifest(GOLDEN / folder).targets["onnxruntime-fp32"]
    certificate = target.operating_points[point].certificate
    assert str(certificate) == promise


def test_the_single_file_has_the_same_answers() -> None:
    session = onnxruntime.InferenceSession(GOLDEN / "single_file" / "model.onnx")
    tokenizer = Tokenizer.from_file(str(GOLDEN / "single_file" / "tokenizer.json"))
    for row, expected in zip(
        records(GOLDEN / "texts.jsonl"), records(GOLDEN / "kept.jsonl"), strict=True
    ):
        tokens = tokenizer.encode(row["text"], row.get("text_pair"))
        inputs = {
            "input_ids": tokens.ids,
            "token_type_ids": tokens.type_ids,
            "attention_mask": tokens.attention_mask,
        }
        (logits,), (exit_,) = session.run(
            ["logits", "exit"], {name: np.array([values]) for name, values in inputs.items()}
        )
        assert exit_ == expected["exit"]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert shares == pytest.approx([*expected["probabilities"].values()], abs=1e-4)
