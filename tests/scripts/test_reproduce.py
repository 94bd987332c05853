"""The comparison of the paper: settings from dev, scores from test, tables from stored runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import LabelledLogits
from fpabee.runtime import ProblemType
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
    text = "\n".join(reproduce.tables(tmp_path, reproduce.RUNS))
    assert "| fpabee | - | 91.00 ± 1.41 (51 %) | - |" in text
    assert "95.00 ± 0.00, 20 test rows" in text
    assert "seeds 42, 43" in text
    assert "| entropy | - | - | - |" in text
    assert "| mini-sst2 | - / +1.00 / - | - / - / - |" in text
    reproduce.draw(tmp_path, "mini-sst2", tmp_path / "figure.svg")
    assert "fpabee" in (tmp_path / "figure.svg").read_text()


def test_a_distilled_model_is_compared_with_the_one_of_its_seed(
    reproduce: ModuleType, tmp_path: Path, store: Callable[..., None]
) -> None:
    store("mini-sst2", 42, [0.5, 0.9], [("fpabee", 0.8), ("entropy", 0.8)])
    store("mini-sst2", 43, [0.6, 0.9], [("fpabee", 0.8), ("entropy", 0.8)])
    store("mini-sst2", 44, [0.9, 0.1], [("fpabee", 0.1), ("entropy", 0.1)])
    store("mini-sst2-distill", 42, [0.53, 0.9], [("fpabee", 0.82), ("entropy", 0.81)])
    store("mini-sst2-distill", 43, [0.61, 0.89], [("fpabee", 0.81)])
    store("mini-trec-distill", 42, [0.53, 0.9], [("fpabee", 0.82)])  # nothing to compare it with
    lines = list(reproduce.tables(tmp_path, reproduce.RUNS))
    start = lines.index("## The effect of self-distillation")
    section = lines[start : lines.index("## mini-sst2")]
    (row,) = [line for line in section if line.startswith("| mini")]
    assert row == "| mini-sst2-distill | 2 | +2.00 -0.50 | - / +1.50 / - | - / - / - |"
    assert "seeds 42, 43, 44; " in lines[lines.index("## mini-sst2") + 2], "only its own runs"


def test_every_stored_run_is_a_planned_one(reproduce: ModuleType) -> None:
    for path in (SCRIPT.parent / "results" / "runs").glob("*.json"):
        run = json.loads(path.read_text())
        assert path.stem == f"{run['name']}-{run['seed']}"
        assert run["name"] in reproduce.RUNS
