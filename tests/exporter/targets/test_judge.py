"""Targets are judged by their score on labelled rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fpabee.exporter.cli.export import main
from fpabee.exporter.targets.judge import Judge
from fpabee.runtime import Engine, InputError, VerificationError, read_manifest
from fpabee.runtime.agreement import REQUIREMENTS
from fpabee.runtime.files import Row

WORDS = ("the", "film", "is", "not", "good", "rain", "lights", "play", "music", "table")
TEXTS = [" ".join(triple) for triple in itertools.permutations(WORDS, 3)][:400]


def labelled(engine: Engine, texts: list[str]) -> list[Row]:
    """Rows with the labels that the model gives at full depth."""
    answers = engine.predict(texts, full_depth=True)
    return [Row(text, None, answer.labels) for text, answer in zip(texts, answers, strict=True)]


@pytest.mark.parametrize(
    ("rows", "wrong", "loss"), [(400, 1, ""), (400, 2, "0.50"), (50, 1, ""), (50, 2, "4.00")]
)
def test_a_target_may_lose_little_on_labelled_rows(
    rows: int, wrong: int, loss: str, engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient = dataclasses.replace(REQUIREMENTS["fp32"], labels=0.0, exits=0.0)
    monkeypatch.setitem(REQUIREMENTS, "fp32", lenient)
    with Engine.load(engines["bert"]) as engine:
        judge = Judge(engine, labelled(engine, TEXTS[:rows]))
        trace = engine.trace

        def worse(*given: Any) -> Any:
            found = trace(*given)
            found.logits[-1, :wrong] *= -1
            return found

        monkeypatch.setattr(engine, "trace", worse)
        if loss:
            with pytest.raises(VerificationError, match=f"it loses {loss} points") as error:
                judge(engine)
            limit = f"at most {max(0.3, 100 / rows):.2f} points less allowed"
            for part in (f"accuracy {1 - wrong / rows:.4f} on {rows} labelled", limit, "1.0000"):
                assert part in error.value.message
            assert "another target" in error.value.hint
        else:
            _, score = judge(engine)
            assert score is not None
            assert score.drop == pytest.approx(100 * wrong / rows)


def test_labels_that_differ_come_first_and_without_labels_there_is_no_score(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(engines["bert"]) as engine:
        rows = labelled(engine, TEXTS[:50])
        some = [*rows[:-1], dataclasses.replace(rows[-1], labels=None)]
        agreement, score = Judge(engine, some)(engine)
        assert (agreement.rows, agreement.passed, score) == (50, True, None)
        with pytest.raises(InputError, match="which the model does not know"):
            Judge(engine, [dataclasses.replace(rows[0], labels=("none such",))])
        required = dataclasses.replace(REQUIREMENTS["fp32"], labels=1.1)
        monkeypatch.setitem(REQUIREMENTS, "fp32", required)
        with pytest.raises(VerificationError, match="it changes answers from exit"):
            Judge(engine, rows)(engine)


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_judges_openvino_on_labelled_rows(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    folder, data = engine_copy(), tmp_path / "rows"
    with Engine.load(folder) as engine:
        rows = labelled(engine, TEXTS[:40])
    columns = ("--input-format", "jsonl", "--label-column", "kind")
    command = ("--from", folder, "--backend", "openvino", "--verify-data", data, *columns)
    data.write_text("".join(json.dumps({"text": r.text, "kind": "no"}) + "\n" for r in rows))
    refused = export(*command)
    assert refused.exit_code == 1
    assert "label 'no', which the model does not know" in refused.stderr
    assert list(read_manifest(folder).targets) == ["onnxruntime-fp32"]
    lines = [json.dumps({"text": row.text, "kind": (row.labels or ())[0]}) for row in rows]
    data.write_text("\n".join(lines) + "\n")
    result = export(*command)
    assert result.exit_code == 0, result.output
    assert "accuracy 1.0000 on 40 labelled rows (fp32: 1.0000, at most 2.50" in result.stdout
    scores = itertools.cycle([0.5, 0.9])
    monkeypatch.setattr("fpabee.exporter.targets.judge._score_of", lambda *_: next(scores))
    result = export(*command)
    assert "openvino-fp32 is not kept: it loses 40.00 points: accuracy 0.5000" in result.stdout
    assert "-> use another target" in result.stdout
    assert result.exit_code == 1, "nothing of what was asked for is kept"
    # On a CPU with bf16, there is a second target.
    assert re.search(r"openvino-fp32\b.* did not pass: it loses 40\.00 points", result.stderr)
    piped = CliRunner().invoke(main, [*map(str, command[:5]), "-"], input="a text\n")
    assert piped.exit_code == 1
    assert "- can be read only once" in piped.stderr
    assert list(read_manifest(folder).targets) == ["onnxruntime-fp32"]
