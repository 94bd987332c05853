"""The parts and the report of `scripts/gpu_check`, without a GPU."""

from __future__ import annotations

import inspect
import json
import os
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.merge import write_one_graph
from fpabee.runtime import Engine, VerificationError, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.encoding import padding_values

from ..conftest import WORDS
from ..doubles.device import GPU, install, install_cuda_provider, serve
from ..doubles.polygraphy import serve_polygraphy
from ..doubles.tensorrt import plans_of

ROOT = Path(__file__).parents[2]
TARGET = "onnxruntime-fp32-cuda"

FAKE_PART = """
import json, os, subprocess, sys, time
name, results = sys.argv[1], sys.argv[-1]
lines = [json.dumps({"what": "measured", "by": name})]
if name == "skips":
    lines.append(json.dumps({"skipped": "TensorRT is not installed"}))
with open(results, "w") as stream:
    stream.write("\\n".join(lines) + '\\n{"incompl')
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

Results = list[dict[str, Any]]
Load = Callable[[str], ModuleType]


@pytest.fixture
def script(load_script: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with fake parts, on a machine with a GPU."""
    module = load_script("gpu_check")
    part = tmp_path / "part.py"
    part.write_text(FAKE_PART, encoding="utf-8")
    monkeypatch.setattr(module, "SCRIPT", part)
    monkeypatch.setattr(module, "cuda_device", lambda: GPU)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.1)
    return module


def _stages(script: ModuleType, *stages: tuple[str, ...], seconds: float = 30) -> Any:
    return [[script.Part(name, seconds) for name in stage] for stage in stages]


def _states(report: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in report["parts"]}


def test_a_part_that_crashes_does_not_lose_the_results_of_others_or_its_own(
    script: ModuleType, tmp_path: Path
) -> None:
    stages = _stages(script, ("works", "crashes"), ("fails",), ("skips",))
    report = script.check(tmp_path / "out", 60, stages)
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text("utf-8")) == report
    expected = {"works": "done", "crashes": "failed", "fails": "failed", "skips": "skipped"}
    assert _states(report) == expected
    works, crashes, fails, skips = report["parts"]
    for entry in report["parts"]:
        assert entry["results"] == [{"what": "measured", "by": entry["name"]}]
    assert works["reason"] == ""
    assert "signal 6: what the part printed last" in crashes["reason"]
    assert fails["reason"] == "it ended with code 1: what the part printed last"
    assert skips["reason"] == "TensorRT is not installed"


def test_a_part_that_takes_too_long_is_stopped_with_what_it_started(
    script: ModuleType, tmp_path: Path
) -> None:
    stages = [*_stages(script, ("hangs",), seconds=5), *_stages(script, ("works",))]
    report = script.check(tmp_path, 60, stages)
    assert _states(report) == {"hangs": "stopped", "works": "done"}
    assert report["parts"][0]["reason"] == "it took longer than 5 seconds"
    assert report["parts"][0]["results"] == [{"what": "measured", "by": "hangs"}]
    child = int((tmp_path / "logs" / "hangs.log").read_text("utf-8").split()[-1])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text("utf-8").split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child process still runs")


def test_the_whole_has_a_limit(script: ModuleType, tmp_path: Path) -> None:
    report = script.check(tmp_path, 4, _stages(script, ("hangs",), ("works",)))
    assert _states(report) == {"hangs": "stopped", "works": "skipped"}
    assert report["parts"][1]["reason"] == "no time was left"
    first = script.STAGES[:4]
    libraries = {part.name.split()[0] for stage in first for part in stage if "mini" in part.name}
    assert libraries == {"model", "plans", "onnxruntime", "pytorch"}, "the small model comes first"
    total = sum(max(part.seconds for part in stage) for stage in first)
    assert total <= 525, "the most important stages do not fit"


