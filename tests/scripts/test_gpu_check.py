"""The parts and the report of `scripts/gpu_check.py`, without a GPU."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from one_graph import write_one_graph

from fpabee.exporter.targets import build_targets
from fpabee.exporter.targets.builders import _Plans
from fpabee.runtime import MissingExtraError, read_manifest
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.machine import CudaDevice

from ..conftest import WORDS
from ..doubles.device import GPU, install, install_cuda_provider, serve
from ..doubles.polygraphy import serve_polygraphy
from ..doubles.tensorrt import plans_of

ROOT = Path(__file__).parents[2]
NO_GPU = CudaDevice(error="there is no driver")

FAKE_PART = """
import json, os, subprocess, sys, time
from pathlib import Path
output, name = Path(sys.argv[2]), sys.argv[4]
lines = [json.dumps(["note", name])]
if name == "skips":
    lines.append(json.dumps(["skipped", "TensorRT is not installed"]))
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
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("gpu_check")


@pytest.fixture
def fake(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with fake parts, on a machine with a GPU."""
    part = tmp_path / "part.py"
    part.write_text(FAKE_PART, encoding="utf-8")
    seconds = dict.fromkeys(("works", "crashes", "fails", "skips"), 500.0) | {"hangs": 9.0}
    monkeypatch.setattr(script, "__file__", str(part))
    monkeypatch.setattr(script, "PARTS", seconds)
    monkeypatch.setattr(script, "cuda_device", lambda: GPU)
    monkeypatch.setattr(script, "LEAST_SECONDS", 0.1)
    return script


def test_a_part_that_crashes_or_hangs_does_not_lose_what_it_or_others_found(
    fake: ModuleType, tmp_path: Path
) -> None:
    """The limit of the part that hangs is in proportion to that of the whole: 9 of 525 seconds."""
    reasons = {
        "works": ("done", ""),
        "crashes": ("failed", "it was ended by signal 6: what the part printed last; "),
        "fails": ("failed", "it ended with code 1: what the part printed last; "),
        "skips": ("skipped", "TensorRT is not installed; "),
        "hangs": ("stopped", "it took longer than 1 seconds; "),
    }
    states = fake.check(tmp_path, 60, [*reasons])
    assert states == {name: state for name, (state, _) in reasons.items()}
    text = (tmp_path / "gpu_check.md").read_text("utf-8")
    for name, (state, reason) in reasons.items():
        assert re.search(rf"\| {name} \| {state} \| \d+ s \| {reason}{name} \|", text)
    child = int((tmp_path / "logs" / "hangs.log").read_text("utf-8").split()[-1])
    for _ in range(100):
        process = Path(f"/proc/{child}/stat")
        if not process.exists() or process.read_text("utf-8").split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what it started still runs")


def test_the_whole_has_a_limit(
    fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "PARTS", {"hangs": 525.0, "works": 525.0})
    assert fake.check(tmp_path, 1, ["hangs", "works"]) == {"hangs": "stopped", "works": "skipped"}
    assert "no time was left" in (tmp_path / "gpu_check.md").read_text("utf-8")


def test_exit_codes(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str, parts: tuple[str, ...] = ("works", "skips")) -> Any:
        monkeypatch.setattr(fake, "PARTS", dict.fromkeys(parts, 500.0))
        return CliRunner().invoke(fake.main, ["--output", str(tmp_path), *arguments])

    assert run().exit_code == 0
    done = run(parts=("works", "fails"))
    assert done.exit_code == 1
    assert "error: fails did not finish" in done.output
    assert run("--minutes", "9").exit_code == 2
    monkeypatch.setattr(fake, "cuda_device", lambda: NO_GPU)
    assert run("--prepare", parts=("model x", "works")).output.startswith("model x: done")
    done = run()
    assert done.exit_code == 1
    assert "nothing ran on a GPU: there is no driver" in done.output
    assert "| works | skipped | 0 s | there is no driver |" in (
        tmp_path / "gpu_check.md"
    ).read_text("utf-8")


@pytest.fixture
def models(
    script: ModuleType,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder as the part `model` makes it, for a tiny model; few texts are measured."""
    for name, value in {"TOKENS": (16, 32), "ROWS": 6, "MEASURE_SECONDS": 0.0}.items():
        monkeypatch.setattr(script, name, value)
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    engine_copy(name="chain").rename(folder / "chain")
    (folder / "one").mkdir()
    write_one_graph(folder / "chain", folder / "one")
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 20]) for n in range(40)]
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder


