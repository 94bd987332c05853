"""The comparison of systems: in fresh processes, resumed, and drawn without what failed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers
import picture
import pytest
import reproduce
import systems
from systems import System

from fpabee.runtime import Budget, Engine, Pabee

from ..programs import invoke, printed

TEXTS = ["turn on the light", "is it not a good film", "book a table", "play music"]
MEASURED: dict[str, Any] = {
    "score": 0.5,
    "changed": 1,
    "rows": 4,
    "median_ms": 2.0,
    "p99_ms": 3.0,
    "rows_per_s": 400.0,
}
MEASURED |= {"memory_mib": 100.0, "start_up_s": 1.0, "layers": None}
TARGET = "onnxruntime-fp32"


def _store(path: Path, texts: list[str], labels: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        for text, label in zip(texts, labels, strict=True):
            file.write(json.dumps({"text": text, "labels": label.split("|")}) + "\n")


def test_a_system_is_measured_in_a_fresh_process(
    engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = str(engines["bert"])
    with Engine.load(folder) as engine:
        labels = [row.labels[0] for row in engine.predict(TEXTS, full_depth=True)]
        labels[0] = next(name for name in engine.labels if name != labels[0])
        labels[1] += f"|{labels[0]}"
    _store(tmp_path / "data" / "test.jsonl.gz", TEXTS, labels)
    decisions = tmp_path / "decisions.json"
    decisions.write_text(json.dumps([label.split("|") for label in labels]))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    inputs = {"model": "m", "data": str(tmp_path / "data"), "decisions": str(decisions)}
    inputs["classifier"] = str(tmp_path)
    full = systems.chain("full", engines["bert"], TARGET)
    settings = full.settings
    measured = systems.measure(full, inputs, tmp_path)
    expected = {"score": 0.5, "changed": 2, "rows": 4, "layers": 3, "in_doubt": 0}
    assert {name: measured[name] for name in expected} == expected
    assert 0 < measured["median_ms"] <= measured["p99_ms"]
    assert min(measured[key] for key in ("rows_per_s", "memory_mib", "start_up_s")) > 0
    first = settings | {"rule": Budget(exit=1).to_dict()}
    assert systems.measure(System("1", "fpabee", settings=first), inputs, tmp_path)["layers"] == 1
    wrong = System("other", "fpabee", settings=settings | {"target": "none such"})
    with pytest.raises(RuntimeError, match="none such"):
        systems.measure(wrong, inputs, tmp_path)


@pytest.mark.parametrize("patience", [1, 3])
def test_pabee_stops_as_its_rule(
    tiny_models: Mapping[str, Path], engines: Mapping[str, Path], patience: int
) -> None:
    spec = SimpleNamespace(model=tiny_models["bert"], engines=engines["bert"], patience=patience)
    texts = [*TEXTS, "rain", "the sun", "call mum", "a bad film in the morning"]
    with Engine.load(engines["bert"]) as engine:
        expected, first = (
            [(list(row.labels), None) for row in engine.predict(texts, rule=rule)]
            for rule in (Pabee(patience=patience), Budget(exit=1))
        )
    assert expected != first
    assert systems.load_pabee(spec)(texts) == expected


def test_rounds_are_kept_and_what_failed_is_listed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["fpabee-full-depth", "fpabee-balanced", "pipeline", "model2vec", "cascade"]
    tried: list[str] = []
    versions = {"torch": "2"}

    def measure(system: System, inputs: dict[str, Any], work: Path) -> dict[str, Any]:
        tried.append(system.name)
        if system.name == "model2vec" and tried.count("model2vec") == 1:
            raise RuntimeError("no space left")
        slow = 1 + tried.count(system.name) * (system.name == "cascade")
        return {**MEASURED, "rows_per_s": 400.0 / slow, "versions": dict(versions)}

    monkeypatch.setattr(peers, "train_run", lambda *arguments: arguments[-1])
    monkeypatch.setattr("conversions.teach", lambda *arguments: arguments[-1] / "classifier")
    monkeypatch.setattr(peers, "decisions_of", lambda *arguments: arguments[-1] / "decisions.json")
    target = {"target": "fast"}
    systems = [System(name, "torch", settings=target) for name in names]
    monkeypatch.setattr(peers, "systems", lambda *_: systems)
    monkeypatch.setattr(peers, "measure", measure)
    results = tmp_path / "peers.json"
    command = ["--data", str(tmp_path), "--work", str(tmp_path), "--only", "mini-trec-exit-0"]
    command += ["--results", str(results), "--rounds"]

    def table(rounds: int, *options: str) -> str:
        printed(peers.main, *command, rounds, *options)
        return results.with_suffix(".md").read_text()

    def refusal(rounds: int) -> str:
        result = invoke(peers.main, *command, rounds)
        assert result.exit_code == 1
        return result.stderr

    assert "| model2vec | 0 | failed: no space left |" in table(1)
    assert tried == [*names[1:], names[0]], "each round begins with another system"
    table(1, "--kind", "pipeline")
    assert len(tried) == 5
    assert "failed" not in table(2)
    assert tried.count("model2vec") == 3
    found = table(2)
    assert len(tried) == 11
    assert "fpabee in fast" in found
    # Twice and three times as slow as the reference in the same round.
    assert (
        "| cascade | 2 | 0.5000 | 1 |  | 167 | 0.42 (0.33 to 0.50) | 2.00 | 1.00 (1.00 to 1.00)"
        in found
    )
    assert "`transformers.pipeline`, `fast` | 50.0 % | 1 | 400 | 1.0 | 2.0 ms |" in found
    assert "| **fpabee, trained with exits**, `fast` | 50.0 % |  | 400 | 1.0 | 2.0 ms |" in found
    versions["torch"] = "3"
    assert "with the versions {'torch': '2'}, but this run" in refusal(3)
    target["target"] = "other"
    assert (
        "has rounds of model2vec with the target fast, but this run measures with other"
        in refusal(3)
    )


def test_the_picture_names_every_point(tmp_path: Path) -> None:
    results = reproduce.RESULTS / "peers.json"
    printed(picture.main, results, tmp_path / "assets")
    names = {label for label, _ in (picture.OWN | picture.CONVERTED | picture.OTHERS).values()}
    for theme in picture.THEMES:
        text = (tmp_path / "assets" / f"score-{theme}.svg").read_text(encoding="utf-8")
        assert {name for name in names if f">{name}</text>" in text} == names
