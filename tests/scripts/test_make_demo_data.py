from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

SIZES = {"train": 320, "dev": 80, "test": 81}
TASKS = ("single", "multi")


@pytest.fixture(scope="module")
def demo(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("make_demo_data")


def run(demo: ModuleType, folder: Path, seed: int = 7) -> Path:
    sizes = [f"--{split}-rows={rows}" for split, rows in SIZES.items()]
    result = CliRunner().invoke(demo.main, [str(folder), "--seed", str(seed), *sizes])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def data(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(demo, tmp_path_factory.mktemp("data"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rows(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    text = (folder / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def texts(folder: Path, task: str, split: str) -> list[str]:
    return [row["text"].casefold() for row in rows(folder, task, split)]


def labels_of(row: dict[str, Any]) -> list[str]:
    return row["labels"] if "labels" in row else [row["label"]]


def test_same_seed_same_bytes(demo: ModuleType, data: Path, tmp_path: Path) -> None:
    assert contents(run(demo, tmp_path)) == contents(data)


def test_other_seed_other_sentences(demo: ModuleType, data: Path, tmp_path: Path) -> None:
    first, second = contents(data), contents(run(demo, tmp_path, seed=8))
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {name for name in first if not name.endswith("labels.json")}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SIZES)
def test_rows_and_labels(data: Path, task: str, split: str) -> None:
    known = json.loads((data / task / "labels.json").read_text(encoding="utf-8"))
    assert len(known) == len(set(known)) >= 10
    found = rows(data, task, split)
    assert len(found) == SIZES[split]
    assert {label for row in found for label in labels_of(row)} == set(known)
    for row in found:
        labels = labels_of(row)
        assert labels == [label for label in known if label in labels]
        assert set(row) == {"text", "label" if task == "single" else "labels"}
        assert row["text"] == row["text"].strip()
        assert not set(row["text"]) & set("{}\n")


def test_multi_has_one_to_three_labels(data: Path) -> None:
    for split in SIZES:
        assert {len(row["labels"]) for row in rows(data, "multi", split)} == {1, 2, 3}


@pytest.mark.parametrize("task", TASKS)
def test_no_sentence_twice_in_a_task(data: Path, task: str) -> None:
    counts = Counter(text for split in SIZES for text in texts(data, task, split))
    assert max(counts.values()) == 1


def test_tasks_share_sentences_only_within_a_split(data: Path) -> None:
    for split in SIZES:
        others = [other for other in SIZES if other != split]
        single = set(texts(data, "single", split))
        for other in others:
            assert single.isdisjoint(texts(data, "multi", other))


def test_demo_texts_are_new(demo: ModuleType, data: Path) -> None:
    lines = (data / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == demo.DEMO_TEXTS
    seen = {text for task in TASKS for split in SIZES for text in texts(data, task, split)}
    assert seen.isdisjoint(line.casefold() for line in lines)


@pytest.mark.parametrize("split", SIZES)
def test_every_tier_is_present(demo: ModuleType, split: str) -> None:
    built = demo.build_split("single", split, 400, 7, demo.Registry())
    counts = Counter(utterance.tier for utterance in built)
    assert set(counts) == set(demo.Tier)
    for tier, share in demo.TIER_SHARES.items():
        assert counts[tier] / 400 == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("tier", ["EASY", "MEDIUM", "HARD", "AMBIGUOUS"])
def test_every_intent_has_every_tier(demo: ModuleType, tier: str) -> None:
    writer = demo.Writer(random.Random(1), held_out=True)
    for label in demo.LABELS:
        assert writer.single(label, demo.Tier[tier]).labels == (label,)


def test_train_never_sees_held_out_values(demo: ModuleType, data: Path) -> None:
    used = {split: " ".join(texts(data, "single", split)) for split in SIZES}
    shared, held_out = demo.split_slot("city")
    assert shared
    assert not any(city in used["train"] for city in held_out)
    assert any(city in used["dev"] + used["test"] for city in held_out)


def test_typo_edits_one_word(demo: ModuleType) -> None:
    rng = random.Random(3)
    for _ in range(200):
        old, new = "set the alarm", demo.with_typo("set the alarm", rng)
        assert new.startswith("set the ")
        assert abs(len(new) - len(old)) <= 1
    assert demo.with_typo("it is so", rng) == "it is so"


def test_too_few_rows_are_refused(demo: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.main, [str(tmp_path), "--dev-rows", "3"])
    assert result.exit_code == 2
    assert "--dev-rows" in result.output
