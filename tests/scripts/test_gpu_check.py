"""The parts and the report of `scripts/gpu_check.py`, without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from one_graph import write_one_graph

from fpabee.exporter.single_file import pack, packing, plan
from fpabee.exporter.targets import PlanOptions
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import Bucket, Engine
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import Graph, Shapes
from fpabee.runtime.machine import CudaDevice

from ..conftest import WORDS
from ..doubles.cuda import FakeCuda
from ..doubles.device import GPU, install
from ..doubles.tensorrt import Plan, plans_of

ROOT = Path(__file__).parents[2]
PACKED = b"packed plan".ljust(96, b".")

FAKE_PART = """
import json, os, subprocess, sys, time
from pathlib import Path
output, name = Path(sys.argv[2]), sys.argv[6]
lines = [json.dumps(["note", name])]
if name.endswith("skips"):
    lines.append(json.dumps(["skipped", "TensorRT is not installed"]))
if name == "differs":
    lines.append(json.dumps(["Checks", "tensorrt", "Labels.", "5 differ", "BAD"]))
(output / "logs" / f"{name}.jsonl").write_text("\\n".join(lines) + '\\n["incompl')
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
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of results of fake parts, on a machine with a GPU."""
    part = tmp_path / "part.py"
    part.write_text(FAKE_PART, encoding="utf-8")
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(gpu_check, "__file__", str(part))
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: GPU)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.1)
    return tmp_path


def ends(child: int) -> bool:
    for _ in range(200):
        process = Path(f"/proc/{child}/stat")
        if not process.exists() or process.read_text("utf-8").split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def states(output: Path) -> dict[str, str]:
    record = json.loads((output / "gpu_check.json").read_text("utf-8"))
    return {part: state for part, state, *_ in record["tables"]["Parts"]}


def test_a_part_that_crashes_or_hangs_does_not_lose_what_it_or_others_found(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the part that hangs is in proportion to that of the whole."""
    reasons = {
        "works": ("done", ""),
        "crashes": ("failed", "it was ended by signal 6: what the part printed last; "),
        "fails": ("failed", "it ended with code 1: what the part printed last; "),
        "skips": ("skipped", "TensorRT is not installed; "),
        "hangs": ("stopped", "it took longer than 1 seconds; "),
    }
    seconds = dict.fromkeys(reasons, 500.0) | {"hangs": 9.0}
    monkeypatch.setattr(gpu_check, "PARTS", seconds)
    monkeypatch.setattr(gpu_check, "SECONDS", 525.0)
    assert gpu_check.check(fake, "minilm", 60) == ["crashes", "fails", "hangs"]
    assert states(fake) == {name: state for name, (state, _) in reasons.items()}
    text = (fake / "gpu_check.md").read_text("utf-8")
    for name, (state, reason) in reasons.items():
        assert re.search(rf"\| {name} \| {state} \| \d+ s \| {reason}{name} \|", text)
    assert ends(int((fake / "logs" / "hangs.log").read_text("utf-8").split()[-1]))


