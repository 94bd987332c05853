"""What the driver gets through the real `cuda-bindings`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpabee.runtime.backends.cuda import PTX

_LIBRARY = r"""
#include <stdio.h>
#include <string.h>
typedef int (*Function)(void);
static int other(void) { return 0; }
static int load(void **module, const char *image) {
  printf("%zu\n", strlen(image));
  *module = (void *)1;
  return 0;
}
static int get(void **function, void *module, const char *name) {
  printf("%s\n", name);
  *function = (void *)3;
  return 0;
}
static int launch(void *function, int x, int y, int z, int threads, int rows, int depth,
                  int shared, void *stream, void **values, void **extra) {
  printf("%d %d %d %d %d %d %d %p %p\n", x, y, z, threads, rows, depth, shared, stream, extra);
  unsigned long long *plan = values[0];
  printf("%llu %llu %llu %llu %u\n", plan[0], plan[1], plan[2], plan[3 + 255],
         ((unsigned *)(plan + 3 + 256))[255]);
  fflush(stdout);
  return function != (void *)3;
}
int cuGetProcAddress_v2(const char *name, void **function, int version, long flags, void *status) {
  *function = !strcmp(name, "cuModuleLoadData") ? (void *)load
      : !strcmp(name, "cuModuleGetFunction") ? (void *)get
      : !strcmp(name, "cuLaunchKernel") ? (void *)launch
      : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)other;
  return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""
_PROGRAM = """
import numpy as np
from types import SimpleNamespace
from cuda.bindings import runtime
from fpabee.runtime.backends.cuda import GATHER, Cuda
cuda = Cuda.__new__(Cuda)
cuda._runtime = SimpleNamespace(cudaError_t=runtime.cudaError_t)
plan = np.zeros(1, GATHER)
plan["to"], plan["pitch"], plan["fill"] = 7, 8193, 9
plan["sources"][0, -1], plan["widths"][0, -1] = 10, 11
for _ in range(2):
    cuda.gather(plan, 256, 78)
"""


def test_the_real_bindings_launch_the_kernel(tmp_path: Path) -> None:
    """With a made-up driver: it gets the PTX once, and the arguments of each launch."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler")
    (tmp_path / "driver.c").write_text(_LIBRARY)
    library = ["-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run([compiler, *map(str, library)], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(str(PTX.stat().st_size), "gather_rows"),
        *("256 2 1 256 1 1 0 0x4e (nil)", "7 8193 9 10 11") * 2,
    ]