@pytest.fixture
def plans(models: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target of made-up plans in both folders."""
    one = install(monkeypatch, models / "one")
    for name, file in read_manifest(models / "one").targets[one.target].files.items():
        path = models / "one" / file.file
        path.write_bytes(path.read_bytes() + b"of one")  # other bytes than those of the chain
        one.change_plan(name, sha256=sha256_of(path))
    double = install(monkeypatch, models / "chain")
    chain_plans = double.trt.plans
    double.trt.plans = lambda content: chain_plans(content) or one.trt.plans(content)
    return double.target


def measured(script: ModuleType, models: Path, target: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    script.measure(models, target, lambda *row: rows.append(row))
    note, *times = rows
    assert re.match(rf"{target} reproduces the exported model: ", note[1])
    assert [row[:2] for row in times] == [
        (script.TIMES, variant) for variant in (script.ENGINE, script.CHAIN, script.WITH_RULE)
    ]
    for _, _, *cells, texts in times:
        assert len(cells) == 2
        for cell in cells:
            p50, p99 = map(float, cell.split(" / "))
            assert 0 < p50 <= p99
        assert int(texts) > 0
    return times


def test_onnxruntime_is_measured(
    script: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_cuda_provider(monkeypatch, models / "one")
    measured(script, models, install_cuda_provider(monkeypatch, models / "chain").target)
    with pytest.raises(script.Skipped, match="has no target tensorrt-fp16-sm90"):
        script.measure(models, "tensorrt-fp16-sm90", print)


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_plans_are_compared_with_the_runner_of_polygraphy(
    difference: float, script: ModuleType, models: Path, plans: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are measured."""
    measured(script, models, plans)
    find = [plans_of(models / name) for name in ("chain", "one")]
    serve_polygraphy(monkeypatch, lambda plan: find[0](plan) or find[1](plan), difference)
    rows: list[tuple[str, ...]] = []
    assert script.judge(models, plans, lambda *row: rows.append(row)) == (difference == 0)
    assert [row[:2] for row in rows] == [
        (script.DIFFERENCES, script.ENGINE),
        (script.DIFFERENCES, script.CHAIN),
    ]
    for (_, _, exits, verdict), count in zip(rows, (1, 3), strict=True):
        found = [float(each) for each in exits.split(", ")]
        np.testing.assert_allclose(found, [difference] * count, atol=1e-5)
        assert verdict == ("**they differ**" if difference else "equal")


def test_the_runner_of_polygraphy_takes_these_arguments() -> None:
    polygraphy = pytest.importorskip("polygraphy.backend.trt", reason="it is not installed")
    names = inspect.signature(polygraphy.TrtRunner.__init__).parameters
    assert {"optimization_profile", "allocation_strategy"} <= set(names)


def test_the_whole_model_is_built_last_with_the_timings_of_the_chain(
    script: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_targets(models / "chain", ["onnxruntime-fp16-cuda"])
    write_one_graph(models / "chain", models / "one")
    double = serve(monkeypatch, models / "chain")
    monkeypatch.setattr(_Plans, "why_not", lambda _: None)
    monkeypatch.setattr(script, "cuda_device", lambda: GPU)
    monkeypatch.setattr(script, "judge", lambda *arguments: False)
    monkeypatch.setattr(script, "measure", lambda *arguments: done.append(arguments))
    done: list[Any] = []

    def emit(_: str, text: str) -> None:
        if text.startswith("chain"):
            double.trt.plans = plans_of(models / "one", double.unwritten)
            (cache,) = (models / "chain").rglob("timing.cache")
            cache.write_text(cache.read_text("utf-8").replace("segment_01", "a layer"), "utf-8")

    with pytest.raises(SystemExit, match="the logits differ"):
        script.plans(models, "fp16", emit)
    assert done, "it is measured also if they differ"
    assert [("a layer" in timed, len(timed)) for _, timed in double.builds] == [
        *((False, number) for number in range(3)),
        (True, 3),
    ]


def test_a_part_that_lacks_something_is_skipped(
    script: ModuleType, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, error = tmp_path / "results.jsonl", MissingExtraError("tensorrt is not installed", "")
    monkeypatch.setattr(_Plans, "why_not", lambda _: error)
    for name in ("plans minilm fp16", "plans tiny fp16", "tests"):
        monkeypatch.setattr(script, "TEST_PACKAGES", ("no_such_package",))
        script.run_here(name, models.parent, results)
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [line[0] for line in lines] == [script.SKIPPED] * 3
    assert lines[0][1] == "the model minilm was not made"
    assert "is not installed" in lines[1][1]
    assert lines[2][1] == "the tests need no_such_package"


def test_only_tests_that_are_marked_run(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    lines = ["import pytest, warnings", "@pytest.mark.gpu", "def test_x():", "    assert False"]
    lines += ["def test_not_run():", "    assert False"]
    lines += ["@pytest.mark.gpu", "def test_y():", "    warnings.warn('a new driver')"]
    (tmp_path / "tests" / "test_x.py").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tests" / "test_y.py").write_text("import a_missing_package", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu\nfilterwarnings = error\n", encoding="utf-8"
    )
    notes: list[str] = []
    with pytest.raises(subprocess.CalledProcessError):
        script.tests(tmp_path, lambda _, text: notes.append(text))
    assert re.fullmatch(r"1 failed, 1 passed, 1 deselected, 1 warning in .*", notes[0])


@pytest.mark.slow
def test_a_model_is_made(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"layers": 2, "width": 32, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setattr(script, "SIZES", {"tiny": tiny})
    folder = tmp_path / "tiny"
    script.make_models(folder, print)
    manifests = [read_manifest(folder / name) for name in ("chain", "one")]
    assert [len(manifest.segments) for manifest in manifests] == [2, 1]
    assert all(set(manifest.precisions) == {"fp16"} for manifest in manifests)
    assert len((folder / "texts.txt").read_text("utf-8").splitlines()) == script.FILE_TEXTS
    with pytest.raises(script.Skipped, match="the model was made before"):
        script.make_models(folder, print)


def test_the_report_is_tables(script: ModuleType) -> None:
    rows = [
        (script.TIMES, "base", "plans fp16", script.CHAIN, "1 / 2", "3 / 4", "5 / 6", "700"),
        (script.DIFFERENCES, "base", "plans fp16", script.CHAIN, "1.0e-06", "equal"),
        (script.STATES, "plans base fp16", "done", "61 s", "no | graphs"),
        (script.NOTE, "is in the remarks of a part"),
    ]
    text = script.markdown(rows)
    assert "| base | plans fp16 | chain | 1 / 2 | 3 / 4 | 5 / 6 | 700 |" in text
    assert "| base | plans fp16 | chain | 1.0e-06 | equal |" in text.split("Polygraphy's runner")[1]
    assert "| plans base fp16 | done | 61 s | no \\| graphs |" in text
    for table, *cells in rows[:3]:
        assert len(cells) == len(script.TABLES[table])


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
