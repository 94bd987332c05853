"""The comparison of the paper: settings from dev, scores from test, tables from stored runs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from tests.conftest import WORDS

from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import LabelledLogits
from fpabee.exporter import ExportOptions, export
from fpabee.exporter.training import TrainOptions
from fpabee.runtime import Engine, ProblemType, read_manifest
from fpabee.runtime.rules.base import ExitRule

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.py"
LAYERS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def reproduce(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce")


def make(seed: int) -> LabelledLogits:
    """Rows whose logits become more certain with depth."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 3, 200)
    depth = np.linspace(0.5, 3, len(LAYERS))[:, None, None]
    noise = generator.normal(size=(len(LAYERS), 200, 3))
    logits = (2 * np.eye(3)[truth] * depth + noise).astype(np.float32)
    return LabelledLogits(logits, np.full(200, 9, np.intp), truth, ProblemType.SINGLE_LABEL)


def test_settings_save_enough_on_dev_and_are_evaluated_on_test(reproduce: ModuleType) -> None:
    dev, test = make(0), make(1)
    content = reproduce.compare(dev, test, LAYERS)
    right = (test.logits.argmax(axis=-1) == test.expected).mean(axis=1)
    assert content["exits"] == pytest.approx(right)
    assert {setting["kind"] for setting in content["settings"]} >= {"fpabee", "pabee", "entropy"}
    for setting in content["settings"]:
        rule = ExitRule.from_dict(setting["rule"])
        assert np.mean(exits_of(rule, dev)) <= 4 * (1 - setting["wished"]) + 1e-9
        exits = exits_of(rule, test)
        assert setting["saving"] == pytest.approx(1 - exits.mean() / 4)
        answers = test.logits.argmax(axis=-1)[exits - 1, np.arange(200)]
        assert setting["score"] == pytest.approx((answers == test.expected).mean())


Settings = list[tuple[str, float]]


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., None]:
    """Stores a run with these scores of rules that save half of the layers."""

    def write(name: str, seed: int, exits: list[float], settings: Settings) -> None:
        half = {"wished": 0.5, "rule": {}, "saving": 0.51}
        run = {
            **{"name": name, "seed": seed, "command": "python scripts/reproduce.py"},
            **{"metric": "accuracy", "rows": {"dev": 10, "test": 20}, "exits": exits},
            "settings": [{**half, "kind": kind, "score": score} for kind, score in settings],
        }
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(run))

    return write


def test_a_table_has_means_over_seeds(
    reproduce: ModuleType, tmp_path: Path, store: Callable[..., None]
) -> None:
    # Only rules with a setting for every seed are compared.
    store("mini-sst2", 42, [0.5, 0.95], [("fpabee", 0.90), ("pabee", 0.89), ("entropy", 0.5)])
    store("mini-sst2", 43, [0.5, 0.95], [("fpabee", 0.92), ("pabee", 0.91)])
    text = reproduce.tables(tmp_path, reproduce.RUNS)
    assert "| fpabee | - | 91.00 ± 1.41 (51 %) | - |" in text
    assert "95.00 ± 0.00, 20 test rows" in text
    assert "seeds 42, 43" in text
    assert "| entropy | - | - | - |" in text
    assert "| mini-sst2 | - / +1.00 / - | - / - / - |" in text


def test_a_distilled_model_is_compared_with_the_one_of_its_seed(
    reproduce: ModuleType, tmp_path: Path, store: Callable[..., None]
) -> None:
    store("mini-sst2", 42, [0.5, 0.9], [("fpabee", 0.8), ("entropy", 0.8)])
    store("mini-sst2", 43, [0.6, 0.9], [("fpabee", 0.8), ("entropy", 0.8)])
    store("mini-sst2", 44, [0.9, 0.1], [("fpabee", 0.1), ("entropy", 0.1)])
    store("mini-sst2-distill", 42, [0.53, 0.9], [("fpabee", 0.82), ("entropy", 0.81)])
    store("mini-sst2-distill", 43, [0.61, 0.89], [("fpabee", 0.81)])
    store("mini-trec-distill", 42, [0.53, 0.9], [("fpabee", 0.82)])  # nothing to compare it with
    lines = reproduce.tables(tmp_path, reproduce.RUNS).splitlines()
    start = lines.index("## The effect of self-distillation")
    section = lines[start : lines.index("## mini-sst2")]
    (row,) = [line for line in section if line.startswith("| mini")]
    assert row == "| mini-sst2-distill | 2 | +2.00 -0.50 | - / +1.50 / - | - / - / - |"
    assert "seeds 42, 43, 44; " in lines[lines.index("## mini-sst2") + 2], "only its own runs"


