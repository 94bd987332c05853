"""What every backend guarantees: rows keep their values, whatever group they are in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fpabee.runtime import read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS, MASK_FILL
from fpabee.runtime.backends import openvino
from fpabee.runtime.backends.buffers import Bucket, shape_of
from fpabee.runtime.backends.openvino import has_bf16
from fpabee.runtime.check import BATCH_LIMIT, EXPORT_LIMIT, REQUIREMENTS, logit_differences
from fpabee.runtime.encoding import EncodedRow, TextEncoder
from fpabee.runtime.targets import open_backend

from ...closeness import assert_close
from ...doubles.device import Double, install, install_cuda_provider
from ...doubles.openvino import add_openvino

FAMILIES = ("albert", "mpnet", "modernbert")
BACKENDS = (
    "onnxruntime", "openvino-fp32", "openvino-bf16", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"
)  # fmt: skip
TEXTS = (
    "",
    "the",
    "rain",
    "a bad film",
    "turn the lights on",
    "the plot is not good but the music is",
    "play the music and stop the music and play the music again in the evening",
    "book a table and a flight from london " * 3,
)

Tensors = dict[str, NDArray[Any]]
Logits = NDArray[np.float32]


class Chain:
    """A backend, the rows of `TEXTS`, and the results of running each of them alone."""

    def __init__(self, folder: Path, double: Double | None = None, target: str = "") -> None:
        manifest = read_manifest(folder)
        self.double = double
        target = target or (double.target if double else manifest.default_target)
        # In bf16, other padding and another batch round as differently as another precision.
        limits = {"openvino-bf16": REQUIREMENTS["bf16"].tie, "openvino-fp32": EXPORT_LIMIT}
        self.limit = limits.get(target, BATCH_LIMIT)
        self.backend: Any = open_backend(EnginesFolder(folder, manifest), target, None)
        self.execution: Any = self.backend.check_out()
        self.segments = len(manifest.segments)
        self.rows = TextEncoder(folder, manifest.tokenizer).encode(TEXTS)
        self.batched = {name: "batch" in spec.shape for name, spec in self.backend.specs.items()}
        self.alone = [self.run_alone(row) for row in self.rows]

    def begin(self, numbers: list[int], bucket: Bucket | None = None) -> Any:
        rows = [self.rows[number] for number in numbers]
        return self.execution.begin(rows, bucket or Bucket(len(rows), max(map(len, rows))))

    def run_alone(self, row: EncodedRow) -> list[tuple[Logits, Tensors]]:
        """For each segment, its logits and copies of the tensors after it."""
        hidden = self.execution.begin([row], Bucket(1, len(row)))
        steps = []
        for _ in range(self.segments):
            outputs = self.execution.enqueue(hidden)
            tensors = {name: array.copy() for name, array in self.tensors(hidden).items()}
            steps.append((outputs().copy(), tensors))
        self.execution.release(hidden)
        return steps

    def tensors(self, hidden: Any) -> Tensors:
        """The tensors in a group's buffers that later segments read."""
        if hidden.segment == self.segments:
            return {}
        live = self.backend.stages[hidden.segment].live
        if self.double is None:
            found = {
                name: self.execution._buffer(hidden, buffer)[0] for name, buffer in live.items()
            }
            return {name: _widened(array) for name, array in found.items()}
        self.double.cuda.run_all(self.execution.stream)
        tensors = {}
        for name, buffer in live.items():
            spec = self.backend.specs[name]
            shape = shape_of(spec, hidden.bucket)
            size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            memory = self.double.cuda.view(self.execution._buffer(hidden, buffer)[0], size)
            tensors[name] = memory.view(spec.dtype).reshape(shape)
        return tensors

    def check_tensors(self, hidden: Any, numbers: list[int], after: int) -> None:
        """Check that the tensors of a group equal those of its rows run alone."""
        assert hidden.rows == len(numbers)
        tensors = self.tensors(hidden)
        for position, number in enumerate(numbers):
            length = len(self.rows[number])
            for name, expected in self.alone[number][after][1].items():
                found = tensors[name]
                if self.batched[name]:
                    found = found[position]
                    expected = expected[0]
                inside = tuple(slice(size) for size in expected.shape)
                assert_close(found[inside], expected, self.limit)
            if ATTENTION_BIAS in tensors:
                padding = tensors[ATTENTION_BIAS][position, ..., length:]
                assert (padding == np.float32(MASK_FILL)).all()


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or in fp32 what it holds in bf16."""
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module", params=[f"{f} {b}" for f in FAMILIES for b in BACKENDS])
def chain(
    request: pytest.FixtureRequest,
    engines: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Chain]:
    """Every family on every backend, over a double of the CUDA driver."""
    family, kind = request.param.split()
    if kind == "openvino-bf16" and not has_bf16():
        pytest.skip("this CPU has no bf16")
    folder = tmp_path_factory.mktemp(kind) / "engines"
    shutil.copytree(engines[family], folder)
    with pytest.MonkeyPatch.context() as patch:
        if kind.startswith("openvino"):
            add_openvino(folder, kind.removeprefix("openvino-"))
            chain = Chain(folder, target=kind)
        elif kind == "onnxruntime-cuda":
            chain = Chain(folder, target=install_cuda_provider(patch, folder).target)
        elif kind == "onnxruntime":
            chain = Chain(folder)
        else:
            chain = Chain(folder, install(patch, folder, backend=kind))
        yield chain
        chain.backend.give_back(chain.execution)
        chain.backend.close()
        assert chain.double is None or chain.double.nothing_is_left()


def numbers_of(least: int = 1) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(TEXTS) - 1), min_size=least, max_size=5)


@given(groups=st.lists(numbers_of(), min_size=1, max_size=4), data=st.data())
def test_regrouping_neither_loses_nor_mixes_up_rows(
    chain: Chain, groups: list[list[int]], data: st.DataObject
) -> None:
    rest = data.draw(st.integers(1, chain.segments - 1), label="segments before regrouping")
    hiddens = []
    for group in groups:
        hidden = chain.begin(group)
        for _ in range(rest):
            chain.execution.enqueue(hidden)
        hiddens.append(hidden)
    keeps = [
        data.draw(st.permutations(range(len(group))))[: data.draw(st.integers(0, 5))]
        for group in groups
    ]
    if not any(keeps):
        keeps[0] = [0]
    numbers = [group[row] for group, keep in zip(groups, keeps, strict=True) for row in keep]
    longest = max(len(chain.rows[number]) for number in numbers)
    widest = max(hidden.bucket.sequence for hidden in hiddens)
    bucket = Bucket(
        len(numbers) + data.draw(st.integers(0, 2), label="padding rows"),
        data.draw(st.integers(longest, widest), label="sequence"),
    )
    joined = chain.execution.regroup(hiddens, [np.array(k, np.intp) for k in keeps], bucket)
    assert joined.bucket == bucket
    chain.check_tensors(joined, numbers, after=rest - 1)
    for segment in range(rest, chain.segments):
        outputs = chain.execution.enqueue(joined)
        logits = outputs()
        assert logits.shape[0] == len(numbers)
        alone = np.concatenate([chain.alone[number][segment][0] for number in numbers])
        assert_close(logits, alone, chain.limit)
    for hidden in (*hiddens, joined):
        chain.execution.release(hidden)


@given(group=numbers_of(), rows=st.integers(0, 3), tokens=st.integers(0, 30))
def test_padding_changes_nothing(chain: Chain, group: list[int], rows: int, tokens: int) -> None:
    longest = max(len(chain.rows[number]) for number in group)
    hidden = chain.begin(group, Bucket(len(group) + rows, min(longest + tokens, 64)))
    for segment in range(chain.segments):
        outputs = chain.execution.enqueue(hidden)
        logits = outputs()
        assert logits.dtype == np.float32
        alone = np.concatenate([chain.alone[number][segment][0] for number in group])
        assert_close(logits, alone, chain.limit)
    chain.execution.release(hidden)


def test_rows_differ_enough_to_notice_a_mix_up(chain: Chain) -> None:
    for segment in range(chain.segments):
        logits = np.concatenate([alone[segment][0] for alone in chain.alone])
        apart = logit_differences(logits[:, None], logits[None])
        assert apart[~np.eye(len(TEXTS), dtype=bool)].min() > 10 * BATCH_LIMIT


def test_results_stay_valid_while_the_next_segment_runs(chain: Chain) -> None:
    hidden = chain.begin([3, 4])
    outputs = chain.execution.enqueue(hidden)
    kept = outputs()
    before = kept.copy()
    assert "hidden_states" in chain.tensors(hidden)
    assert "input_ids" not in chain.tensors(hidden), "no later segment reads them"
    chain.execution.enqueue(hidden)
    np.testing.assert_array_equal(kept, before)
    chain.execution.release(hidden)


def test_reused_buffers_hold_nothing_of_earlier_rows(chain: Chain) -> None:
    bucket = Bucket(2, 64)
    fresh = chain.backend.open()
    for execution in (chain.execution, fresh):
        for numbers in ([7, 7], [1, 0]):
            hidden = execution.begin([chain.rows[number] for number in numbers], bucket)
            for segment in range(chain.segments):
                outputs = execution.enqueue(hidden)
                alone = np.concatenate([chain.alone[number][segment][0] for number in numbers])
                assert_close(outputs(), alone, chain.limit)
            execution.release(hidden)
    fresh.close()


def test_buffers_in_host_memory_start_at_a_cache_line(chain: Chain) -> None:
    if chain.double is not None:
        pytest.skip("buffers are on the device")
    hidden = chain.begin([0, 1])
    for name, buffer in chain.backend.stages[0].live.items():
        assert chain.execution._buffer(hidden, buffer)[0].ctypes.data % 64 == 0, name
    chain.execution.release(hidden)


def test_limits_are_those_of_the_model(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": "avx2"})  # no AMX
    limits = chain.backend.limits()
    assert limits.max_sequence == 64
    is_padded = type(chain.backend).__name__ == "OpenVinoBackend"
    assert limits.bucket(3, 17) == Bucket(3, 20 if is_padded else 17)
