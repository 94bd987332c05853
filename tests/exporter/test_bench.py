"""The baseline graph is the same model, and the report says what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fpabee.exporter import bench
from fpabee.exporter.bench import (
    FULL_DEPTH,
    FULL_GRAPH,
    PADDED_32,
    WITH_RULE,
    BenchReport,
    Workload,
    _Graph,
    run_bench,
)
from fpabee.exporter.cli.bench import main, print_report
from fpabee.exporter.merge import write_one_graph
from fpabee.runtime import Engine, Entropy, ExitRule

from ..doubles.openvino import add_openvino


def few(monkeypatch: pytest.MonkeyPatch, *shapes: tuple[int, int], repeats: int) -> None:
    """Let a benchmark run only these synthetic batches, and each unit only so often."""
    monkeypatch.setattr(bench, "_SHAPES", shapes)
    monkeypatch.setattr(bench, "_REPEATS", repeats)


TEXTS = ["turn on the light", "", "is it not a good film", "book a table " * 5]


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_the_full_graph_gives_the_last_exit(
    engines: Mapping[str, Path], family: str, tmp_path: Path
) -> None:
    folder = engines[family]
    write_one_graph(folder, tmp_path)
    with Engine.load(folder) as engine:
        rows = engine.encode(TEXTS)
        expected = engine.trace(TEXTS).logits[-1]
    graph = _Graph(tmp_path, "onnxruntime-fp32", 1)
    found: list[NDArray[np.float32]] = []
    enqueue = graph._execution.enqueue

    def noted(hidden: Any) -> Any:
        outputs = enqueue(hidden)
        found.append(outputs().copy())
        return outputs

    graph._execution.enqueue = noted  # type: ignore[method-assign]
    graph.padded(rows)
    graph.grouped(rows)
    graph.close()
    order = np.argsort([-len(row) for row in rows], kind="stable")
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[order], atol=1e-5)


def test_report_and_progress(
    exit_0_engines: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a rule by which no layer runs, so that layers have no ratio."""
    told: list[tuple[str, int, int]] = []
    few(monkeypatch, (1, 8), repeats=2)
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    add_openvino(folder, "fp32")
    rule = Entropy(threshold=0.0, exit_0_threshold=0.0)
    with Engine.load(folder, "openvino-fp32") as engine:
        report = run_bench(folder, engine, rule, TEXTS, progress=lambda *state: told.append(state))
    assert (report.target, report.full_target) == ("openvino-fp32", "openvino-fp32")
    assert "threads; fpabee " in report.machine
    names = [workload.name for workload in report.workloads]
    assert names == ["1 x 8 tokens", "file, batch 1 (4 texts)", "file, all 4 texts"]
    assert set(report.workloads[0].seconds) == {FULL_GRAPH, FULL_DEPTH, WITH_RULE}
    assert PADDED_32 in report.workloads[-1].seconds
    for workload in report.workloads:
        assert workload.mean_depth == 0
        assert all(min(seconds) > 0 for seconds in workload.seconds.values())
    assert told[0] == ("load", 0, 1)
    assert told[1:] == [
        (name, done, units)
        for name, units in zip(names, (16, 4, 1), strict=True)
        for done in range(units + 1)
    ]
    print_report(report)
    assert capsys.readouterr().out.count("no layers") == 3


def test_the_command_prints_json_or_a_table_that_is_not_cut(
    engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch, (1, 8), (2, 8), repeats=1)
    texts = tmp_path / "rows.jsonl"
    texts.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    command = [str(engines["bert"]), "--input", str(texts), "--depth", "0.8"]
    command += ["--column", "text=body"]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rule"]["name"] == "fpabee"
    whole = report["workloads"][-1]
    assert set(whole["seconds"]) == {FULL_GRAPH, FULL_DEPTH, WITH_RULE, PADDED_32}
    with Engine.load(engines["bert"]) as engine:
        trace = engine.trace(TEXTS, rule=ExitRule.from_dict(report["rule"]))
    layers = (trace.exits * trace.lengths).sum()
    assert whole["theoretical"] == pytest.approx(3 * trace.lengths.sum() / layers)

    result = CliRunner().invoke(main, command)
    lines = [line.split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0][1:3]] == ["workload", FULL_GRAPH]
    assert len(lines) == 2 + 4
    assert {len(line) for line in lines} == {7 + 2}
    assert f"file, all {len(TEXTS)} texts" in lines[-1][1]
    assert "Rule: fpabee jskd" in result.stdout
    assert "full graph over padded batches of 32 in file order takes" in result.stdout


def test_the_speed_up_is_that_of_the_times_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians would give 1.00x: the texts that stop early are fewer than half."""
    seconds = {FULL_GRAPH: [0.09] * 3, FULL_DEPTH: [0.09] * 3, WITH_RULE: [0.09, 0.01, 0.09]}
    workload = Workload("file", seconds | {PADDED_32: [0.18] * 3}, 2.0, 1.5)
    rule = Entropy(threshold=0.1).to_dict()
    print_report(BenchReport("onnxruntime-fp32", "onnxruntime-fp32", rule, 3, "CPU", [workload]))
    shown = capsys.readouterr().out
    (row,) = (line.split("|")[1:-1] for line in shown.splitlines() if "| file" in line)
    times, ratios = row[1:4], row[4:]
    assert [cell.strip() for cell in times] == ["90.0", "90.0 (1.00x)", "63.3"]
    assert [cell.strip() for cell in ratios] == ["1.42x", "1.50x", "0.947"]
    assert "takes 180.0 ms per 256 texts, 2.8x as long" in shown
