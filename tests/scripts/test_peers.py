"""The comparison with alternatives: in fresh processes, resumed, and drawn without what failed."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from fpabee.calibration import CalibrationOptions
from fpabee.runtime import Budget, Engine, ExitRule, Pabee

TEXTS = ["turn on the light", "is it not a good film", "book a table", "play music"]
MEASURED = {"score": 0.5, "rows": 4, "median_ms": 2.0, "p99_ms": 3.0, "rows_per_s": 400.0}
MEASURED |= {"memory_mib": 100.0, "start_up_s": 1.0}


@pytest.fixture(scope="module")
def peers(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("peers")


@pytest.fixture
def data(tmp_path: Path, engines: Mapping[str, Path]) -> Path:
    """A folder of data sets, with three of four labels as the model has them at full depth."""
    with Engine.load(engines["bert"]) as engine:
        labels = [row.labels[0] for row in engine.predict(TEXTS, full_depth=True)]
        labels[0] = next(name for name in engine.labels if name != labels[0])
    folder = tmp_path / "data" / "trec"
    folder.mkdir(parents=True)
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        for text, label in zip(TEXTS, labels, strict=True):
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return folder.parent


def test_an_alternative_is_measured_in_a_fresh_process(
    peers: ModuleType, data: Path, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    engines_folder = str(engines["bert"])
    given: dict[str, Any] = {"model": "m", "engines": engines_folder, "threads": 1, "rows": None}
    given["data"] = str(data / "trec")
    settings = {"target": "onnxruntime-fp32", "point": None}
    other = peers.Alternative("fpabee-full-depth", "fpabee", "", settings)
    found = peers.measure(other, given, tmp_path)
    assert (found["score"], found["rows"]) == (0.75, 4)
    assert 0 < found["median_ms"] <= found["p99_ms"]
    assert min(found[key] for key in ("rows_per_s", "memory_mib", "start_up_s")) > 0
    wrong = peers.Alternative("other", "fpabee", "", settings | {"point": "none such"})
    with pytest.raises(RuntimeError, match="no operating point 'none such'"):
        peers.measure(wrong, given, tmp_path)


@pytest.mark.parametrize("rule", [Pabee(patience=1), Budget(exit=3)])
def test_pabee_stops_as_a_rule_that_is_chosen_without_exit_0(
    peers: ModuleType,
    load_script: Callable[[str], ModuleType],
    tiny_models: Mapping[str, Path],
    exit_0_engines: Mapping[str, Path],
    set_points: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: ExitRule,
) -> None:
    calibrated = []

    def calibrate(folder: Path, data: Path, options: CalibrationOptions) -> SimpleNamespace:
        calibrated.append((folder, data, options.rules))
        return SimpleNamespace(points=[SimpleNamespace(rule=rule)])

    monkeypatch.setattr(peers, "calibrate", calibrate)
    child = load_script("peers_child")
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    set_points(folder, **dict.fromkeys(peers.CURVE, Budget(exit=1)))
    found = {other.name: other.settings for other in peers.alternatives(folder, tmp_path, {})}
    ((plain, data, rules),) = calibrated
    assert (data, rules) == (tmp_path / "dev.jsonl.gz", ("pabee",))
    spec = child.Specification(model=tiny_models["bert"], engines=folder, **found["pabee"])
    texts = [*TEXTS, "rain", "the sun", "call mum", "a bad film in the morning"]
    with Engine.load(plain) as engine:
        assert 0 not in engine.manifest.exits
        expected, first = (
            [row.labels[0] for row in engine.predict(texts, rule=each)]
            for each in (rule, Budget(exit=1))
        )
    assert expected != first
    assert child.load_pabee(spec)(texts) == expected


def test_what_is_done_is_kept_and_what_failed_is_listed_and_tried_again(
    peers: ModuleType,
    load_script: Callable[[str], ModuleType],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["fpabee-full-depth", "fpabee-balanced", "onnx-int8", "setfit"]
    tried: list[str] = []

    def measure(other: Any, given: dict[str, Any], work: Path) -> dict[str, Any]:
        tried.append(other.name)
        if other.name == "setfit" and tried.count("setfit") == 1:
            raise RuntimeError("no space left")
        return {**MEASURED, "median_ms": 1.0 + len(tried)}

    for name in ("train_run", "cut_encoders", "engines_of"):
        monkeypatch.setattr(peers, name, lambda *_: tmp_path)
    monkeypatch.setattr(
        peers, "alternatives", lambda *_: [peers.Alternative(name, "torch") for name in names]
    )
    monkeypatch.setattr(peers, "measure", measure)
    results = tmp_path / "results"
    command = ["--data", str(data), "--work", str(tmp_path), "--only", "trec"]
    command += ["--results", str(results)]
    assert CliRunner().invoke(peers.main, command).exit_code == 0
    assert tried == names
    assert "| setfit | failed: no space left |" in (results / "table.md").read_text()
    assert CliRunner().invoke(peers.main, [*command, "--kind", "onnx-int8"]).exit_code == 0
    assert tried == names
    picture = load_script("picture")
    drawn = CliRunner().invoke(picture.main, [str(results), str(tmp_path / "assets")])
    assert drawn.exit_code == 0, drawn.output
    light = (tmp_path / "assets" / "score-light.svg").read_text(encoding="utf-8")
    assert "onnx-int8" in light
    assert "setfit" not in light
    assert CliRunner().invoke(peers.main, command).exit_code == 0
    assert tried == [*names, "setfit"]
    assert "failed" not in (results / "table.md").read_text()
    nothing = CliRunner().invoke(picture.main, [str(tmp_path / "none"), str(tmp_path)])
    assert nothing.exit_code == 1
    assert "has no results -> run scripts/peers.py first" in nothing.stderr
