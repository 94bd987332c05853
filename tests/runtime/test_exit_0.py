"""Exit 0: its n-grams, its file, and what the engine does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.runtime import (
    ArtifactError,
    Budget,
    CheckError,
    Confidence,
    Engine,
    ExitRule,
    FPabee,
    Pabee,
    RuleError,
    read_manifest,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import EXIT_0_NAME
from fpabee.runtime.encoding import EncodedRow
from fpabee.runtime.exit_0 import ExitZero, ngrams

from ..closeness import assert_close
from ..conftest import WORDS, add_exit_0, correct_reference, set_exit_0

TEXTS = [" ".join(WORDS[start : start + 6]) for start in range(24)]


@pytest.fixture(scope="module")
def engine(exit_0_engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(exit_0_engines["bert"], threads=1) as engine:
        yield engine


@pytest.fixture
def folder(engine_copy: Callable[..., Path]) -> Path:
    return engine_copy(exit_0=True)


def row(*ids: int, pair_start: int | None = None) -> EncodedRow:
    tokens = np.array(ids, np.int64)
    return EncodedRow(tokens, np.zeros_like(tokens), False, pair_start)


def found(one: EncodedRow, unigrams: int = 50, buckets: int = 1024) -> list[int]:
    return list(ngrams([one], unigrams, buckets)[0])


def test_every_token_gives_a_unigram_and_a_bigram() -> None:
    single, count = ngrams([row(7, 8, 9)], 50, 1024)
    assert count.tolist() == [6]
    assert single[::2].tolist() == [7, 8, 9]
    assert (single[1::2] >= 50).all()
    assert (single[1::2] < 50 + 1024).all()
    # The last token is followed by the end, and not by the first token of the next row.
    assert found(row(7, 8, 9))[1:4] == [*found(row(7, 8))[1:2], 8, *found(row(8, 9))[1:2]]
    assert found(row(9))[1] == found(row(8, 9))[3]


def test_rows_of_a_batch_have_the_ngrams_that_they_have_alone() -> None:
    rows = [row(7, 8, 9), row(3), row(7, 8, 3, 4, pair_start=2), row(1, 2)]
    together, counts = ngrams(rows, 50, 1024)
    assert together.tolist() == [number for one in rows for number in found(one)]
    assert counts.tolist() == [6, 2, 8, 4]


class _Careless(np.ndarray[Any, Any]):
    """Its products set flags of numbers that they do not use, as those of OpenBLAS on some CPUs."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        np.divide(np.float32(1), np.float32(0))
        plain = [np.asarray(each) for each in inputs]
        return getattr(ufunc, method)(*plain, **options)


def test_flags_of_the_processor_are_no_warnings() -> None:
    table = np.ones((8, 2), np.float16)
    exit_0 = ExitZero(4, table, np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    exit_0.weights = exit_0.weights.view(_Careless)
    assert exit_0([row(1, 2)]).tolist() == [[1.0, 1.0]]


def test_the_two_texts_of_a_pair_have_ngrams_of_their_own() -> None:
    pair = found(row(7, 8, 7, 8, pair_start=2))
    assert pair[0] == 7
    assert pair[4] >= 50
    assert len(set(pair)) == len(pair)
    assert found(row(7, 8, 9)) != found(row(7, 8, 9, pair_start=2))


def test_hashes_never_change() -> None:
    # Tables that were trained before would otherwise be read wrongly.
    assert found(row(101, 2023, 102), 30522, 65536) == [101, 81288, 2023, 37001, 102, 90588]
    assert found(row(101, 9, 9, 102, pair_start=2), 30522, 65536)[4:] == [
        54819,
        93822,
        39927,
        78273,
    ]


def test_a_large_vocabulary_shares_the_rows_of_unigrams() -> None:
    assert found(row(249_999, 5), 65536, 1024)[::2] == [249_999 % 65536, 5]


def test_logits_are_the_mean_of_vectors_then_a_linear_layer() -> None:
    generator = np.random.default_rng(1)
    table = generator.normal(size=(50 + 64, 8)).astype(np.float16)
    weights = generator.normal(size=(8, 3)).astype(np.float32)
    bias = generator.normal(size=3).astype(np.float32)
    rows = [row(4, 5, 6), row(9), row(4, 5, 4, pair_start=2)]
    logits = ExitZero(50, table, weights, bias)(rows)
    assert logits.dtype == np.float32
    for one, result in zip(rows, logits, strict=True):
        mean = table[found(one, 50, 64)].astype(np.float64).mean(axis=0)
        assert_close(result, mean @ weights + bias)


def test_rows_that_stop_at_exit_0_reach_no_device(
    exit_0_engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = AssertionError("an execution was opened")
    with Engine.load(exit_0_engines["bert"], threads=1) as engine:
        monkeypatch.setattr(engine.core.backend, "open", Mock(side_effect=opened))
        assert {p.exit for p in engine.predict(TEXTS, rule=Budget(exit=0))} == {0}
        assert {p.exit for p in engine.predict(TEXTS, max_exit=0)} == {0}
        with pytest.raises(AssertionError, match="opened"):
            engine.predict(TEXTS, rule=Budget(exit=1))


def test_later_exits_are_compared_with_exit_0(engine: Engine) -> None:
    answers = engine.trace(TEXTS).logits.argmax(axis=-1)
    exits = [p.exit for p in engine.predict(TEXTS, rule=Pabee(patience=1))]
    assert min(exits) == 1, "exit 0 never stops a row without a threshold"
    for number, exit_number in enumerate(exits):
        same = answers[1:, number] == answers[:-1, number]
        assert exit_number == (1 + int(same.argmax()) if same.any() else 3)
    assert 1 in [p.exit for p in engine.predict(TEXTS, rule=FPabee(threshold=1.0))]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Confidence(threshold=2.0, exit_0_threshold=0.0), 0),
        (Confidence(threshold=2.0, exit_0_threshold=0.0, min_exit=1), 3),
        (Confidence(threshold=2.0, exit_0_threshold=1.1), 3),
        (Confidence(threshold=2.0, max_exit=0), 0),
        (Confidence(threshold=2.0, exit_0_threshold=0.0).capped(2), 0),
        (Confidence(threshold=0.0, min_exit=1), 1),
        (Budget(exit=2, exit_0_threshold=0.0), 0),
        (Budget(exit=2), 2),
    ],
    ids=str,
)
def test_settings_that_concern_exit_0(engine: Engine, rule: ExitRule, expected: int) -> None:
    assert {p.exit for p in engine.predict(TEXTS, rule=rule)} == {expected}
    assert ExitRule.from_dict(rule.to_dict()) == rule


