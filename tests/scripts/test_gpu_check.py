"""The parts and the report of `scripts/gpu_check.py`, without a GPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from click.testing import CliRunner
from one_graph import write_one_graph

from fpabee.runtime.machine import CudaDevice

from ..conftest import WORDS
from ..doubles.device import GPU, install_cuda_provider

ROOT = Path(__file__).parents[2]

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
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of results of fake parts, on a machine with a GPU."""
    part = tmp_path / "part.py"
    part.write_text(FAKE_PART, encoding="utf-8")
    seconds = dict.fromkeys(("works", "crashes", "fails", "skips"), 500.0) | {"hangs": 9.0}
    monkeypatch.setattr(gpu_check, "__file__", str(part))
    monkeypatch.setattr(gpu_check, "PARTS", seconds)
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: GPU)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.1)
    return tmp_path


def test_a_part_that_crashes_or_hangs_does_not_lose_what_it_or_others_found(fake: Path) -> None:
    """The limit of the part that hangs is in proportion to that of the whole: 9 of 525 seconds."""
    reasons = {
        "works": ("done", ""),
        "crashes": ("failed", "it was ended by signal 6: what the part printed last; "),
        "fails": ("failed", "it ended with code 1: what the part printed last; "),
        "skips": ("skipped", "TensorRT is not installed; "),
        "hangs": ("stopped", "it took longer than 1 seconds; "),
    }
    states = gpu_check.check(fake, 60, [*reasons])
    assert states == {name: state for name, (state, _) in reasons.items()}
    text = (fake / "gpu_check.md").read_text("utf-8")
    for name, (state, reason) in reasons.items():
        assert re.search(rf"\| {name} \| {state} \| \d+ s \| {reason}{name} \|", text)
    child = int((fake / "logs" / "hangs.log").read_text("utf-8").split()[-1])
    for _ in range(100):
        process = Path(f"/proc/{child}/stat")
        if not process.exists() or process.read_text("utf-8").split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what it started still runs")


def test_exit_codes(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        return CliRunner().invoke(gpu_check.main, ["--output", str(fake)])

    monkeypatch.setattr(gpu_check, "PARTS", {"works": 500.0, "skips": 500.0})
    assert run().exit_code == 0
    monkeypatch.setattr(gpu_check, "PARTS", {"works": 500.0, "fails": 500.0})
    done = run()
    assert done.exit_code == 1
    assert "fails did not finish" in done.output
    monkeypatch.setattr(gpu_check, "cuda_device", lambda: CudaDevice(error="there is no driver"))
    done = run()
    assert done.exit_code == 1
    assert "there is no driver" in done.output
    assert "| works | skipped |" in (fake / "gpu_check.md").read_text("utf-8")


def test_a_target_is_measured(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TOKENS": (16, 32), "ROWS": 6, "MEASURE_SECONDS": 0.0}.items():
        monkeypatch.setattr(gpu_check, name, value)
    chain = engine_copy(name="chain")
    one = tmp_path / "one"
    one.mkdir()
    write_one_graph(chain, one)
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 20]) for n in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    install_cuda_provider(monkeypatch, one)
    target = install_cuda_provider(monkeypatch, chain).target
    rows: list[tuple[str, ...]] = []
    gpu_check.measure(tmp_path, target, lambda *row: rows.append(row))
    note, *times = rows
    assert target in note[1]
    assert [row[:2] for row in times] == [
        (gpu_check.TIMES, variant)
        for variant in (gpu_check.ENGINE, gpu_check.CHAIN, gpu_check.WITH_RULE)
    ]
    for _, _, *cells, texts_per_second in times:
        for cell in cells:
            p50, p99 = map(float, cell.split(" / "))
            assert 0 < p50 <= p99
        assert int(texts_per_second) > 0


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
