"""The parts and the report of `scripts/gpu_check.py`, on doubles of a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare_plan
import gpu_check
import msgspec
import numpy as np
import pytest
from one_graph import write_one_graph

from fpabee.exporter.single_file import pack, plan
from fpabee.exporter.targets import PlanOptions
from fpabee.exporter.targets.backends import RTX
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import Bucket, Engine
from fpabee.runtime.artifact.manifest import Graph, Shapes
from fpabee.runtime.errors import BackendError
from fpabee.runtime.machine import CudaDevice

from ..conftest import WORDS
from ..doubles.device import GPU, Double, serve
from ..doubles.tensorrt import Plan
from ..programs import invoke, printed, python

ROOT = Path(__file__).parents[2]
Check = Callable[..., tuple[int, str]]

FAKE_PART = """
import json, os, subprocess, sys, time
name = sys.argv[4]
print(json.dumps(["Times", "tensorrt", name, "1 x 16", "1", "2"]))
if name == "differs":
    print(json.dumps(["Checks", "tensorrt", "Labels.", "5 differ", "BAD"]))
print('["incompl')
print("what the part printed last", flush=True)
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Check]:
    """Runs the command with fake parts, on a machine with a GPU; gives exit code and output."""
    script = tmp_path / "part.py"
    script.write_text(FAKE_PART, encoding="utf-8")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: GPU)

    def check(**seconds: float) -> tuple[int, str]:
        monkeypatch.setattr(gpu_check, "PARTS", seconds)
        options = ["--output", str(tmp_path), "--seconds", str(sum(seconds.values()))]
        done = invoke(gpu_check.main, *options)
        return done.exit_code, done.output

    handler = signal.getsignal(signal.SIGTERM)
    yield check
    signal.signal(signal.SIGTERM, handler)


def ends(child: int) -> bool:
    for _ in range(200):
        process = Path(f"/proc/{child}/stat")
        if not process.exists() or process.read_text("utf-8").split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def states(output: Path) -> list[list[str]]:
    tables = json.loads((output / "gpu_check.json").read_text("utf-8"))["tables"]
    return [[part, state, reason] for part, state, _, reason in tables["Parts"]]


def test_a_part_that_crashes_or_hangs_does_not_lose_what_it_or_others_found(
    check: Check, tmp_path: Path
) -> None:
    code, output = check(hangs=1, works=60, crashes=60)
    child = (tmp_path / "logs" / "hangs.log").read_text("utf-8").split()[-1]
    assert (code, "error: hangs, crashes;" in output) == (1, True)
    assert (tmp_path / "gpu_check.md").read_text("utf-8") in output
    assert states(tmp_path) == [
        ["hangs", "stopped after 1 s", child],
        ["works", "done", ""],
        ["crashes", "failed with code -6", "what the part printed last"],
    ]
    for name in ("hangs", "works", "crashes"):
        assert f"| tensorrt | {name} | 1 x 16 | 1 | 2 |" in output
    assert ends(int(child))


def test_a_check_that_is_stopped_keeps_what_it_has(check: Check, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "hangs.log"

    def stop() -> None:
        while not (log.exists() and log.read_text("utf-8").count("\n") == 4):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, output = check(works=60, hangs=60, differs=60)
    assert (code, "error: hangs;" in output) == (1, True)
    child = log.read_text("utf-8").split()[-1]
    assert states(tmp_path) == [["works", "done", ""], ["hangs", "interrupted", child]]
    assert ends(int(child))


def test_exit_codes(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(works=60)[0] == 0
    code, output = check(works=60, differs=60)
    assert (code, "error: Labels. (tensorrt);" in output) == (1, True)
    monkeypatch.setattr(gpu_check, "why_skipped", lambda part: "it cannot run here")
    code, output = check(works=60)
    assert (code, "error: nothing was measured;" in output) == (1, True)
    assert states(tmp_path) == [["works", "skipped", "it cannot run here"]]


def test_time_that_a_part_does_not_use_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"skipped": 100.0, "quick": 10.0, "slow": 20.0, "other": 20.0, "last": 50.0}
    takes = {"quick": 4.0, "slow": 1000.0, "other": 20.0, "last": 1000.0}
    now = 0.0
    limits = {}

    def run_part(part: str, output: Path, limit: float) -> tuple[str, str, list[list[str]]]:
        nonlocal now
        limits[part] = limit
        now += min(takes[part], limit)
        return gpu_check.DONE, "", []

    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "why_skipped", lambda part: "x" if part == "skipped" else "")
    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    gpu_check.check(tmp_path, 200)
    assert limits == {"quick": 20, "slow": 40 + 16, "other": 40, "last": 100 + 20}
    assert now == 200