def test_exit_0_answers_when_the_deadline_is_over_before_the_first_layer(engine: Engine) -> None:
    for deadline_ms, expected in ((1e6, (3, False, False)), (0, (0, True, True))):
        answers = engine.predict(TEXTS, rule=Budget(exit=3), deadline_ms=deadline_ms)
        assert {(p.exit, p.deadline_limited, p.deadline_missed) for p in answers} == {expected}


def test_a_rule_with_a_threshold_needs_an_exit_0(engines: Mapping[str, Path]) -> None:
    rule = Confidence(threshold=0.9, exit_0_threshold=0.9)
    with Engine.load(engines["bert"], threads=1) as engine:
        with pytest.raises(RuleError, match="has a threshold for exit 0, but the model has no"):
            engine.predict(TEXTS, rule=rule)
        for options in ({"rule": Budget(exit=0)}, {"max_exit": 0}):
            with pytest.raises(RuleError, match=r"exit is 0, but the exits .* are 1 to 3"):
                engine.predict(TEXTS, **options)


def arrays(labels: int = 4) -> dict[str, NDArray[Any]]:
    return {
        "table": np.zeros((10 + 16, labels), np.float16),
        "weights": np.eye(labels, dtype=np.float32),
        "bias": np.zeros(labels, np.float32),
    }


Change = Callable[[dict[str, NDArray[Any]]], object]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a["table"].__setitem__((3, 1), np.nan), "not finite"),
        (lambda a: a["bias"].__setitem__(0, np.inf), "not finite"),
        (lambda a: a["weights"].__setitem__(0, np.nan), "not finite"),
        (lambda a: a["weights"].__setitem__(0, 3e38), "give logits that are not"),
        (lambda a: a.update(arrays(labels=3)), "gives 3 logits for 4 labels"),
        (
            lambda a: a.update(weights=np.zeros((3, 4), np.float32)),
            "its table, weights and bias",
        ),
        (lambda a: a.update(table=np.zeros(26, np.float16)), "its table, weights and bias"),
        (
            lambda a: a.update(table=a["table"].astype(np.float32)),
            "its table, weights and bias",
        ),
        (lambda a: a.pop("bias"), "bias"),
    ],
)
def test_an_exit_0_that_does_not_fit_is_refused(folder: Path, change: Change, problem: str) -> None:
    given = arrays()
    change(given)
    set_exit_0(folder, 10, **given)
    with pytest.raises(ArtifactError, match=problem):
        Engine.load(folder)


def test_another_number_of_ngrams_is_refused(folder: Path) -> None:
    set_exit_0(folder, 10, **arrays())
    manifest = read_manifest(folder)
    assert manifest.exit_0 is not None
    spec = msgspec.structs.replace(manifest.exit_0, buckets=32)
    EnginesFolder(folder, manifest).with_manifest(exit_0=spec).write()
    with pytest.raises(ArtifactError, match="it has 16 buckets, expected 32"):
        Engine.load(folder)


def test_a_missing_or_damaged_file_is_named(folder: Path) -> None:
    path = folder / EXIT_0_NAME
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"exit_0\.npz is damaged"):
        Engine.load(folder)
    manifest = read_manifest(folder)
    (damaged,) = filter(None, EnginesFolder(folder, manifest).damage())
    assert "exit_0.npz" in damaged
    path.unlink()
    with pytest.raises(ArtifactError, match=r"exit_0\.npz is missing"):
        Engine.load(folder)


def test_the_check_finds_the_exit_0_of_another_model(folder: Path) -> None:
    with Engine.load(folder, threads=1) as engine:
        assert engine.check().passed
    reference = folder / "reference.npz"
    kept = reference.read_bytes()
    manifest = msgspec.structs.replace(read_manifest(folder), exit_0=None)
    with np.load(reference) as content:
        parts = dict(content)
    np.savez(reference, texts=parts["texts"], logits=parts["logits"][1:])
    EnginesFolder(folder, manifest).write()
    correct_reference(folder)
    add_exit_0(folder, seed=5)
    reference.write_bytes(kept)
    correct_reference(folder)
    with Engine.load(folder, threads=1) as engine, pytest.raises(CheckError):
        engine.check()
