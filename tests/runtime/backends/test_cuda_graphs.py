"""How conditional graphs are built with `cuda-bindings`, whose two versions are modelled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fpabee.runtime import BackendError
from fpabee.runtime.backends.cuda import SPIN, Cuda
from fpabee.runtime.backends.decide import PTX

CALLS = [
    *("cudaGraphConditionalHandleCreate", "cudaStreamBeginCaptureToGraph"),
    *("cudaStreamGetCaptureInfo", "cudaStreamEndCapture", "cudaGraphGetNodes"),
    *("cudaGraphNodeGetType", "cudaGraphAddNode", "cudaGraphInstantiate", "cudaGraphUpload"),
]

ONCE = ("cudaGraphInstantiate", "cudaGraphUpload")


@dataclass(eq=False)
class Graph:
    """A graph of nodes, each with its type, name, dependencies and body."""

    nodes: list[SimpleNamespace] = field(default_factory=list)

    def add(self, kind: Any, name: str, after: list[Any]) -> SimpleNamespace:
        assert all(node in self.nodes for node in after), "a node of another graph"
        self.nodes.append(SimpleNamespace(kind=kind, name=name, after=after, body=Graph()))
        return self.nodes[-1]

    def __str__(self) -> str:
        parts = []
        for node in self.nodes:
            after = "+".join(other.name for other in node.after)
            body = f"{{{node.body}}}" if node.body.nodes else ""
            parts.append(f"{node.name}({after}){body}")
        return " ".join(parts)


class Bindings:
    """`cuda.bindings.runtime` for CUDA 12 or 13, as far as graphs use it. One call can fail."""

    def __init__(self, real: Any, version: int, fails: str = "") -> None:
        self.version, self.fails = version, fails
        self.real = real
        self.calls: list[str] = []
        self.graphs: list[Graph] = []
        self.capturing: tuple[Graph, list[Any]] | None = None
        for name in ("cudaStreamCaptureMode", "cudaGraphNodeType", "cudaGraphConditionalNodeType"):
            setattr(self, name, getattr(real, name))
        self.cudaError_t = real.cudaError_t
        self.cudaGetErrorString = lambda status: (0, b"it failed")
        if version == 12:
            self.cudaGraphAddNode_v2 = None
        self.cudaGraphNodeParams = lambda: SimpleNamespace(conditional=SimpleNamespace())
        answers = {name.removeprefix("_"): getattr(self, name) for name in dir(type(self))}
        for name in (name for name in answers if name.startswith("cuda")):
            setattr(self, name, self._call(name, answers[name]))

    def _call(self, name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            # The second call fails if there is one, inside the first body.
            fails_now = name == self.fails and self.calls.count(name) == (1 if name in ONCE else 2)
            if fails_now and name != "cudaStreamEndCapture":
                return (self.real.cudaError_t(2),)
            found = answer(*arguments)
            return (self.real.cudaError_t(2 if fails_now else 0), *found)

        return call

    def enqueue(self, name: str, kind: str = "Kernel") -> None:
        """What a library does while a stream captures."""
        assert self.capturing is not None
        graph, last = self.capturing
        node = graph.add(
            getattr(self.real.cudaGraphNodeType, f"cudaGraphNodeType{kind}"), name, last
        )
        self.capturing = graph, [node]

    def _cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        return ()

    def _cudaGetLastError(self) -> Any:  # noqa: N802
        return ()

    def _cudaGraphCreate(self, flags: int) -> Any:  # noqa: N802
        self.graphs.append(Graph())
        return (self.graphs[-1],)

    def _cudaGraphDestroy(self, graph: Graph) -> Any:  # noqa: N802
        assert self.capturing is None
        self.graphs.remove(graph)
        return ()

    def _cudaGraphConditionalHandleCreate(  # noqa: N802
        self, graph: Graph, default: int, flags: int
    ) -> Any:
        return (100 + self.calls.count("cudaGraphConditionalHandleCreate"),)

    def _cudaStreamBeginCaptureToGraph(  # noqa: N802
        self, stream: int, graph: Graph, after: Any, data: Any, count: int, mode: Any
    ) -> Any:
        assert self.capturing is None
        assert len(after) == count
        assert data is None
        self.capturing = graph, list(after)
        return ()

    def _cudaStreamGetCaptureInfo(self, stream: int) -> Any:  # noqa: N802
        assert self.capturing is not None
        graph, last = self.capturing
        edges: tuple[Any, ...] = () if self.version == 12 else ([],)
        return "active", 1, graph, last, *edges, len(last)

    def _cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        assert self.capturing is not None
        graph, _ = self.capturing
        self.capturing = None
        return (graph,)

    def _cudaGraphGetNodes(self, graph: Graph, count: int = 0) -> Any:  # noqa: N802
        return graph.nodes[:count], len(graph.nodes)

    def _cudaGraphNodeGetType(self, node: Any) -> Any:  # noqa: N802
        return (node.kind,)

    def _cudaGraphAddNode(self, graph: Graph, after: Any, *rest: Any) -> Any:  # noqa: N802
        assert self.capturing is None, "a graph is changed while it is captured into"
        if self.version == 13:
            assert rest[0] is None
            rest = rest[1:]
        count, params = rest
        assert count == len(after)
        assert params.conditional.size == 1
        assert params.conditional.type.name == "cudaGraphCondTypeIf"
        node = graph.add(params.type, f"if{params.conditional.handle}", list(after))
        params.conditional.phGraph_out = [node.body]
        return (node,)

    def _cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:  # noqa: N802
        self.instantiated = str(graph)
        return (77,)

    def _cudaGraphUpload(self, executable: int, stream: int) -> Any:  # noqa: N802
        return ()

    def _cudaGraphExecDestroy(self, executable: int) -> Any:  # noqa: N802
        return ()


def capture(version: int, parts: int, fails: str = "", kind: str = "Kernel") -> Bindings:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    bindings = Bindings(real, version, fails)
    cuda = Cuda.__new__(Cuda)
    cuda._runtime = bindings
    cuda.load_kernels = lambda: bindings.calls.append("load kernels")  # type: ignore[method-assign]

    def part(number: int) -> Any:
        def work(handle: int) -> None:
            if fails == "work" and number == 1:
                raise BackendError("it failed", "")
            bindings.enqueue(f"segment{number}", kind if number else "Kernel")
            bindings.enqueue(f"decide{handle}")

        return work

    def run() -> int:
        end = lambda: bindings.enqueue("out", "Memcpy")  # noqa: E731
        return cuda.capture_request(3, [part(number) for number in range(parts)], end)

    if fails or kind == "Host":
        with pytest.raises(BackendError, match=r"it failed|a node of type Host"):
            run()
    else:
        assert run() == 77
    return bindings


@pytest.mark.parametrize("version", [12, 13])
def test_each_part_is_the_body_of_the_if_node_before_it(version: int) -> None:
    bindings = capture(version, 3)
    assert bindings.instantiated == (
        "segment0() decide101(segment0) if101(decide101)"
        "{segment1() decide102(segment1) if102(decide102)"
        "{segment2() decide0(segment2)}} out(if101)"
    )
    assert bindings.graphs == []
    assert bindings.calls[0] == "load kernels", "CUDA refuses this while a stream captures"
    assert "cudaGetLastError" not in bindings.calls
    assert capture(version, 1).instantiated == "segment0() decide0(segment0) out(decide0)"


@pytest.mark.parametrize("version", [12, 13])
@pytest.mark.parametrize("fails", [*CALLS, "work", ""])
def test_a_failure_leaves_nothing_behind(version: int, fails: str) -> None:
    """The empty name stands for a node that the body of an IF node cannot have."""
    bindings = capture(version, 3, fails, "Kernel" if fails else "Host")
    assert bindings.capturing is None
    assert bindings.graphs == []
    ends = bindings.calls.count("cudaStreamEndCapture")
    begins = bindings.calls.count("cudaStreamBeginCaptureToGraph")
    assert begins - ends == (fails == "cudaStreamBeginCaptureToGraph")
    assert ("cudaGraphExecDestroy" in bindings.calls) == (fails == "cudaGraphUpload")
    assert "cudaGetLastError" in bindings.calls


def test_the_real_bindings_take_the_parameters_of_an_if_node() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    node = real.cudaGraphNodeParams()
    node.type = real.cudaGraphNodeType.cudaGraphNodeTypeConditional
    node.conditional.handle = real.cudaGraphConditionalHandle(5)
    node.conditional.type = real.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    node.conditional.size = 1
    assert int(node.conditional.handle) == 5
    assert real.cudaGraphConditionalHandle(1 << 40).__int__() == 1 << 40


@pytest.mark.parametrize("spins", [False, True])
def test_threads_spin_if_the_environment_says_so(
    spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    calls: list[tuple[str, int]] = []

    def recorded(name: str) -> Callable[[int], tuple[int]]:
        def call(value: int) -> tuple[int]:
            calls.append((name, int(value)))
            return (0,)

        return call

    for name in ("cudaSetDeviceFlags", "cudaSetDevice"):
        monkeypatch.setattr(real, name, recorded(name))
    if spins:
        monkeypatch.setenv(SPIN, "1")
    else:
        monkeypatch.delenv(SPIN, raising=False)
    Cuda()
    flags = [("cudaSetDeviceFlags", int(real.cudaDeviceScheduleSpin))] if spins else []
    assert calls == [*flags, ("cudaSetDevice", 0)]


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
  *function = !strcmp(name, "decide_exit") ? (void *)2 : (void *)3;
  return 0;
}
static int launch(void *function, int x, int y, int z, int threads, int rows, int depth,
                  int shared, void *stream, void **values, void **extra) {
  printf("%d %d %d %d %d %d %d %p %p\n", x, y, z, threads, rows, depth, shared, stream, extra);
  unsigned long long *plan = values[0];
  if (function == (void *)3)
    printf("%llu %llu %llu %llu %u\n", plan[0], plan[1], plan[2], plan[3 + 255],
           ((unsigned *)(plan + 3 + 256))[255]);
  else
    printf("%p %p %d %d %llu\n", *(void **)values[0], *(void **)values[1], *(int *)values[2],
           *(int *)values[3], *(unsigned long long *)values[4]);
  fflush(stdout);
  return threads * rows * depth > 256 ? 701 : 0; /* too few registers */
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
from fpabee.runtime.backends.cuda import Cuda
from fpabee.runtime.backends.decide import GATHER
cuda = Cuda.__new__(Cuda)
device = lambda number: print("device", number, flush=True) or (0,)
cuda._runtime = SimpleNamespace(cudaError_t=runtime.cudaError_t, cudaSetDevice=device)
cuda.load_kernels()
for rows in (4, 32):
    cuda.decide(1 << 40, 1 << 41, 3, rows, 1 << 50, 77)
plan = np.zeros(1, GATHER)
plan["to"], plan["pitch"], plan["fill"] = 7, 8193, 9
plan["sources"][0, -1], plan["widths"][0, -1] = 10, 11
for _ in range(2):
    cuda.gather(plan, 256, 78)
"""


def test_the_real_bindings_launch_the_kernels(tmp_path: Path) -> None:
    """With a made-up driver: it gets the PTX once, and the arguments of each kernel.

    A block of `decide_exit` has at most 256 threads, or its registers would not suffice.
    """
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
        *("device 0", str(PTX.stat().st_size), "decide_exit", "gather_rows"),
        "1 1 1 32 4 1 0 0x4d (nil)",
        "0x10000000000 0x20000000000 3 4 1125899906842624",
        "1 1 1 32 8 1 0 0x4d (nil)",
        "0x10000000000 0x20000000000 3 32 1125899906842624",
        *("256 2 1 256 1 1 0 0x4e (nil)", "7 8193 9 10 11") * 2,
    ]
