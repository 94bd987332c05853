"""The baseline graph is the same model, and the report says what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fpabee.exporter import ExportOptions, export
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.bench import (
    FULL_DEPTH,
    FULL_GRAPH,
    PADDED_32,
    PADDED_FP32,
    PYTORCH,
    WITH_RULE,
    BenchOptions,
    _Graph,
    _timing,
    run_bench,
)
from fpabee.exporter.cli.bench import main, print_report
from fpabee.exporter.merge import write_one_graph
from fpabee.runtime import Budget, Engine, Entropy, ExitRule
from fpabee.runtime.cli.console import table_console
from fpabee.runtime.rules.runner import RuleRunner

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

    def noted(segment: int, hidden: Any) -> Any:
        pending = enqueue(segment, hidden)
        found.append(pending.result()["logits"].copy())
        return pending

    graph._execution.enqueue = noted  # type: ignore[method-assign]
    graph.padded(rows)
    graph.grouped(rows)
    graph.close()
    order = np.argsort([-len(row) for row in rows], kind="stable")
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[order], atol=1e-5)
    if family == "bert":  # whose graphs have one Gemm per head and none elsewhere
        proto = onnx.load(tmp_path / "onnx/fp32/segment_01.onnx")
        assert [node.op_type for node in proto.graph.node].count("Gemm") == 1


def test_the_full_graph_runs_in_the_target_of_the_chain(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("fpabee.exporter.bench.time.sleep", lambda _: None)
    folder = engine_copy()
    add_targets(folder, AddTargetsOptions(backends=("openvino",)))
    options = BenchOptions(Budget(exit=1), 1, shapes=(), max_single=2, target="openvino-fp32")
    report = run_bench(folder, TEXTS, options)
    assert (report.target, report.full_target) == ("openvino-fp32", "openvino-fp32")
    assert "openvino" in report.versions
    assert {PADDED_32, PADDED_FP32} <= set(report.workloads[-1].timings)


def test_report_and_progress(
    engines: Mapping[str, Path], tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.exporter.bench.time.sleep", lambda _: None)  # between variants
    told: list[tuple[str, int, int]] = []
    model_dir = str(tiny_models["bert"])
    options = BenchOptions(Budget(exit=1), 2, shapes=((1, 8),), max_single=2, model_dir=model_dir)
    report = run_bench(engines["bert"], TEXTS, options, lambda *state: told.append(state))
    names = [workload.name for workload in report.workloads]
    assert names == ["1 x 8 tokens", "file, batch 1 (2 texts)", "file, all 4 texts"]
    assert set(report.workloads[0].timings) == {FULL_GRAPH, FULL_DEPTH, WITH_RULE, PYTORCH}
    assert PADDED_32 in report.workloads[-1].timings
    for workload in report.workloads:
        assert (workload.theoretical, workload.mean_depth) == (3.0, 1.0)
        assert all(timing.total_s > 0 for timing in workload.timings.values())
    assert told[0] == ("load", 0, 1)
    begun = [what for what, done, _ in told[1:] if done == 0]
    assert begun == [f"{number} of 3: {name}" for number, name in enumerate(names, start=1)]
    for place in begun:
        mine = [(what, done, total) for what, done, total in told if what.startswith(place)]
        assert [done for _, done, _ in mine] == list(range(mine[0][2] + 1))
        assert all(re.fullmatch(r", about \d+:\d\d", what[len(place) :]) for what, _, _ in mine[1:])


def test_pytorch_has_no_exit_0(
    exit_0_engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fpabee.exporter.bench.time.sleep", lambda _: None)  # between variants
    model_dir = str(tiny_models["bert"])
    options = BenchOptions(Budget(exit=0), 1, shapes=(), max_single=1, model_dir=model_dir)
    alone, _ = run_bench(exit_0_engines["bert"], TEXTS, options).workloads
    assert alone.mean_depth == 0.0
    assert PYTORCH in alone.timings


def test_pytorch_has_the_exits_of_the_folder(
    tiny_models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("fpabee.exporter.bench.time.sleep", lambda _: None)
    export(tiny_models["bert"], tmp_path / "engines", ExportOptions(exits=(2, 3)))
    exits: list[range] = []

    class Noted(RuleRunner):
        def __init__(self, rule: ExitRule, problem_type: Any, numbers: range, *given: Any) -> None:
            exits.append(numbers)
            super().__init__(rule, problem_type, numbers, *given)

    monkeypatch.setattr("fpabee.exporter.bench.RuleRunner", Noted)
    model_dir = str(tiny_models["bert"])
    options = BenchOptions(Budget(exit=2), 1, shapes=(), max_single=1, model_dir=model_dir)
    run_bench(tmp_path / "engines", TEXTS[:1], options)
    assert set(exits) == {range(3)}, "the exits after layers 2 and 3"


def test_a_rule_by_which_no_layer_runs(
    exit_0_engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fpabee.exporter.bench.time.sleep", lambda _: None)
    rule, model_dir = Entropy(threshold=0.0, exit_0_threshold=0.0), str(tiny_models["bert"])
    options = BenchOptions(rule, 1, shapes=(), max_single=2, model_dir=model_dir)
    report = run_bench(exit_0_engines["bert"], TEXTS, options)
    assert {workload.mean_depth for workload in report.workloads} == {0.0}
    assert PYTORCH in report.workloads[0].timings, "PyTorch runs the same rule without exit 0"
    print_report(report, table_console())
    lines = [line for line in capsys.readouterr().out.splitlines() if WITH_RULE in line]
    assert ["no layers" in line for line in lines] == [True, True]


def test_command_prints_json(engines: Mapping[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "rows"
    texts.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    command = [str(engines["bert"]), "--input", str(texts), "--repeats", "1", "--depth", "0.8"]
    columns = ["--input-format", "jsonl", "--text-column", "body"]

    result = CliRunner().invoke(main, [*command, *columns, "--shapes", "2x8", "--json"])

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rule"]["name"] == "fpabee"
    whole = report["workloads"][-1]
    assert whole["realised"] > 0
    with Engine.load(engines["bert"]) as engine:
        trace = engine.trace(TEXTS, rule=ExitRule.from_dict(report["rule"]))
    layers = (trace.exits * trace.lengths).sum()
    assert whole["theoretical"] == pytest.approx(3 * trace.lengths.sum() / layers)


def test_the_table_is_not_cut_in_a_file(engines: Mapping[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    command = [str(engines["bert"]), "--input", str(texts), "--repeats", "1", "--shapes", ""]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    for cell in (f"file, all {len(TEXTS)} texts", "median ms", FULL_DEPTH, PADDED_32):
        assert cell in result.stdout
    assert "onnxruntime-fp32, rule fpabee jskd 0.1\n" in result.stdout
    assert f"2 of 2: file, all {len(TEXTS)} texts, about 0:" in result.stderr


def test_first_runs_are_also_reported_alone() -> None:
    timing = _timing([[3.0, 1.0, 2.0], [9.0, 4.0, 5.0]])
    assert (timing.total_s, timing.median_ms, timing.first_s) == (7.0, 3500.0, 12.0)
