"""Synthetic traces, and calibrations of tiny engines folders without measured times."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration import Calibration, CalibrationOptions, calibrate
from fpabee.calibration.choose import Search
from fpabee.calibration.costs import StoppingCosts
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.settings import settings_lists
from fpabee.calibration.timing import CostModel, Speed
from fpabee.runtime import Engine, ProblemType
from fpabee.runtime.files import Row

from ..conftest import WORDS
from ..programs import write_lines


def make_rows(
    count: int = 600,
    exits: int = 6,
    labels: int = 3,
    problem_type: ProblemType = ProblemType.SINGLE_LABEL,
    seed: int = 0,
) -> LabelledLogits:
    """A trace whose deeper exits are surer and more often right, with its labels."""
    generator = np.random.default_rng(seed)
    ease = generator.uniform(0.3, 2.0, size=count)
    noise = generator.normal(size=(exits, count, labels)).cumsum(axis=0)
    noise /= np.sqrt(np.arange(1, exits + 1))[:, None, None]
    depth = np.linspace(0.5, 3.0, exits)[:, None, None] * ease[:, None]
    towards: NDArray[np.floating[Any]]
    if problem_type is ProblemType.SINGLE_LABEL:
        truth = generator.integers(0, labels, count)
        towards = 2 * np.eye(labels)[truth]
    else:
        truth = generator.integers(0, 2, (count, labels))
        towards = np.asarray(2.0 * truth - 1)
    logits = (towards * depth + noise).astype(np.float32)
    lengths = generator.integers(5, 40, count)
    return LabelledLogits(logits, lengths.astype(np.intp), truth, problem_type)


def with_costs(rows: LabelledLogits, metric: str = "accuracy") -> StoppingCosts:
    """Rows whose every exit takes a second, and exit 0 a hundredth of it."""
    costs = np.repeat(np.maximum(rows.exits, 0.01)[:, None], len(rows), axis=1)
    return StoppingCosts(rows, metric, costs)


def search_on(rows: LabelledLogits, metric: str = "accuracy") -> Search:
    """The settings that calibration tries on some rows."""
    return Search(with_costs(rows, metric), settings_lists(rows))


def label_rows(folder: Path, count: int = 120, seed: int = 0) -> list[Row]:
    """Random texts, most of them labelled as the model labels them at full depth."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(count)]
    with Engine.load(folder, threads=1) as engine:
        answers = [prediction.labels for prediction in engine.predict(texts, full_depth=True)]
        names = engine.labels
    return [
        Row(
            text,
            None,
            answer if generator.random() > 0.15 else (generator.choice(names),),
            {},
            f"line {n}",
        )
        for n, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)
    ]


def write(rows: Sequence[Row], path: Path) -> Path:
    """Rows as JSON lines."""
    return write_lines(path, [{"text": row.text, "labels": row.labels} for row in rows])


def fix_times(patch: pytest.MonkeyPatch) -> None:
    """Every segment takes a second per row, and every rule is 1.25 times as fast as full depth."""

    def models(engines: Sequence[Engine], *_: Any) -> list[CostModel]:
        return [CostModel((1,), ((1.0,),) * len(engine.core.exits)) for engine in engines]

    def speedup(engine: Engine, rows: Any, rule: Any, layers: Any, batch: int) -> Speed:
        return Speed(1.25, 1.0)

    module = import_module("fpabee.calibration.calibrate")
    patch.setattr(module, "measure_costs", models)
    patch.setattr(module, "measure_speedup", speedup)


@pytest.fixture(scope="session")
def test_file(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other rows of the first tiny model to judge points on."""
    return write(
        label_rows(engines["bert"], count=90, seed=1),
        tmp_path_factory.mktemp("rows") / "test.jsonl",
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not measured but fixed, see `fix_times`."""
    fix_times(monkeypatch)


@pytest.fixture(scope="session")
def calibrated(
    engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Calibration]]:
    """Calibrates a copy of a tiny engines folder; the same options give the same result."""
    known: dict[str, Calibration] = {}

    def run(family: str = "bert", count: int = 150, **options: Any) -> Calibration:
        key = str((family, count, options))
        if key not in known:
            place = tmp_path_factory.mktemp("calibrated") / "engines"
            folder = Path(shutil.copytree(engines[family], place))
            rows = label_rows(folder, count)
            known[key] = calibrate(folder, rows, CalibrationOptions(threads=1, **options))
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        fix_times(patch)
        yield run


def two_exits(changed: NDArray[np.bool_], truth: NDArray[np.int64] | None = None) -> LabelledLogits:
    """Rows that the last exit gets right; the first exit does where nothing changed."""
    truth = np.zeros(len(changed), np.int64) if truth is None else truth
    right = 3 * np.eye(2, dtype=np.float32)[truth]
    logits = np.stack([np.where(changed[:, None], right[:, ::-1], right), right])
    lengths = np.full(len(changed), 9, np.intp)
    return LabelledLogits(logits, lengths, truth, ProblemType.SINGLE_LABEL)