def test_what_cannot_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(gpu: CudaDevice, missing: str) -> list[str]:
        monkeypatch.setattr(gpu_check, "cuda_device", lambda: gpu)
        monkeypatch.setattr(type(BUILDERS["tensorrt-fp16"]), "why_not", lambda self: missing)
        parts = ("model", "measure tensorrt-rtx", "measure tensorrt")
        return [gpu_check.why_skipped(part) for part in parts]

    unknown = "TensorRT for RTX does not support compute capability 8.7"
    assert reasons(CudaDevice("Orin", "8.7"), "") == ["", unknown, ""]
    assert reasons(CudaDevice("a 4090", "8.9"), "it is missing") == ["", *["it is missing"] * 2]
    assert reasons(CudaDevice(error="there is no driver"), "") == ["there is no driver"] * 3


@pytest.fixture
def output(engine_copy: Callable[..., Path], tmp_path: Path) -> Path:
    """What the part `model` makes, but tiny."""
    models = tmp_path / "models"
    models.mkdir()
    chain = engine_copy(name="models/chain")
    (models / "one").mkdir()
    write_one_graph(chain, models / "one")
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 20]) for n in range(60)]
    (models / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "logs").mkdir()
    return tmp_path


def on_doubles(patch: pytest.MonkeyPatch, models: Path, library: str) -> Double:
    """Doubles that run the chain and what is packed; TensorRT for RTX really builds."""
    double = serve(patch, models / "chain", library)
    of_chain = double.trt.plans
    double.trt.plans = lambda content: of_chain(content) or packed_in(models, content)
    for module in (gpu_check, bare_plan):
        patch.setattr(module, "cuda", lambda device: double.cuda)
    patch.setattr(gpu_check, "cuda_device", lambda: GPU)
    patch.setattr(gpu_check, "SHAPES", (Bucket(1, 16), Bucket(1, 64), Bucket(4, 64)))
    patch.setattr(gpu_check, "DEPTHS", (0.9, 0.8))
    patch.setattr(gpu_check, "TIMED_SECONDS", 0.0)
    return double


def packed_in(models: Path, content: bytes) -> Plan | None:
    """The packed plan with this content, or that begins with it."""
    for path in models.glob("p*/fpabee.json"):
        record = json.loads(path.read_bytes())["plan"]
        if path.with_name(record["file"]).read_bytes().startswith(content):
            names = {"file": record["onnx"], "sha256": record["onnx_sha256"]}
            graph = msgspec.convert(record | names, Graph)
            shapes = msgspec.convert(record["shapes"], Shapes)
            return Plan(path.with_name(graph.file), graph, (shapes,))
    return None


def found(output: Path, part: str) -> list[list[str]]:
    """What a part finds in this process."""
    lines = printed(gpu_check.main, "--output", output, "--part", part).splitlines()
    return [json.loads(line) for line in lines]