def test_every_stored_run_is_a_planned_one(reproduce: ModuleType) -> None:
    for path in (SCRIPT.parent / "results").glob("*/*.json"):
        run = json.loads(path.read_text())
        assert path.stem == f"{run['name']}-{run['seed']}"
        assert run["name"] in reproduce.RUNS


def test_the_cascade_competes_and_exit_0_costs_no_layer(reproduce: ModuleType) -> None:
    dev, test = (dataclasses.replace(make(seed), first_exit=0) for seed in (0, 1))
    content = reproduce.compare(dev, test, [0, 1, 2, 3])
    assert {setting["kind"] for setting in content["settings"]} >= {"fpabee", "cascade"}
    for setting in content["settings"]:
        exits = exits_of(ExitRule.from_dict(setting["rule"]), test)
        assert setting["saving"] == pytest.approx(1 - exits.mean() / 3)
        answers = test.logits.argmax(axis=-1)[exits, np.arange(200)]
        assert setting["score"] == pytest.approx((answers == test.expected).mean())


@pytest.fixture
def trained(
    reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, TrainOptions]]:
    """The folders that would have been trained, by name, and how."""
    found = []

    def train(folder: Path, options: TrainOptions, *_: object) -> None:
        found.append((folder.name, options))
        folder.mkdir(exist_ok=True)
        (folder / "training.json").write_text("{}")

    monkeypatch.setattr(reproduce, "train", train)
    return found


def test_only_runs_named_so_have_exit_0(
    reproduce: ModuleType, tmp_path: Path, trained: list[tuple[str, TrainOptions]]
) -> None:
    for name, run in reproduce.RUNS.items():
        reproduce.train_run(run, 7, tmp_path, "backbone", tmp_path / name, "")
        options = trained[-1][1]
        assert options.exit_0 is name.endswith("-exit-0")
        assert options.distill == (0.5 if name.endswith(("-exit-0", "-distill")) else 0)
    # A model that was trained without exit 0 gets it, and keeps its encoder.
    before = len(trained)
    for name in ("mini-sst2", "mini-sst2-exit-0"):
        reproduce.train_run(reproduce.RUNS[name], 7, tmp_path, "backbone", tmp_path / name, "")
    assert [options.exit_0_only for _, options in trained[before:]] == [True]


def test_a_cut_encoder_has_one_exit_after_its_last_layer(
    reproduce: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: list[tuple[str, TrainOptions]],
) -> None:
    monkeypatch.setattr(reproduce, "engines_of", lambda folder: folder)
    arguments = ("mini-trec-exit-0", 42, tmp_path, "backbone", tmp_path)
    assert reproduce.cut_encoders(*arguments, is_trained=False) == {}
    found = reproduce.cut_encoders(*arguments, is_trained=True)
    exits = [(name, options.exits) for name, options in trained]
    assert exits == [(f"mini-trec-cut-{layers}-42", (layers,)) for layers in (1, 2, 3)]
    assert found == reproduce.cut_encoders(*arguments, is_trained=False)
    assert list(found) == [1, 2, 3]