def test_a_check_that_measures_nothing_is_bad(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PARTS", {"works": 500.0, "measure-skips": 500.0})
    assert gpu_check.check(fake, "minilm", 60) == ["nothing was measured"]


@pytest.fixture
def run(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs the command with some parts."""

    def run(*parts: str) -> Any:
        monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys(parts, 500.0))
        return CliRunner().invoke(gpu_check.main, ["--output", str(fake)])

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def test_a_check_that_is_stopped_keeps_what_it_has(fake: Path, run: Callable[..., Any]) -> None:
    log = fake / "logs" / "hangs.log"

    def stop() -> None:
        while not (log.exists() and log.read_text("utf-8").count("\n") == 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert "error: hangs;" in run("works", "hangs", "skips").output
    assert states(fake) == {"works": "done", "hangs": "interrupted"}
    assert "the check was stopped; hangs |" in (fake / "gpu_check.md").read_text("utf-8")
    assert ends(int(log.read_text("utf-8").split()[-1]))


def test_exit_codes(fake: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("works", "skips").exit_code == 0
    for bad, says in (("fails", "error: fails"), ("differs", r"error: Labels\. \(tensorrt\)")):
        done = run("works", bad)
        assert done.exit_code == 1
        assert re.search(says, done.output)
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: CudaDevice(error="there is no driver"))
    done = run("works")
    assert done.exit_code == 1
    assert "there is no driver" in done.output
    assert states(fake) == {"works": "skipped"}


def test_the_plan_of_parts_takes_ten_minutes_and_prefers_no_library() -> None:
    parts = [part.split() for part in gpu_check.PARTS]
    assert gpu_check.SECONDS <= 600
    assert parts[:2] == [["driver"], ["model"]]
    for library in ("tensorrt-rtx", "tensorrt"):
        own = [name for name, *others in parts if others == [library]]
        assert own == ["build", "measure", "server"], "it measures what it has built"


@pytest.mark.parametrize("works", [True, False])
def test_the_driver_is_tried(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FakeCuda()
    if not works:
        monkeypatch.setattr(calls, "gather", lambda *_: None)
    monkeypatch.setattr(gpu_check, "cuda", lambda device: calls)
    rows: list[tuple[str, ...]] = []
    gpu_check.smoke(lambda *row: rows.append(row))
    assert rows[-1][0] == gpu_check.CHECKS
    assert rows[-1][-1] == (gpu_check.GOOD if works else gpu_check.BAD)
    left = [*calls.memory_of, *calls.streams, *calls.events]
    assert left == []


@pytest.mark.parametrize("capability", ["8.7", "9.0"])
def test_gpus_without_tensorrt_for_rtx_build_with_tensorrt(
    capability: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: CudaDevice("Orin", capability, (12, 6)))
    monkeypatch.setattr(type(BUILDERS["tensorrt-fp16"]), "why_not", lambda self: None)
    with pytest.raises(gpu_check.Skipped, match=f"not support compute capability {capability}"):
        gpu_check.build(model, "tensorrt-rtx", print)
    targets: list[str] = []
    result = SimpleNamespace(refused={})

    def build_targets(folder: Path, names: list[str], plans: PlanOptions) -> SimpleNamespace:
        targets.extend(names)
        return result

    monkeypatch.setattr(gpu_check, "build_targets", build_targets)
    monkeypatch.setattr(gpu_check, "pack", lambda *_, **__: None)
    gpu_check.build(model, "tensorrt", lambda *_: None)
    assert targets == ["tensorrt-fp16", "tensorrt-fp16"]


@pytest.fixture
def model(engine_copy: Callable[..., Path], tmp_path: Path) -> Path:
    """What the part `model` makes, but tiny."""
    chain = engine_copy(name="chain")
    one = tmp_path / "one"
    one.mkdir()
    write_one_graph(chain, one)
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 20]) for n in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
def test_a_library_is_measured_and_judged(
    library: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (Bucket(1, 16), Bucket(4, 32))
    monkeypatch.setattr(gpu_check, "SHAPES", shapes)
    monkeypatch.setattr(gpu_check, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(gpu_check, "REPEATS", 3)
    one = install(monkeypatch, model / "one", backend=library)
    plan = model / "one" / "targets" / one.target / "segment_01.plan"
    plan.write_bytes(b"plan of all layers".ljust(96, b"."))
    one.change_plan("segment_01", sha256=sha256_of(plan))
    chain = install(monkeypatch, model / "chain", backend=library)
    finders = (plans_of(model / "one"), plans_of(model / "chain"), partial(packed_in, model))
    chain.trt.plans = lambda content: next((p for find in finders if (p := find(content))), None)
    monkeypatch.setattr(gpu_check, "cuda", lambda device: chain.cuda)
    pack_for(library, model, monkeypatch)
    rows: list[tuple[str, ...]] = []
    gpu_check.measure(model, library, lambda *row: rows.append(row))
    tables = [row[0] for row in rows]
    assert tables == sorted(tables, reverse=True), "it measures before it judges"
    names = {row[2] for row in rows if row[0] == gpu_check.TIMES}
    assert names == {
        "plain engine",
        *(
            f"{way}, {stop}"
            for way in ("chain", "packed plan")
            for stop in ("all stop at exit 1", "half-way", "never")
        ),
    }
    for table, _, *_, found, last in rows:
        if table == gpu_check.TIMES:
            assert 0 < float(found) <= float(last)
        else:
            assert last == gpu_check.GOOD, found
    assert tables.count(gpu_check.TIMES) == len(names) * len(shapes)
    assert list(chain.cuda.memory_of) == [], "memory of bare plans is freed"
    with Engine.load(model / "one", FP32_TARGET) as usual:
        encoded = gpu_check.exact_rows(usual, model, shapes[1])
        bare = gpu_check.plain_engine(model / "one", library, encoded, shapes[1])
        bare.run()
        expected = usual.run_encoded(encoded, usual.rule).logits[-1]
        np.testing.assert_allclose(bare.outputs["logits"], expected, atol=1e-5)
        for number in (1, 3):
            packed = gpu_check.packed_plan(model, library, encoded, number)
            packed.run()
            assert set(packed.outputs["exit"]) == {number}
        np.testing.assert_allclose(packed.outputs["logits"], expected, atol=1e-5)


def pack_for(library: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the part `build` packs, but nothing is built."""
    target = f"{library}-fp32"
    monkeypatch.setattr(packing, "_PLANS", [target])
    monkeypatch.setattr(type(BUILDERS[target]), "why_not", lambda self: None)
    monkeypatch.setattr(
        plan,
        "build_in_worker",
        lambda request, *_: Path(request.plan).write_bytes(PACKED),
    )
    options = PlanOptions((1, 2, 64), (8, 16, 32), ("8.6",))
    pack(model / "chain", model / f"packed-{library}", target, plans=options)


def packed_in(model: Path, content: bytes) -> Plan | None:
    """The packed plan, if this is its content or begins it."""
    if not PACKED.startswith(content):
        return None
    (path,) = model.glob("packed-*/fpabee.json")
    record = msgspec.json.decode(path.read_bytes())["plan"]
    graph = {"file": record["onnx"], "sha256": record["onnx_sha256"]}
    specs = {name: record[name] for name in ("inputs", "outputs")}
    return Plan(
        path.with_name(record["onnx"]),
        msgspec.convert(graph | specs, Graph),
        (msgspec.convert(record["shapes"], Shapes),),
    )


def test_wrong_answers_are_bad(model: Path) -> None:
    texts = (model / "texts.txt").read_text("utf-8").splitlines()
    with Engine.load(model / "chain") as engine:
        full = engine.trace(texts)
        shifted = replace(full, exits=full.exits * 0, logits=full.logits + 1)
        wrong: Any = SimpleNamespace(
            manifest=engine.manifest,
            trace=lambda texts, rule=None: full if rule is None else shifted,
        )
        for check in (gpu_check.same_exits, gpu_check.same_logits):
            found, good = check(wrong, texts)
            assert not good, found


def test_a_server_is_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SERVED_SECONDS", 0.5)
    monkeypatch.setattr(gpu_check, "CLIENTS", (1, 8))
    monkeypatch.setattr(gpu_check, "target_in", lambda *_: FP32_TARGET)
    rows: list[tuple[str, ...]] = []
    gpu_check.serve(model, "tensorrt", lambda *row: rows.append(row))
    _, *times = rows
    assert [row[:3] for row in times] == [(gpu_check.SERVER, "tensorrt", n) for n in ("1", "8")]
    for _, _, _, speed, p50, p99 in times:
        assert float(speed) > 0
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
