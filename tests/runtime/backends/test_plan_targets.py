"""Where plans run, and what happens when device memory is full."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fpabee.exporter.targets.plans import (
    PlanOptions,
    batch_sizes_of,
    profiles_of,
    sequence_lengths_of,
)
from fpabee.runtime import BackendError, Engine, MissingExtraError
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.backends.buffers import Bucket
from fpabee.runtime.chain.groups import split
from fpabee.runtime.targets import open_backend

from ...doubles.device import Double

MIB = 2**20


def test_a_plan_needs_its_library(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double()
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(MissingExtraError, match=r"pip install .*\[tensorrt-cu1[23]\]'"):
        made.load()


def test_a_plan_that_does_not_fit_into_device_memory(double: Callable[..., Double]) -> None:
    made = double()
    plan = made.folder / "targets" / made.target / "segment_01.plan"
    plan.write_bytes(plan.read_bytes().ljust(5 * MIB, b"."))
    made.change_plan("segment_01", sha256=sha256_of(plan))
    plans = made.trt.plans
    made.trt.plans = lambda content: None
    made.cuda.room = 3 * MIB
    with made.load() as engine:
        with pytest.raises(BackendError, match=r"no room for 5\.0 MiB: 3 of 3 MiB are free -> use"):
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


@pytest.mark.parametrize("batch", [(1, 8, 32), (2, 4, 8)])
def test_one_row_runs_in_the_profile_of_its_length(
    batch: tuple[int, int, int], double: Callable[..., Double]
) -> None:
    """Kernels are chosen for the typical shape of a profile. Older plans have two profiles."""
    options = PlanOptions(batch=batch, compute_capabilities=())
    profiles = profiles_of(options)
    made = double(profiles=profiles, batch_sizes=batch_sizes_of(options))
    backend: Any = open_backend(EnginesFolder.read(made.folder), made.target, None)
    limits = backend.limits()
    assert (limits.max_batch, limits.max_sequence) == (options.batch[2], 128)
    assert limits.group_tokens == options.batch[2] * 64
    few = options.batch[0]
    for length in sequence_lengths_of(options):
        chosen = profiles[backend._profile(Bucket(few, length))]
        assert chosen.sequence.min <= length <= chosen.sequence.max
        assert (chosen.batch.max == 1) == (few == 1)
        assert profiles[backend._profile(Bucket(8, length))].batch.max > 1
    with pytest.raises(BackendError, match=r"takes \d to \d+ rows of 16 to 64 tokens; [^;]*, not"):
        backend._profile(Bucket(64, 16))
    backend.close()