def test_the_parts_of_a_longer_check_have_more_time(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {}

    def run_part(part: Any, *rest: Any) -> Any:
        limits[part.name] = part.seconds
        return script._entry(part, "done", "")

    monkeypatch.setattr(script, "run_part", run_part)
    done = CliRunner().invoke(script.main, ["--output", str(tmp_path), "--seconds", "5250"])
    assert done.exit_code == 0
    assert limits == {part.name: 10 * part.seconds for stage in script.STAGES for part in stage}


def test_without_a_gpu_all_parts_are_skipped(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "cuda_device", lambda: CudaDevice(error="there is no driver"))
    done = CliRunner().invoke(script.main, ["--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "nothing ran on a GPU: there is no driver" in done.output
    report = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    assert len(report["parts"]) == sum(map(len, script.STAGES))
    assert {entry["reason"] for entry in report["parts"]} == {"there is no driver"}
    table = (tmp_path / "gpu_check.md").read_text("utf-8")
    assert table.startswith("# fpabee on no GPU: there is no driver\n")
    assert "| tests | skipped |" in table


def test_exit_codes(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, code in ((("works", "skips"), 0), (("works", "fails"), 1)):
        monkeypatch.setattr(script, "STAGES", _stages(script, names))
        done = CliRunner().invoke(script.main, ["--output", str(tmp_path)])
        assert done.exit_code == code, done.output
    assert "error: fails did not finish" in done.output
    assert CliRunner().invoke(script.main, ["--minutes", "9"]).exit_code == 2
    monkeypatch.setattr(script, "cuda_device", lambda: CudaDevice(error="there is no driver"))
    monkeypatch.setattr(script, "MODELS", _stages(script, ("works",))[0])
    assert CliRunner().invoke(script.main, ["--prepare", "--output", str(tmp_path)]).exit_code == 0


@pytest.fixture
def models(engine_copy: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder as the part `model` makes it, for a tiny model."""
    chain = engine_copy(name="chain")
    (tmp_path / "one").mkdir()
    write_one_graph(chain, tmp_path / "one")
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 20]) for n in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return tmp_path


@pytest.fixture(params=["onnxruntime", "tensorrt"])
def measure(
    request: pytest.FixtureRequest,
    load_script: Load,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[ModuleType, str]:
    """The measurement with few repetitions, and the name of a target on a double."""
    module = load_script("gpu_check_measure")
    monkeypatch.setattr(module, "TOKENS", (16, 32))
    monkeypatch.setattr(module, "ROWS", 6)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    if request.param == "onnxruntime":
        install_cuda_provider(monkeypatch, models / "one")
        double = install_cuda_provider(monkeypatch, models / "chain")
    else:
        one = install(monkeypatch, models / "one")
        for name, file in read_manifest(models / "one").targets[one.target].files.items():
            path = models / "one" / file.file
            path.write_bytes(path.read_bytes() + b"of one")  # other bytes than those of the chain
            one.change_plan(name, sha256=sha256_of(path))
        double = install(monkeypatch, models / "chain")
        chain_plans = double.trt.plans
        double.trt.plans = lambda content: chain_plans(content) or one.trt.plans(content)
    monkeypatch.setattr(module, "cuda", lambda: double.cuda)
    return module, double.target


def _measured(module: ModuleType, folder: Path, target: str) -> Results:
    results: Results = []
    module.measure(folder, target, lambda **result: results.append(result))
    return results


def test_a_target_is_measured(measure: tuple[ModuleType, str], models: Path) -> None:
    module, target = measure
    results = _measured(module, models, target)
    times = {(r["variant"], r["tokens"]): r for r in results if r["what"] == "latency"}
    variants = [module.ENGINE, module.STEPWISE, module.WITH_RULE]
    notes = [r for r in results if r["what"] == "not measured"]
    assert notes == []
    assert set(times) == {(variant, tokens) for variant in variants for tokens in (16, 32)}
    for found in times.values():
        assert found["runs"] == 12
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        assert found["cpu_ms"] > 0
        assert found["captured"] == (0.0 if target == TARGET else 1.0)
    depths = [times[module.WITH_RULE, tokens]["mean_depth"] for tokens in (16, 32)]
    assert all(1 <= depth < 3 for depth in depths)
    assert {r["variant"] for r in results if r["what"] == "throughput"} == set(variants)
    loads = {r["variant"]: r for r in results if r["what"] == "load"}
    assert loads[module.STEPWISE]["mib"] >= 0
    parity = {r["variant"]: r for r in results if r["what"] == "parity"}
    assert set(parity) == set(variants) - {module.ENGINE, module.WITH_RULE}
    for found in parity.values():
        assert len(found["exits"]) == 3
        assert max(found["exits"]) < 1e-3
        assert not found["verdict"].startswith("refused")


def test_captured_segments_and_driver_calls_are_counted(
    load_script: Load,
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = load_script("gpu_check_measure")
    double = install(monkeypatch, engine_copy())
    monkeypatch.setattr(module, "cuda", lambda: double.cuda)
    with double.load() as engine:
        run, rows = module.full_depth(engine), engine.encode(["turn on the lights"])
        found = [module._driver_calls(run, rows) for _ in range(4)]
        with module._counted() as calls:
            run(rows)
    assert [each["captured"] for each in found] == [0.0, 1.0, 1.0, 1.0]
    # The inputs are copied and marked by an event; each segment is launched, marked and waited for.
    assert calls == {"copy": 3, "wait": 1 + 3, "record": 1 + 3, "launch": 3}
    assert found[-1]["driver_calls"] == found[-2]["driver_calls"] == 14


def test_a_target_that_cannot_run_is_skipped(load_script: Load, models: Path) -> None:
    module = load_script("gpu_check_measure")
    with pytest.raises(module.Skipped, match="has no target tensorrt-fp16-sm90"):
        module.measure(models, "tensorrt-fp16-sm90", print)


def test_pytorch_gives_the_logits_of_the_last_exit(
    load_script: Load, tiny_models: Mapping[str, Path], engines: Mapping[str, Path]
) -> None:
    folder = engines["bert"]
    manifest = read_manifest(folder)
    texts, expected = read_reference(folder, manifest)
    padding = padding_values(manifest.tokenizer)
    run = load_script("gpu_check_parts").torch_run(tiny_models["bert"], padding, "eager", "cpu")
    with Engine.load(folder) as engine:
        found = run(engine.encode(texts))
    assert found.dtype == np.float32
    assert np.abs(found - expected[-1]).max() < 0.1


def _run_part(tmp_path: Path, *arguments: str) -> Results:
    results = tmp_path / "results.jsonl"
    options = ["--models", str(tmp_path), "--results", str(results)]
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check_parts.py"), *arguments, *options]
    subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def test_what_a_part_lacks_is_a_reason_to_skip_it(
    load_script: Load, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (skipped,) = _run_part(tmp_path, "pytorch", "minilm", "eager")
    assert skipped["skipped"] == "the model minilm was not made"
    parts = load_script("gpu_check_parts")
    monkeypatch.setattr(parts, "cuda_device", lambda: CudaDevice("H100", "9.0"))
    with pytest.raises(parts.Skipped, match=r"tensorrt is not installed; .*(9\.0|not installed)"):
        parts.plans(models, "fp16", print)
    with pytest.raises(parts.Skipped, match="finds no GPU"):
        parts.pytorch(models, "eager", print)
    monkeypatch.setattr(parts, "plan_backend", lambda: "tensorrt")
    with pytest.raises(parts.Skipped, match="the model has no int8 graphs"):
        parts.plans(models, "int8", print)


def test_the_whole_model_is_built_last_with_the_timings_of_the_chain(
    load_script: Load, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_script("gpu_check_parts")
    add_targets(models / "chain", AddTargetsOptions(fp16=True, backends=()))
    write_one_graph(models / "chain", models / "one")
    double = serve(monkeypatch, models / "chain")
    monkeypatch.setattr(parts, "plan_backend", lambda: "tensorrt")
    monkeypatch.setattr(parts, "cuda_device", lambda: GPU)
    monkeypatch.setattr(parts, "judge", lambda *arguments: "the chain differs")
    monkeypatch.setattr(parts, "measure", lambda *arguments: measured.append(arguments))
    measured: list[Any] = []

    def emit(variant: str, **result: Any) -> None:
        if variant == "chain":
            double.trt.plans = plans_of(models / "one")
            (cache,) = (models / "chain").rglob("timing.cache")
            cache.write_text(cache.read_text("utf-8").replace("segment_01", "a layer"), "utf-8")

    with pytest.raises(VerificationError, match="the chain differs"):
        parts.plans(models, "fp16", emit)
    assert measured, "also if they differ"
    profiles = read_manifest(models / "chain").targets["tensorrt-fp16-sm86"].profiles
    one_row = [shapes.sequence.opt for shapes in profiles if shapes.batch.max == 1]
    assert one_row == [length for length in parts.TOKENS if length <= 64], "no others are timed"
    assert len(profiles) == len(one_row) + 2
    assert [("a layer" in timed, len(timed)) for _, timed in double.builds] == [
        *((False, number) for number in range(3)),
        (True, 3),
    ]


@pytest.mark.slow
def test_a_model_is_made_and_its_plans_are_built(
    load_script: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    parts = load_script("gpu_check_parts")
    tiny = {"layers": 2, "width": 32, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setattr(parts, "SIZES", {"tiny": tiny})
    monkeypatch.setattr(parts, "cuda_device", lambda: GPU)
    results: Results = []
    emit = lambda **result: results.append(result)  # noqa: E731
    parts.make_models(tmp_path, "tiny", emit)
    assert [len(read_manifest(tmp_path / name).segments) for name in ("chain", "one")] == [2, 1]
    assert len((tmp_path / "texts.txt").read_text("utf-8").splitlines()) == parts.FILE_TEXTS
    precisions = set(read_manifest(tmp_path / "one").precisions)
    assert precisions == {"fp16"} if results else {"fp16", "int8"}
    # There is no GPU that could run the plans.
    with pytest.raises(parts.Skipped, match="needs an NVIDIA GPU"):
        parts.plans(tmp_path, "fp16", emit)
    assert [r["variant"] for r in results if r["what"] == "build"] == ["chain", "one"]
    if "int8" in precisions:
        with pytest.raises(parts.Skipped, match="the model was made before"):
            parts.make_models(tmp_path, "tiny", emit)


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_plans_are_compared_with_the_runner_of_polygraphy(
    difference: float,
    measure: tuple[ModuleType, str],
    load_script: Load,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, target = measure
    if target == TARGET:
        pytest.skip("these are no plans")
    module = load_script("gpu_check_polygraphy")
    monkeypatch.setattr(module, "TOKENS", (16, 32))
    find = [plans_of(models / name) for name in ("chain", "one")]
    serve_polygraphy(monkeypatch, lambda plan: find[0](plan) or find[1](plan), difference)
    results: Results = []
    found = module.judge(models, target, lambda **result: results.append(result))
    assert [(r["what"], r["variant"]) for r in results] == [
        ("judge", module.ENGINE),
        ("judge", module.STEPWISE),
    ]
    assert [len(r["exits"]) for r in results] == [1, 3]
    for result in results:
        np.testing.assert_allclose(result["exits"], difference, atol=1e-5)
        assert (result["verdict"] == "equal") == (difference == 0)
    assert bool(found) == (difference > 0)


def test_without_polygraphy_nothing_is_compared(
    load_script: Load, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    for name in ("one", "chain"):
        target = install(monkeypatch, models / name).target
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    results: Results = []
    emit = lambda **result: results.append(result)  # noqa: E731
    assert load_script("gpu_check_polygraphy").judge(models, target, emit) == ""
    assert [r["reason"] for r in results] == ["polygraphy is not installed"]


def test_the_runner_of_polygraphy_takes_these_arguments() -> None:
    polygraphy = pytest.importorskip("polygraphy.backend.trt", reason="it is not installed")
    names = inspect.signature(polygraphy.TrtRunner.__init__).parameters
    assert {"optimization_profile", "allocation_strategy"} <= set(names)


def test_only_tests_that_are_marked_run(load_script: Load, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    lines = ["import pytest, warnings", "@pytest.mark.gpu", "def test_x():", "    assert False"]
    lines += ["def test_not_run():", "    assert False"]
    lines += ["@pytest.mark.gpu", "def test_y():", "    warnings.warn('a new driver')"]
    (tmp_path / "tests" / "test_x.py").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tests" / "test_y.py").write_text("import a_missing_package", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu\nfilterwarnings = error\n", encoding="utf-8"
    )
    results: Results = []
    with pytest.raises(subprocess.CalledProcessError):
        load_script("gpu_check_parts").tests(tmp_path, lambda **result: results.append(result))
    summary = r"1 failed, 1 passed, 1 deselected, 1 warning in .*"
    assert re.fullmatch(summary, results[0]["summary"])


def _report(*results: dict[str, Any]) -> dict[str, Any]:
    part = {"name": "plans base fp16", "state": "done", "reason": "", "seconds": 61.4}
    return {
        "environment": {"fpabee": "0.1.0"},
        "gpu": {"name": "A10", "compute_capability": "8.6", "error": ""},
        "parts": [part | {"results": list(results)}],
    }


def test_the_table_shows_times_and_whether_the_targets_are_met(load_script: Load) -> None:
    table = load_script("gpu_check_table")
    where = {"size": "base", "runs_on": "plans fp16"}
    results = []
    for variant, p50, p99 in (
        (table.ENGINE, 1.0, 1.2),
        (table.STEPWISE, 1.04, 1.7),
        (table.WITH_RULE, 0.5, 1.1),
    ):
        found = {"p50_ms": p50, "p99_ms": p99, "mean_ms": p50 + 0.05, "cpu_ms": 0.2}
        what = {"what": "latency", "variant": variant, "tokens": 32, "captured": 1.0}
        results.append(where | what | found | {"driver_calls": 40})
    results.append(where | {"what": "not measured", "variant": "int8", "reason": "no | graphs"})
    results.append(
        where | {"what": "parity", "variant": "x", "exits": [1e-4, 2e-3], "verdict": "good"}
    )
    results.append(where | {"what": "judge", "variant": "x", "exits": [1e-6], "verdict": "equal"})
    text = table.markdown(_report(*results))
    assert text.startswith("# fpabee on A10, compute capability 8.6\n")
    row = f"| plans fp16 | {table.STEPWISE} |  | 1.04 / 1.7 |  |  |  | 0.2 | 40 | 1 |  |"
    assert row in text
    assert "| base | plans fp16 | 32 | chain / one engine, p50 | 1.05 | 1.040 | met |" in text
    rule = "chain with the rule at half depth / one engine, mean"
    assert f"| base | plans fp16 | 32 | {rule} | 0.60 | 0.524 | met |" in text
    assert f"| p99 / p50, {table.STEPWISE} | 1.50 | 1.635 | **missed** |" in text
    assert "| base | plans fp16 | 1.0e-04, 2.0e-03 | good |" in text
    assert "| base | plans fp16 | 1.0e-06 | equal |" in text.split("Polygraphy's runner")[1]
    assert "| plans base fp16 | done | 61 s | int8 was not measured: no \\| graphs |" in text
    results = [r for r in results if r.get("variant") != table.STEPWISE]
    text = table.markdown(_report(*results))
    assert "chain / one engine, p50 | 1.05 |  | not measured |" in text


def _shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "gpu_check"), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_its_environment_is_made_for_the_cuda_of_the_driver(tmp_path: Path) -> None:
    """What could not be installed is tried again by the next run, and nothing else is."""
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    fails = f'[ "$6" = ".[tensorrt-cu12]" ] && [ ! -e {tmp_path}/network ] && exit 1'
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{fails}\nexit 0\n', encoding="utf-8")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "| Driver Version: 550.54  CUDA Version: 12.4  |"\n', "utf-8")
    for program in (python, smi):
        program.chmod(0o755)
    variables = {
        "FPABEE_VENV": str(tmp_path / "venv"),
        "PYTHON": sys.executable,
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
    }
    for message in ("the extra tensorrt-cu12 could not be installed", "", ""):
        done = _shell("--output", "out", **variables)
        assert done.returncode == 0, done.stderr
        assert message in done.stderr
        assert message or "extra" not in done.stderr
        (tmp_path / "network").touch()
    calls = log.read_text("utf-8").splitlines()
    installed = [call.split("install --quiet ")[1] for call in calls if "install --quiet" in call]
    assert installed == [
        "--upgrade pip",
        "--editable .[export]",
        "--editable .[gpu-cu12]",
        "--editable .[tensorrt-cu12]",
        "--editable .[tensorrt-rtx-cu12]",
        "--editable .[tensorrt-cu12]",
    ]
    runs = [call for call in calls if call.startswith("scripts/gpu_check.py")]
    assert len(runs) == 3
    assert all(re.fullmatch(r"scripts/gpu_check.py --seconds 5\d\d --output out", r) for r in runs)


def test_what_is_installed_can_be_used(tmp_path: Path) -> None:
    done = _shell("--use-installed", "--output", str(tmp_path), PYTHON=sys.executable)
    report = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    assert done.returncode == (1 if report["gpu"]["error"] else 0)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = _shell("--use-installed", PYTHON=str(bare))
    assert done.returncode == 1
    assert "lacks packages" in done.stderr


def test_the_images_install_extras_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for path in sorted((ROOT / "scripts").glob("Dockerfile*")):
        text = path.read_text("utf-8")
        settings = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
        named = re.findall(r'"\.\[(.+?)\]"', text)
        assert named, path
        for variable in ("XDG_CACHE_HOME", "CUDA_CACHE_PATH"):  # the user has no home directory
            assert re.search(rf"^ENV .*{variable}=/cache", text, re.MULTILINE), path
        for cuda in ("12", "13"):
            values = settings | {"CUDA": cuda}
            extras = string.Template(",".join(named)).substitute(values)
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), path