def build_and_measure(output: Path, library: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        double = on_doubles(patch, output / "models", library)
        (output / "models" / f"plain-{library}").mkdir()  # for another GPU
        steps = [row[1:4] for row in found(output, f"build {library}")]
        built = ("chain", f"plain-{library}", f"packed-{library}")
        assert steps == [[library, what, "build"] for what in built]
        assert found(output, f"build {library}") == [], "it is kept"
        rows = found(output, f"measure {library}")
        tables = list(dict.fromkeys(row[0] for row in rows))
        assert tables == ["First times", "Times", "Checks"], "it measures before it judges"
        shapes = ["1 x 16", "1 x 64", "4 x 64"]
        ways = ["without exits", "packed plan", "chain"]
        first = [row[2:4] for row in rows if row[0] == gpu_check.FIRST]
        assert first == [[way, step] for way in ways for step in ["load", *shapes]]
        times = [row[2:] for row in rows if row[0] == gpu_check.TIMES]
        stops = ("never", "half-way", "all stop at exit 1")
        names = [ways[0], *(f"{way}, {stop}" for way in ways[1:] for stop in stops)]
        assert [row[:2] for row in times] == [[name, each] for each in shapes for name in names]
        assert all(0 < float(p50) <= float(p99) for *_, p50, p99 in times)
        *checks, last = [row[2:] for row in rows if row[0] == gpu_check.CHECKS]
        assert [last[2], len(checks)] == [gpu_check.GOOD, 9]
        for check, words, verdict in checks:
            assert verdict == gpu_check.GOOD, words
            assert ("2 exits are used" in words) != ("half-way" in check)
        packed = [each for each in double.trt.contexts if "attention_mask" in each.shapes]
        assert len(packed) == 2 * len(shapes), "one for each plan and shape"
        cuda = double.cuda
        assert not any((cuda.memory_of, cuda.streams, cuda.events, cuda.freed_elsewhere))
        patch.setattr(bare_plan, "settings_of", lambda *_: {})
        verdicts = [row[-1] for row in found(output, f"measure {library}") if row[0] == "Checks"]
        assert verdicts == [*3 * ["good", "BAD", "BAD"], "good"], "the packed plan stops elsewhere"


def test_a_library_is_measured_and_judged(output: Path) -> None:
    build_and_measure(output, "tensorrt")


@pytest.mark.usefixtures("rtx")
def test_only_the_part_that_makes_the_model_needs_pytorch(output: Path) -> None:
    for package in ("torch", "transformers"):
        (output / f"{package}.py").write_text(f"raise ImportError('there is no {package}')")
    script = f"import {__name__} as t; t.build_and_measure(t.Path({str(output)!r}), 'tensorrt-rtx')"
    path = os.pathsep.join([str(output), *sys.path])
    python(script, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def test_a_plan_runs_with_any_settings_and_is_freed_in_order(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = output / "models" / "chain"
    double = on_doubles(monkeypatch, output / "models", RTX)
    monkeypatch.setattr(
        plan, "build_in_worker", lambda request, *_: Path(request.plan).write_bytes(b"." * 96)
    )
    options = PlanOptions(compute_capabilities=("8.6",))
    packed = pack(chain, output / "models" / "packed", f"{RTX}-fp16", plans=options).file.parent
    with Engine.load(chain, FP32_TARGET) as engine:
        rows = engine.core.encode(["the film is not good", "rain", "music"])
        bare = bare_plan.BarePlan(packed, RTX, engine.manifest, gpu_check.SHAPES)
        for number in (3, 1, 2):
            rule = engine.rule.with_stop_threshold(0.0).capped(number)
            for some in (rows[:1], rows):
                answers = bare.prepare(some, rule)()
                assert set(answers["exit"]) == {number}
                expected = gpu_check.prepared(engine, some, rule)()["logits"]
                np.testing.assert_allclose(answers["logits"], expected, atol=0.05)
    assert len(double.trt.contexts) == 2, "one for each shape"
    bare.close()
    kinds = list(dict.fromkeys(each.removeprefix("Fake") for each in double.cuda.freed))
    assert kinds == ["Context", "Engine", "RuntimeConfig", "RuntimeCache", "Runtime"]
    cuda = double.cuda
    assert not any((cuda.memory_of, cuda.streams, cuda.events, cuda.freed_elsewhere))
    double.trt.plans = lambda content: None
    with pytest.raises(BackendError, match="cannot be loaded: Version tag"):
        bare_plan.BarePlan(packed, RTX, engine.manifest, gpu_check.SHAPES)


def test_wrong_answers_are_bad() -> None:
    right: Any = {"logits": np.ones((60, 4), np.float32), "exit": np.arange(60) % 3}
    assert gpu_check.compared(right, right)[1] == gpu_check.GOOD
    for name, wrong in (("exit", right["exit"] % 2), ("logits", 1.1), ("logits", np.nan)):
        answers = right | {name: np.full_like(right[name], wrong)}
        assert gpu_check.compared(answers, right)[1] == gpu_check.BAD


def test_a_server_is_measured(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SERVED_SECONDS", 0.5)
    monkeypatch.setattr(gpu_check, "CLIENTS", (1, 8))
    monkeypatch.setattr(gpu_check, "target_in", lambda *_: FP32_TARGET)
    _, *times = gpu_check.serve(output / "models", "tensorrt")
    for clients, (table, _, name, _, p50, p99) in zip((1, 8), times, strict=True):
        assert table == gpu_check.TIMES
        assert re.fullmatch(rf"server, {clients} clients: [1-9]\d* texts/s", str(name))
        assert 0 < float(p50) <= float(p99)


def test_the_images_install_extras_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for path in sorted((ROOT / "scripts").glob("Dockerfile*")):
        text = path.read_text("utf-8")
        named = re.findall(r'(?:EXTRAS=|"\.\[)([\w,-]+)', text)
        assert named, path
        assert set(",".join(named).split(",")) <= set(project["optional-dependencies"]), path
        for variable in ("XDG_CACHE_HOME", "CUDA_CACHE_PATH"):  # the user has no home directory
            assert re.search(rf"^ENV .*{variable}=/cache", text, re.MULTILINE), path
