"""Regrouping and the order of groups on a device, over the double of the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fpabee.runtime import Budget, ExitRule, FPabee
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.backends.cuda import GATHER, PTX

from ...closeness import assert_exits
from ...doubles.cuda import FakeCuda
from ...doubles.device import TEXTS, Double

THREADS = 3
# Lets a C compiler compile the kernel.
PRELUDE = "struct { int x, y; } threadIdx, blockIdx, blockDim, gridDim;\n"
CALL = """
void run(const Gather *set, int row, int thread, int threads) {
  blockIdx.x = row, threadIdx.x = thread, blockDim.x = threads, gridDim.y = 1;
  gather_rows(*set);
}
"""


@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernel_copies_what_its_double_copies(
    aligned: bool, compile_c: Callable[..., Path]
) -> None:
    """Compiled as C, with threads that share a row; in words of 8 bytes, or byte by byte."""
    kernel = PTX.with_suffix(".cu").read_text("utf-8").replace('extern "C" __global__', "")
    code = PRELUDE + kernel.replace("__grid_constant__", "") + CALL
    flags = ("-std=gnu99", "-Wall", "-Wextra", "-Werror", "-O2")
    library = ctypes.CDLL(str(compile_c(code, "gather.so", *flags)))
    random = np.random.default_rng(5)
    cuda = FakeCuda()
    unit = 8 if aligned else 1
    with cuda:
        stream = cuda.stream()
    for _ in range(50):
        rows = int(random.integers(1, 9))
        most = int(random.integers(1, 20))
        with cuda:
            target = cuda.malloc(rows * most * unit)
            source = cuda.malloc(3 * most * unit)
        memory = cuda.view(target, rows * most * unit)
        cuda.view(source, 3 * most * unit)[:] = random.integers(0, 256, 3 * most * unit)
        widths = random.integers(0, most + 1, rows) * unit
        plan = np.zeros(1, GATHER)
        plan["to"], plan["pitch"], plan["fill"] = target, most * unit, random.integers(1 << 62)
        plan["widths"][0, :rows] = widths
        plan["sources"][0, :rows] = source + random.integers(0, 2 * most + 1, rows) * unit
        with cuda:
            cuda.gather(plan, rows, stream)
        cuda.run_all(stream)
        expected = memory.copy()
        memory[:] = 0x5A
        for name, address in (("to", target), ("sources", source)):
            offset = cuda.view(address, 1).ctypes.data - address  # may be negative
            plan[name] += np.uint64(offset % 2**64)
        for row in range(rows):
            for thread in range(THREADS):
                library.run(ctypes.c_void_p(plan.ctypes.data), row, thread, THREADS)
        np.testing.assert_array_equal(memory, expected)


def test_the_ptx_is_that_of_its_source_and_for_all_supported_gpus_and_drivers() -> None:
    lines = PTX.read_text().splitlines()
    assert lines[0].endswith(sha256_of(PTX.with_suffix(".cu"))), "make it again with NVRTC 12.4"
    assert ".version 8.4" in lines, "drivers for CUDA 12.4 accept no newer one"
    assert ".target sm_75" in lines
    assert f"\t.param .align 8 .b8 gather_rows_param_0[{GATHER.itemsize}]" in lines
    assert GATHER.itemsize <= 4096


@pytest.mark.parametrize("rule", [FPabee(threshold=0.45), Budget(exit=3)])
def test_the_device_is_busy_while_the_host_decides(
    rule: ExitRule, double: Callable[..., Double]
) -> None:
    """Several groups of at most 4 rows; the device has nothing to do after the last exit only."""
    made = double(batch=(1, 2, 4), batch_sizes=(1, 2, 4))
    with made.load() as engine, made.load() as usual:
        rows = engine.core.encode(TEXTS * 4)
        made.cuda.idle = 0
        found = engine.run_encoded(rows, rule)
        assert made.cuda.idle == 1
        whole = usual.run_encoded(rows, Budget(exit=3)).logits
        assert_exits(found.exits, whole, rule, usual.manifest.task)