@pytest.fixture(scope="module")
def compared(
    exit_0_engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    load_script: Callable[[str], ModuleType],
) -> dict[str, Any]:
    """A calibrated tiny model, and how it compares with what people would do instead."""
    alternatives, root = load_script("reproduce_alternatives"), tmp_path_factory.mktemp("tiny")
    folder = Path(shutil.copytree(exit_0_engines["bert"], root / "engines"))
    texts = [" ".join(random.Random(n).choices(WORDS, k=n % 9 + 2)) for n in range(800)]
    with Engine.load(folder, threads=1) as engine:
        labels = [answer.labels[0] for answer in engine.predict(texts, full_depth=True)]
    files = root / "dev.jsonl", root / "test.jsonl"
    for number, path in enumerate(files):
        rows = list(zip(texts, labels, strict=True))[number::2]
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        path.write_text("\n".join(lines))
    export(tiny_models["bert"], root / "cut", ExportOptions(exits=(1,)))
    (root / "other.jsonl").write_text('{"text": "zzz"}\n' * 240)
    shifted = {"same": files[1], "other": root / "other.jsonl"}
    found: dict[str, Any] = alternatives.compare_alternatives(
        folder, *files, {1: root / "cut"}, shifted, 1
    )
    return found


def test_a_copy_without_exit_0_is_complete_or_not_there(
    exit_0_engines: Mapping[str, Path],
    tmp_path: Path,
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alternatives = load_script("reproduce_alternatives")
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    with monkeypatch.context() as patch:
        patch.setattr(alternatives, "write_manifest", None)  # fails, as if interrupted
        with pytest.raises(TypeError):
            alternatives.without_exit_0(folder)
    copy = alternatives.without_exit_0(folder)
    assert read_manifest(copy).exits == range(1, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"engines", "engines-without-exit-0"}


def test_exits_are_compared_with_alternatives(compared: dict[str, Any]) -> None:
    systems = {system["name"]: system for system in compared["systems"]}
    assert list(systems)[:3] == ["full depth", "balanced", "balanced, without exit 0"]
    assert (systems["full depth"]["score"], systems["full depth"]["layers"]) == (1.0, 3.0)
    assert (systems["exit 0 alone"]["layers"], systems["exit 0 alone"]["exit_0"]) == (0.0, 1.0)
    cascade = systems["cascade"]
    assert cascade["layers"] == pytest.approx(3 * (1 - cascade["exit_0"]))
    assert systems["cut to 1"]["layers"] == 1.0
    assert systems["balanced, without exit 0"]["exit_0"] == 0.0
    assert systems["balanced"]["layers"] < systems["balanced, without exit 0"]["layers"]
    for system in systems.values():
        assert min(system["median_ms"], system["mean_ms"], system["rows_per_s"]) > 0


def test_a_shift_shows_in_agreement_and_drift(compared: dict[str, Any]) -> None:
    found = {(shift["rule"], shift["texts"]): shift for shift in compared["shift"]}
    same, other = (found["balanced", texts] for texts in ("same", "other"))
    assert (same["rows"], other["rows"]) == (400, 240)
    # Which rule is chosen depends on measured times. Exit 0 answers fewer of the other texts.
    assert other["exit_0"] <= same["exit_0"]
    assert 0 <= same["drift"] < 0.25
    assert 0 < same["by_chance"] < other["by_chance"]
    assert 0 < same["agreement"] <= 1


def test_the_table_of_alternatives_has_targets_and_shifts(
    reproduce: ModuleType, tmp_path: Path
) -> None:
    names = ("full depth", "balanced", "balanced, without exit 0", "model2vec 0.10.0")
    for seed, layers in ((42, 1.0), (43, 2.0)):
        times = {"median_ms": 0.5, "mean_ms": 1.5, "rows_per_s": 900.0}
        systems = [
            {"name": name, "score": score, "layers": depth, **times}
            for name, score, depth in zip(
                names, (0.9, 0.895, 0.89, 0.7), (6, layers, 3, 0), strict=True
            )
        ]
        run = {
            **{"name": "mini-trec-exit-0", "seed": seed, "command": "x", "hardware": "a machine"},
            **{"metric": "accuracy", "layers": 6, "versions": {"torch": "2"}},
            "systems": systems if seed == 42 else systems[:3],
            "shift": [{"rule": "cascade", "texts": "cola", "rows": 5, "drift": 0.25}],
        }
        (tmp_path / f"{seed}.json").write_text(json.dumps(run))
    text = reproduce.alternatives(tmp_path, reproduce.RUNS)
    lines = text.splitlines()
    assert "| mini-trec-exit-0 | 2 | 3.9x | 4.50x | +0.50 | 2.00x | +1.00 |" in lines
    assert "| balanced | 0.8950 | 1.50 | 0% | 0.50 | 1.50 | 900 |" in lines
    assert any(line.startswith("| model2vec 0.10.0 (1 seeds) | 0.7000") for line in lines)
    assert "| 43 | cascade | cola | 5 | 0.250 |" in lines
    assert "seeds 42, 43.\na machine; torch 2.\n" in text


@pytest.mark.slow
def test_a_model_that_was_trained_elsewhere_gets_exit_0_and_is_compared(
    reproduce: ModuleType,
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "work" / "mini-sst2-exit-0-42"
    shutil.copytree(tiny_models["bert"], model)
    options = dict.fromkeys(("epochs", "lr", "distill", "bf16"), 0)
    (model / "training.json").write_text(json.dumps({"options": options, "train_seconds": 1}))
    for data in ("sst2", "mrpc", "cola"):
        (tmp_path / data).mkdir()
        for part in ("train", "dev", "test"):
            rows = [
                {
                    "text": " ".join(WORDS[n % 30 : n % 30 + n % 4 + 1]),
                    "label": ("music", "alarm")[n % 2],
                }
                for n in range(90)
            ]
            with gzip.open(tmp_path / data / f"{part}.jsonl.gz", "wt") as file:
                file.write("\n".join(map(json.dumps, rows)))
    other = {"score": 0.5, "layers": 0, "median_ms": 1, "mean_ms": 1, "rows_per_s": 1}
    monkeypatch.setattr(reproduce, "static_model", lambda *_: {"name": "model2vec", **other})
    command = ["--only", "mini-sst2-exit-0", "--seed", 42, "--no-train-cuts", "--threads", 1]
    command += ["--minilm", model]
    command += ["--data", tmp_path, "--work", tmp_path / "work", "--results", tmp_path / "results"]
    for _ in range(2):
        result = CliRunner().invoke(reproduce.main, [str(word) for word in command])
        assert result.exit_code == 0, result.output
        monkeypatch.setattr(reproduce, "compare_alternatives", None)  # not called again
    text = (tmp_path / "results" / "alternatives.md").read_text()
    for start in ("| balanced |", "| cascade |", "| model2vec |", "| 42 | balanced | cola |"):
        assert f"\n{start}" in text
    assert "| cascade |" in (tmp_path / "results" / "table.md").read_text()


class Bag:
    """A stand-in for a static model: which words a text has."""

    def encode(self, texts: list[str]) -> NDArray[np.float64]:
        return np.array([[text.split().count(word) for word in WORDS] for text in texts], float)


@pytest.mark.parametrize("form", ["single", "pairs", "multi"])
def test_a_classifier_is_trained_on_static_vectors(
    load_script: Callable[[str], ModuleType], tmp_path: Path, form: str
) -> None:
    pytest.importorskip("sklearn")
    draw = random.Random(0)
    for part, count in (("train", 200), ("dev", 40), ("test", 40)):
        rows = []
        for _ in range(count):
            words = draw.choices(WORDS, k=4)
            row: dict[str, Any] = {"text": " ".join(words)}
            if form == "multi":
                row["labels"] = [word for word in ("good", "bad") if word in words]
            else:
                row["label"] = str("good" in words)
            if form == "pairs":
                other = row["text"] if draw.random() < 0.5 else " ".join(draw.choices(WORDS, k=4))
                row |= {"text_pair": other, "label": str(other == row["text"])}
            rows.append(json.dumps(row))
        with gzip.open(tmp_path / f"{part}.jsonl.gz", "wt") as file:
            file.write("\n".join(rows))
    _, score, rows = load_script("reproduce_static").fit(Bag(), tmp_path)
    assert score > 0.9
    assert len(rows) == 40
