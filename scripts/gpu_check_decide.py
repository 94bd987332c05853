"""The kernels on a GPU, for `scripts/gpu_check`: exit rules in a CUDA graph, and gathered rows.

This needs a driver, NumPy and cuda-bindings, but no library that runs segments. Where the CUDA
graph of a request would run a segment, it copies logits that are given.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpabee.runtime import Budget, Entropy, ExitRule, FPabee, ProblemType, simulate
from fpabee.runtime.backends.cuda import Cuda
from fpabee.runtime.backends.decide import GATHER, board_type, settings_of
from fpabee.runtime.backends.request_graph import Board, capture_request

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "exit_rules.json"
ROWS = (1, 8, 32)
TOO_CLOSE = 1e-6
"""The GPU may decide otherwise if a score is closer than this to its threshold."""
TIMED_RULES = (  # they stop no row; the first one computes nothing
    Budget(exit=2, max_exit=2),
    Entropy(threshold=0.0, max_exit=2),
    FPabee(threshold=0.0, max_exit=2),
)
KERNELS = 200  # in the CUDA graph that is timed
REPEATS = 20


def check_decide(cuda: Cuda, every: int = 1) -> str:
    """Compare requests with `simulate`: each golden vector alone, and with more rows around it.

    Args:
        cuda: the driver.
        every: 1 takes all golden vectors, 2 every second one, and so on.

    Returns:
        How many rows were compared.

    Raises:
        AssertionError: a row has another exit or other logits, or too few or many segments ran.
    """
    random, compared, close = np.random.default_rng(17), 0, 0
    for vector in json.loads(GOLDEN.read_text(encoding="utf-8"))[::every]:
        rule, task = ExitRule.from_dict(vector["rule"]), ProblemType(vector["task"])
        golden = np.asarray(vector["logits"], np.float32)[:, None]
        for rows in ROWS:
            noise = random.normal(size=(len(golden), rows - 1, golden.shape[-1]))
            logits = np.append(golden, (golden + noise).astype(np.float32), axis=1)
            exits, found, last = _request(cuda, logits, rule, task)
            expected, lower, upper = (
                simulate(logits, each, task).exits
                for each in (rule, rule.shifted(-TOO_CLOSE), rule.shifted(TOO_CLOSE))
            )
            clear = lower == upper
            np.testing.assert_array_equal(exits[clear], expected[clear], str(rule))
            for row, deepest in enumerate(exits):
                np.testing.assert_array_equal(found[:deepest, row], logits[:deepest, row])
            np.testing.assert_array_equal(last, logits[exits.max() - 1], "wrong last segment")
            compared, close = compared + rows, close + int((~clear).sum())
    return f"{compared} rows stopped as `simulate` says, {close} of them close to a threshold"


def check_gather(cuda: Cuda) -> None:
    """Compare gathered rows with NumPy: in words, in bytes, and by several blocks of threads.

    Raises:
        AssertionError: they differ.
    """
    random, (count,) = np.random.default_rng(17), GATHER["sources"].shape
    fill = np.arange(1, 9, dtype=np.uint8)
    cuda.load_kernels()
    for width, pitch in ((24, 40), (10, 21), (9000, 20_000)):
        rows = random.integers(256, size=(count, width), dtype=np.uint8)
        order, is_padding = random.permutation(count), random.random(count) < 0.2
        with _memory(cuda, rows.nbytes, count * pitch) as (stream, source, target):
            plan = np.zeros(1, GATHER)
            plan["to"], plan["pitch"], plan["fill"] = target, pitch, fill.view(np.uint64)
            plan["sources"] = source + order * width
            plan["widths"] = np.where(is_padding, 0, width)
            given, found = (cuda.pinned((count, n), rows.dtype) for n in (width, pitch))
            given.array[:] = rows
            cuda.copy(source, given.pointer, rows.nbytes, stream)
            cuda.gather(plan, count, stream)
            cuda.copy(found.pointer, target, count * pitch, stream)
            cuda.synchronize(stream)
        expected = np.tile(np.resize(fill, pitch), (count, 1))
        expected[~is_padding, :width] = rows[order[~is_padding]]
        np.testing.assert_array_equal(found.array, expected)


def time_decide(cuda: Cuda) -> Iterator[dict[str, Any]]:
    """Time the kernel after one exit, in a CUDA graph that runs it many times.

    Yields:
        `rule`, `labels`, `rows`, and `us`: microseconds of one kernel.

    Raises:
        AssertionError: a row stopped, so that most of the kernels had nothing to do.
    """
    cuda.load_kernels()
    random = np.random.default_rng(17)
    for rule, labels, rows in itertools.product(TIMED_RULES, (2, 77), (1, 32)):
        layout = board_type(1, labels, rows)
        settings = settings_of(rule, ProblemType.SINGLE_LABEL, range(2), labels)
        assert settings is not None
        earlier, logits = random.normal(size=(2, rows, labels)).astype(np.float32)
        memory = _memory(cuda, layout.itemsize, logits.nbytes)
        with memory as (stream, pointer, now), ExitStack() as stack:
            board = Board(cuda, layout, pointer, rows)
            given = cuda.pinned(logits.shape, logits.dtype)
            board.write(settings, rows, earlier)
            given.array[:] = logits
            board.copy_in(stream)
            cuda.copy(now, given.pointer, logits.nbytes, stream)
            kernel = partial(cuda.decide, pointer, now, 1, rows, 0, stream)
            graph = cuda.capture(stream, partial(_repeat, kernel))
            stack.callback(cuda.destroy_graph, graph)
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                cuda.launch(graph, stream)
                cuda.synchronize(stream)
                seconds.append(time.perf_counter() - started)
            board.copy_out(stream)
            cuda.synchronize(stream)
            assert not board.read(rows)[0].any(), f"{rule} has stopped a row"
        us = round(float(np.median(seconds)) / KERNELS * 1e6, 2)
        yield {"rule": rule.name, "labels": labels, "rows": rows, "us": us}


def _request(
    cuda: Cuda, logits: NDArray[np.float32], rule: ExitRule, task: ProblemType
) -> tuple[NDArray[Any], ...]:
    """Run a request as one CUDA graph, whose segments copy given logits `[exits, rows, labels]`.

    Returns:
        The exit of each row, the logits that came back, and those of the segment that ran last.
    """
    exits, rows, labels = logits.shape
    layout, size = board_type(exits, labels, rows), logits[0].nbytes
    settings = settings_of(rule, task, range(1, exits + 1), labels)
    assert settings is not None
    sizes = layout.itemsize, logits.nbytes, size
    with _memory(cuda, *sizes) as (stream, pointer, source, now), ExitStack() as stack:
        board = Board(cuda, layout, pointer, rows)
        given, last = (cuda.pinned(each.shape, each.dtype) for each in (logits, logits[0]))
        given.array[:] = logits
        copy_in = partial(cuda.copy, source, given.pointer, logits.nbytes, stream)
        segments = [
            (partial(cuda.copy, now, source + number * size, size, stream), now)
            for number in range(exits)
        ]
        graph = capture_request(cuda, stream, board, copy_in, segments)
        stack.callback(cuda.destroy_graph, graph)
        board.write(settings, rows, None)
        cuda.launch(graph, stream)
        cuda.copy(last.pointer, now, size, stream)
        cuda.synchronize(stream)
        return *board.read(rows), last.array.copy()


def _repeat(work: Callable[[], None]) -> None:
    for _ in range(KERNELS):
        work()


@contextmanager
def _memory(cuda: Cuda, *sizes: int) -> Iterator[tuple[int, ...]]:
    """A stream, and the addresses of device memory of these sizes."""
    with ExitStack() as stack:
        handles = [cuda.stream()]
        stack.callback(cuda.destroy_stream, handles[0])
        for size in sizes:
            handles.append(cuda.malloc(size))
            stack.callback(cuda.free, handles[-1])
        yield tuple(handles)
