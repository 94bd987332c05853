"""The parts and the report of `scripts/gpu_check.py`, on doubles of a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
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
from bare_plan import BarePlan
from click.testing import CliRunner
from one_graph import write_one_graph

from fpabee.exporter.single_file import pack, plan
from fpabee.exporter.targets import PlanOptions, tensorrt
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.runtime import Bucket, Engine
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import Graph, Shapes
from fpabee.runtime.errors import BackendError
from fpabee.runtime.machine import CudaDevice

from ..conftest import WORDS
from ..doubles.device import GPU, Double, serve
from ..doubles.tensorrt import Plan

ROOT = Path(__file__).parents[2]

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
if name == "fails":
    sys.exit(1)
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the command with fake parts, on a machine with a GPU; gives exit code and output."""
    script = tmp_path / "part.py"
    script.write_text(FAKE_PART, encoding="utf-8")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: GPU)

    def check(**seconds: float) -> tuple[int, str]:
        monkeypatch.setattr(gpu_check, "PARTS", seconds)
        options = ["--output", str(tmp_path), "--seconds", str(sum(seconds.values()))]
        done = CliRunner().invoke(gpu_check.main, options)
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


def test_a_part_that_crashes_or_hangs_does_not_lose_what_it_or_others_found(
    check: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    states = {
        "works": "done",
        "crashes": "failed with code -6",
        "fails": "failed with code 1",
        "hangs": "stopped after 1 s",
    }
    code, output = check(hangs=1, **dict.fromkeys(list(states)[:3], 60))
    assert code == 1
    assert "error: hangs, crashes, fails; see" in output
    report = (tmp_path / "gpu_check.md").read_text("utf-8")
    assert report in output
    record = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    assert {part: state for part, state, *_ in record["tables"]["Parts"]} == states
    for name, state in states.items():
        assert f"| tensorrt | {name} | 1 x 16 | 1 | 2 |" in report
        reason = {"works": "", "hangs": r"\d+"}.get(name, "what the part printed last")
        assert re.search(rf"\| {name} \| {state} \| \d+ \| {reason} \|", report)
    assert ends(int((tmp_path / "logs" / "hangs.log").read_text("utf-8").split()[-1]))


def test_a_check_that_is_stopped_keeps_what_it_has(
    check: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "hangs.log"

    def stop() -> None:
        while not (log.exists() and log.read_text("utf-8").count("\n") == 4):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, output = check(works=60, hangs=60, differs=60)
    assert code == 1
    assert "error: hangs;" in output
    assert "| hangs | interrupted |" in output
    assert "differs" not in output
    assert ends(int(log.read_text("utf-8").split()[-1]))


def test_exit_codes(check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(works=60)[0] == 0
    for part, error in (("fails", "error: fails;"), ("differs", "error: Labels. (tensorrt);")):
        code, output = check(works=60, **{part: 60})
        assert code == 1
        assert error in output
    monkeypatch.setattr(gpu_check, "why_skipped", lambda part: "it cannot run here")
    code, output = check(works=60)
    assert code == 1
    assert "error: nothing was measured;" in output
    monkeypatch.undo()
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: CudaDevice(error="there is no driver"))
    assert gpu_check.why_skipped("model") == "there is no driver"


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
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now)
    gpu_check.check(tmp_path, 200)
    assert limits == {"quick": 20, "slow": 40 + 16, "other": 40, "last": 100 + 20}
    assert now == 200


def test_the_plan_of_parts_takes_ten_minutes_and_prefers_no_library() -> None:
    parts = [part.split() for part in gpu_check.PARTS]
    assert sum(gpu_check.PARTS.values()) <= 600
    assert parts[0] == ["model"]
    for library in ("tensorrt-rtx", "tensorrt"):
        own = [name for name, *others in parts if others == [library]]
        assert own == ["build", "measure", "server"], "it measures what it has built"


@pytest.mark.parametrize("capability", ["8.7", "9.0"])
def test_gpus_without_tensorrt_for_rtx_build_with_tensorrt(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: CudaDevice("Orin", capability, (12, 6)))
    monkeypatch.setattr(type(BUILDERS["tensorrt-fp16"]), "why_not", lambda self: None)
    assert f"not support compute capability {capability}" in gpu_check.why_skipped(
        "measure tensorrt-rtx"
    )
    assert gpu_check.why_skipped("measure tensorrt") == ""
    error = ValueError("it is not installed")
    monkeypatch.setattr(type(BUILDERS["tensorrt-fp16"]), "why_not", lambda self: error)
    assert gpu_check.why_skipped("measure tensorrt") == "it is not installed"


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
    if library == "tensorrt":

        def build(module: str, request: PlanRequest, **environment: str) -> str:
            """Plans differ as their graphs do."""
            double.build(module, request, **environment)
            Path(request.plan).write_bytes(sha256_of(Path(request.onnx)).encode().ljust(96, b"."))
            return ""

        patch.setattr(tensorrt, "run_worker", build)
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
        record = msgspec.json.decode(path.read_bytes())["plan"]
        if path.with_name(record["file"]).read_bytes().startswith(content):
            graph = {"file": record["onnx"], "sha256": record["onnx_sha256"]}
            specs = {name: record[name] for name in ("inputs", "outputs")}
            return Plan(
                path.with_name(record["onnx"]),
                msgspec.convert(graph | specs, Graph),
                (msgspec.convert(record["shapes"], Shapes),),
            )
    return None


def found(output: Path, part: str) -> list[list[str]]:
    """What a part finds in this process."""
    options = ["--output", str(output), "--part", part]
    done = CliRunner().invoke(gpu_check.main, options, catch_exceptions=False)
    return [json.loads(line) for line in done.output.splitlines()]


def build_and_measure(output: Path, library: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        double = on_doubles(patch, output / "models", library)
        built = found(output, f"build {library}")
        steps = ["chain", f"plain-{library}", f"packed-{library}"]
        assert [row[:4] for row in built] == [
            [gpu_check.FIRST, library, what, "build"] for what in steps
        ]
        assert found(output, f"build {library}") == [], "it is kept"
        before = len(double.trt.contexts)
        rows = found(output, f"measure {library}")
        tables = [row[0] for row in rows]
        order = [gpu_check.FIRST, gpu_check.TIMES, gpu_check.CHECKS]
        assert tables == sorted(tables, key=order.index), "it measures before it judges"
        first = [row[2:] for row in rows if row[0] == gpu_check.FIRST]
        ways = ("without exits", "packed plan", "chain")
        shapes = ["1 x 16", "1 x 64", "4 x 64"]
        assert [row[:2] for row in first] == [[w, s] for w in ways for s in ["load", *shapes]]
        stops = ("never", "half-way", "all stop at exit 1")
        names = {ways[0], *(f"{way}, {stop}" for way in ways[1:] for stop in stops)}
        times = [row[2:] for row in rows if row[0] == gpu_check.TIMES]
        assert {(name, shape) for name, shape, *_ in times} == {
            (n, s) for n in names for s in shapes
        }
        assert all(0 < float(p50) <= float(p99) for *_, p50, p99 in times)
        checks = [row for row in rows if row[0] == gpu_check.CHECKS]
        assert len(checks) == 9
        for _, _, check, words, verdict in checks:
            assert verdict == gpu_check.GOOD, words
            assert ("2 exits are used" in words) != ("half-way" in check)
        made = [each for each in double.trt.contexts[before:] if "input_ids" in each.shapes]
        packed = [each.shapes for each in made if "attention_mask" in each.shapes]
        assert len(packed) == 2 * len(shapes), "one for each plan and shape"
        left = (double.cuda.memory_of, double.cuda.streams, double.cuda.events)
        assert not any(left)
        assert not double.cuda.freed_elsewhere
        patch.setattr(bare_plan, "settings_of", lambda *_: {})
        verdicts = [row[-1] for row in found(output, f"measure {library}") if row[0] == "Checks"]
        assert verdicts == 3 * [gpu_check.GOOD, gpu_check.BAD, gpu_check.BAD], "it stops elsewhere"


def test_a_library_is_measured_and_judged(output: Path) -> None:
    build_and_measure(output, "tensorrt")


def test_only_the_part_that_makes_the_model_needs_pytorch(output: Path) -> None:
    for package in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    for package in ("torch", "transformers"):
        (output / f"{package}.py").write_text(f"raise ImportError('there is no {package}')")
    script = f"import {__name__} as t; t.build_and_measure(t.Path({str(output)!r}), 'tensorrt-rtx')"
    path = os.pathsep.join([str(output), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True
    )


@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
def test_a_plan_runs_with_any_settings_and_is_freed_in_order(
    library: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = output / "models" / "chain"
    double = on_doubles(monkeypatch, output / "models", library)
    monkeypatch.setattr(
        plan, "build_in_worker", lambda request, *_: Path(request.plan).write_bytes(b"." * 96)
    )
    options = PlanOptions(compute_capabilities=("8.6",))
    packed = pack(chain, output / "models" / "packed", f"{library}-fp16", plans=options).file.parent
    with Engine.load(chain, FP32_TARGET) as engine:
        rows = engine.core.encode(["the film is not good", "rain", "music"])
        bare = BarePlan(packed, library, engine.manifest, gpu_check.SHAPES)
        for number in (3, 1, 2):
            rule = engine.rule.with_stop_threshold(0.0).capped(number)
            for some in (rows[:1], rows):
                answers = bare.prepare(some, rule)()
                assert set(answers["exit"]) == {number}
                expected = gpu_check.prepared(engine, some, rule)()["logits"]
                np.testing.assert_allclose(answers["logits"], expected, atol=0.05)
    assert len(double.trt.contexts) == 2, "one for each shape"
    bare.close()
    made_with = ["FakeRuntimeConfig", "FakeRuntimeCache"] if library == "tensorrt-rtx" else []
    assert double.cuda.freed == [*2 * ["FakeContext"], "FakeEngine", *made_with, "FakeRuntime"]
    left = (double.cuda.memory_of, double.cuda.streams, double.cuda.events)
    assert not any(left)
    assert not double.cuda.freed_elsewhere
    double.trt.plans = lambda content: None
    with pytest.raises(BackendError, match="cannot be loaded: Version tag does not match"):
        BarePlan(packed, library, engine.manifest, gpu_check.SHAPES)


def test_wrong_answers_are_bad() -> None:
    right = {"logits": np.ones((60, 4), np.float32), "exit": np.arange(60) % 3}
    assert gpu_check.compared(right, right)[1] == gpu_check.GOOD
    for name, wrong in (("exit", right["exit"] % 2), ("logits", 1.1), ("logits", np.nan)):
        answers = right | {name: np.full_like(right[name], wrong)}
        assert gpu_check.compared(answers, right)[1] == gpu_check.BAD


def test_a_server_is_measured(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SERVED_SECONDS", 0.5)
    monkeypatch.setattr(gpu_check, "CLIENTS", (1, 8))
    monkeypatch.setattr(gpu_check, "target_in", lambda *_: FP32_TARGET)
    started, *times = gpu_check.serve(output / "models", "tensorrt")
    assert started[:4] == (gpu_check.FIRST, "tensorrt", "server", "start")
    for clients, (table, _, name, _, p50, p99) in zip((1, 8), times, strict=True):
        assert table == gpu_check.TIMES
        speed = re.fullmatch(rf"server, {clients} clients: (\d+) texts/s", name)
        assert speed
        assert int(speed[1]) > 0
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
