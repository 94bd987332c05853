"""`fpabee-inspect`: what a folder holds, and why a target cannot run here."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import pytest

from fpabee import __version__
from fpabee.commands.inspect import main
from fpabee.runtime import Budget, TopK
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest
from fpabee.runtime.artifact.manifest import REFERENCE_NAME
from fpabee.runtime.artifact.operating_point import Certificate, Promise
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.machine import CudaDevice

from ..bad_input.cases import corrected
from ..conftest import QUICK, add_quick_pass, change_point
from ..doubles.device import install
from ..programs import invoke, printed

run = partial(invoke, main)


def test_a_folder_is_described(
    engine_copy: Callable[..., Path],
    exit_0_engines: Mapping[str, Path],
    set_points: Callable[..., None],
) -> None:
    folder = engine_copy("mpnet")
    set_points(folder, default="safe", fast=Budget(exit=1), safe=Budget(exit=3))
    shown = printed(main, folder)
    for part in (
        "mpnet, 3 layers of 32",
        "exit layers: 1, 2, 3",
        "onnxruntime-fp32 (default)",
        " yes",
        "rule without an operating point: fpabee jskd 0.1\n",
    ):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80
    facts = "no guarantee; goal: drop at most 0.5 points; 1.00 layers per text"
    words = " ".join(shown.split())
    assert f"onnxruntime-fp32 safe (default of the target): {facts}" in words
    content = json.loads(run(folder, "--env", "--json").stdout)
    assert content["exit_layers"] == [1, 2, 3]
    (target,) = content["targets"]
    assert (target["name"], target["unavailable_reason"]) == ("onnxruntime-fp32", "")
    assert target["default_operating_point"] == "safe"
    promise = "no guarantee; goal: drop at most 0.5 points"
    assert target["operating_points"]["safe"] == {"promise": promise, "mean_depth": 1.0}
    assert target["logits_differ_by"] > 0
    assert target["size"] > 10_000
    assert content["environment"]["fpabee"] == __version__
    assert "exit layers: 0, 1, 2, 3" in " ".join(printed(main, exit_0_engines["bert"]).split())


def test_what_is_promised_of_rankings_is_said(
    ranking_engines: Mapping[str, Path], set_points: Callable[..., None], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(ranking_engines["bert"], tmp_path / "engines"))
    set_points(folder, default="sure", sure=TopK(top=3, threshold=0.0))
    promises = (Promise(of="changed_answers", at_most=5.0, rows=60),)
    change_point(folder, "sure", certificate=Certificate(confidence=95.0, promises=promises))
    words = " ".join(run(folder).stdout.split())
    promised = "at most 5 % of new queries have another top 3, with 95 % confidence"
    assert re.search(f"{promised}; .* layers per document", words)
    assert "ranking of documents" in words


def test_a_whole_folder_passes_the_check(engines: Mapping[str, Path]) -> None:
    said = printed(main, engines["albert"], "--check")
    assert "onnxruntime-fp32 reproduces the exported model: logits differ by" in said
    content = json.loads(run(engines["albert"], "--check", "--json").stdout)["check"]
    assert content["passed"]
    assert content["damaged"] == []
    assert content["refused"] == {}
    assert list(content["agreement"]) == ["onnxruntime-fp32"]
    manifest = read_manifest(engines["albert"])
    assert content["files"] == 1 + len(manifest.graphs) + len(manifest.files)


def test_the_check_says_what_is_wrong(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    texts, logits = read_reference(EnginesFolder(folder, manifest))
    corrected(REFERENCE_NAME, lambda _: write_reference(folder, texts, -logits))(folder)
    result = run(folder, "--check", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)["check"]
    assert (content["passed"], content["damaged"]) == (False, [])
    assert "is not the model that was exported" in content["refused"]["onnxruntime-fp32"]
    assert "refused" in run(folder, "--check").stdout

    changed, missing = (folder / graph.file for graph in list(manifest.graphs.values())[:2])
    changed.write_bytes(b"!")
    missing.unlink()
    content = json.loads(run(folder, "--check", "--json").stdout)["check"]
    first, second = content["damaged"]
    assert "is damaged" in first
    assert "is missing" in second
    assert changed.name in run(folder, "--check").stdout


def test_graphs_of_all_precisions_and_plans_are_checked(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    made = install(monkeypatch, folder)
    manifest = read_manifest(folder)
    other = {n: msgspec.structs.replace(g, sha256="0" * 64) for n, g in manifest.graphs.items()}
    (folder / "targets" / made.target / "segment_01.plan").unlink()
    manifest = msgspec.structs.replace(manifest, precisions={"bf16": other})
    assert sum(map(bool, EnginesFolder(folder, manifest).damage())) == 1 + len(other)


def test_the_environment_and_sizes_need_no_onnxruntime(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = dict(line.split(": ", 1) for line in run("--env").stdout.splitlines())
    assert {"fpabee", "python", "numpy", "onnxruntime", "system", "cpu", "gpu"} <= lines.keys()
    assert "CPUExecutionProvider" in lines["providers"]
    manifest = read_manifest(engines["bert"])
    size = sum((engines["bert"] / g.file).stat().st_size for g in manifest.graphs.values())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "providers: none: " in run("--env").stdout
    (state,) = json.loads(run(engines["bert"], "--json").stdout)["targets"]
    assert "onnxruntime" in state["unavailable_reason"]
    assert state["size"] == size
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    assert "onnxruntime is damaged" in run("--env").stdout


def test_targets_that_cannot_run_say_why(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    made = install(monkeypatch, folder)

    def reasons() -> dict[str, str]:
        targets = json.loads(run(folder, "--json").stdout)["targets"]
        return {target["name"]: target["unavailable_reason"] for target in targets}

    assert reasons() == {"onnxruntime-fp32": "", made.target: ""}
    none = CudaDevice(error="no NVIDIA driver is installed")
    monkeypatch.setattr("fpabee.runtime.backends.cuda.cuda_device", lambda number: none)
    assert "needs an NVIDIA GPU, but no NVIDIA driver" in reasons()[made.target]
    lines = run(folder).stdout.splitlines()
    assert any(line.startswith(f"{made.target} cannot run here: ") for line in lines)
    (folder / "targets" / made.target / "segment_01.plan").unlink()
    assert "segment_01.plan is missing" in reasons()[made.target]


def test_a_quick_pass_is_shown(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy("bert")
    add_quick_pass(folder, Budget(exit=4), alone=Budget(exit=2))
    text = " ".join(printed(main, folder).split())
    assert "onnxruntime-fp32 alone: no guarantee" in text
    assert f"texts run in {QUICK} first, and 0.0 % of them, which are in doubt at" in text
    assert " % of the time" not in text, "it was not measured"
    change_point(folder, "quick", measured_speedup={"1": 1.6, "32": 4.0})
    text = " ".join(printed(main, folder).split())
    assert "again in onnxruntime-fp32; this takes 25 % of the time of all layers in onnx" in text
    assert "the 99th percentile of single texts is 1.50 times that of all layers" in text
    engines = EnginesFolder.read(folder)
    target = engines.manifest.targets[QUICK]
    versions = {**target.versions, "onnxruntime": "0.1"}
    engines.with_target(QUICK, msgspec.structs.replace(target, versions=versions)).write()
    text = " ".join(printed(main, folder).split())
    assert "it has lost its promise: its quick pass runs in target" in text
