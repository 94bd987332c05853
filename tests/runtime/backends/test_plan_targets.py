"""Where plans run, and what happens when device memory is full."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from fpabee.exporter.targets.plans import (
    PlanOptions,
    batch_sizes_of,
    profiles_of,
    sequence_lengths_of,
)
from fpabee.runtime import BackendError, Engine, MissingExtraError
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import Range, Shapes
from fpabee.runtime.chain.groups import split

from ...doubles.device import GPU, Double, set_gpu

MIB = 2**20


def test_a_plan_needs_its_library(made: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(MissingExtraError, match=r"pip install .*\[tensorrt-cu1[23]\]'"):
        made.load()


A100 = "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("built_on", "here", "says"),
    [
        (A100, A100, ""),
        (f"{A100} MIG 1g.5gb", f"{A100} MIG 1g.5gb", ""),
        (f"{A100} MIG 1g.5gb", f"{A100} MIG 1g.5gb+me", "warning"),
        ("NVIDIA L4", "NVIDIA GeForce RTX 4090", "warning"),
        (A100, f"{A100} MIG 1g.5gb", "error"),
        (f"{A100} MIG 1g.5gb", A100, "error"),
        (f"{A100} MIG 1g.5gb", f"{A100} MIG 2g.10gb", "error"),
        (UNSET, f"{A100} MIG 1g.5gb", ""),
    ],
)
def test_a_plan_is_for_the_gpu_that_built_it(
    built_on: str | UnsetType,
    here: str,
    says: str,
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = double(built_on=built_on)
    set_gpu(monkeypatch, replace(GPU, name=here))
    if says == "error":
        message = rf"built on {built_on}, but this is {here}: .* \(MIG\) .* -> build target ten"
        with pytest.raises(BackendError, match=re.sub(r"\+", ".", message)):
            made.load()
        return
    for _ in range(2):
        made.load().close()
    hint = f"target {made.target} was built on {built_on}, and runs on {here}: "
    assert [hint in each for each in caplog.messages if "built on" in each] == [True] * bool(says)
    assert "so build target tensorrt-fp16 here" in caplog.text or not says


def test_warnings_of_the_library_are_logged_once(
    made: Double, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as that a plan was built on another model of GPU, which each of its files says."""
    plans = made.trt.plans

    def warns(content: bytes) -> Any:
        made.trt.report("made up on another\nGPU \n", severity="WARNING")
        made.trt.report("loaded", severity="INFO")
        return plans(content)

    made.trt.plans = warns
    with made.load() as engine:
        engine.predict(["rain"])
    told = [each for each in caplog.messages if each.startswith("tensorrt: ")]
    assert told == [r"tensorrt: made up on another\nGPU"]
    assert "loaded" not in caplog.text


def test_a_plan_that_does_not_fit_into_device_memory(made: Double) -> None:
    plan = made.folder / "targets" / made.target / "segment_01.plan"
    plan.write_bytes(plan.read_bytes().ljust(5 * MIB, b"."))
    made.change_plan("segment_01", sha256=sha256_of(plan))
    plans = made.trt.plans
    made.trt.plans = lambda content: None
    made.cuda.room = 3 * MIB
    with made.load() as engine:
        with pytest.raises(BackendError, match=r"no room for 5\.0 MiB: 3 of 3 MiB of .* -> use"):
            engine.predict(["rain"])
        made.trt.plans = plans
        made.cuda.room = 1024 * MIB
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_context_that_does_not_fit_into_device_memory(
    backend: str, double: Callable[..., Double]
) -> None:
    made = double(backend=backend)
    made.trt.contexts_left = 1
    made.cuda.room = 300 * MIB
    with made.load() as engine:
        message = r"no execution context for segment_02: .*; 300 of 300 MiB of device memory are"
        with pytest.raises(BackendError, match=message):
            engine.predict(["rain"])
        made.trt.contexts_left = sys.maxsize
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"
    assert made.cuda.memory_of == {}


def test_one_context_serves_all_groups_of_a_shape(
    double: Callable[..., Double],
) -> None:
    """A window has many groups of the same shape."""
    made = double(batch=(1, 4, 4), batch_sizes=(1, 4), sequence_lengths=(8, 64))
    texts = ["rain"] * 17 + ["rain " * 40] * 4
    with made.load() as engine, Engine.load(made.folder) as usual:
        expected = usual.trace(texts).logits
        for _ in range(3):
            np.testing.assert_allclose(engine.trace(texts).logits, expected, atol=1e-5)
    shapes = [tuple(context.shapes["attention_bias"]) for context in made.trt.contexts]
    assert len(shapes) == 3 * len(set(shapes)), "one for each segment and shape"
    assert len(set(shapes)) == 3


def test_rows_fill_the_smallest_batch(double: Callable[..., Double]) -> None:
    """Also those of the longest rows: one of them alone would be padded to as many."""
    options = PlanOptions(batch=(32, 32, 32), compute_capabilities=())
    made = double(profiles=profiles_of(options), batch_sizes=batch_sizes_of(options))
    with made.load() as engine:
        for length in sequence_lengths_of(options):
            groups = split(np.full(64, length), engine.core.limits)
            assert [len(rows) for rows in groups] == [32, 32]


def test_folders_of_1_0_run_single_rows_in_profiles_of_their_own(
    double: Callable[..., Double],
) -> None:
    ranges = [
        ((1, 8, 32), (2, 16)),
        ((1, 8, 32), (17, 64)),
        ((1, 1, 1), (2, 8)),
        ((1, 1, 1), (9, 64)),
    ]
    profiles = [
        Shapes(
            batch=Range(min=batch[0], opt=batch[1], max=batch[2]),
            sequence=Range(min=sequence[0], opt=sequence[1], max=sequence[1]),
        )
        for batch, sequence in ranges
    ]
    made = double(profiles=profiles, batch_sizes=(1, 32), sequence_lengths=(8, 16, 64))
    texts = ["rain", "rain " * 40, "turn the lights on and play music"]
    with made.load() as engine, Engine.load(made.folder) as usual:
        limits = engine.core.limits
        assert (limits.max_batch, limits.max_sequence, limits.group_tokens) == (32, 64, 512)
        for batch in (*([text] for text in texts), texts * 3):
            found = engine.trace(batch).logits
            np.testing.assert_allclose(found, usual.trace(batch).logits, atol=1e-5)
    used = {profiles.index(context.profile) for context in made.trt.contexts if context.profile}
    assert used == {0, 2, 3}, "long rows run alone, too, because they would fill a group"


def test_a_shape_outside_all_profiles_is_refused(double: Callable[..., Double]) -> None:
    made = double(batch=(2, 2, 4))
    message = r"segment_01 does not accept input_ids of shape \[1, \d\]"
    with made.load() as engine, pytest.raises(BackendError, match=message):
        engine.predict(["rain"])
