"""The baseline graph is the same model, and the report says what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fpabee.exporter import bench
from fpabee.exporter.bench import (
    FULL_DEPTH,
    FULL_GRAPH,
    PADDED_32,
    PYTORCH,
    WITH_RULE,
    BenchOptions,
    run_bench,
)
from fpabee.exporter.cli.bench import main
from fpabee.exporter.prune.merge import merge_chain
from fpabee.runtime import Budget, Engine, FPabee, read_manifest
from fpabee.runtime.backends.onnxruntime_session import cpu_session
from fpabee.runtime.encoding import padded_inputs, padding_values

TEXTS = ["turn on the light", "", "is it not a good film", "book a table " * 5]


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_merged_graph_gives_the_last_exit(engines: Mapping[str, Path], family: str) -> None:
    folder = engines[family]
    proto = merge_chain(folder, read_manifest(folder))
    session = cpu_session(proto.SerializeToString())
    with Engine.load(folder) as engine:
        rows = engine.encode(TEXTS)
        expected = engine.trace(TEXTS).logits[-1]
        feed = padded_inputs(rows, padding_values(engine.manifest.tokenizer))
    names = [value.name for value in session.get_inputs()]

    (logits,) = session.run(None, {name: feed[name] for name in names})

    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_merged_graph_has_one_head_and_shares_albert_weights(engines: Mapping[str, Path]) -> None:
    bert = merge_chain(engines["bert"], read_manifest(engines["bert"]))
    albert = merge_chain(engines["albert"], read_manifest(engines["albert"]))

    # Every graph has one Gemm per head and none elsewhere.
    assert [node.op_type for node in bert.graph.node].count("Gemm") == 1
    names = [tensor.name for tensor in albert.graph.initializer]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"embeddings", "block_01", "head_03"}


def test_report(engines: Mapping[str, Path], tiny_models: Mapping[str, Path]) -> None:
    options = BenchOptions(
        FPabee(threshold=0.5),
        repeats=1,
        shapes=((1, 8), (4, 8)),
        max_single=2,
        model_dir=str(tiny_models["bert"]),
    )

    report = run_bench(engines["bert"], TEXTS * 3, options)

    names = [workload.name for workload in report.workloads]
    assert names == [
        "1 x 8 tokens",
        "4 x 8 tokens",
        "file, batch 1 (2 texts)",
        "file, all 12 texts",
    ]
    assert set(report.workloads[0].timings) == {FULL_GRAPH, FULL_DEPTH, WITH_RULE, PYTORCH}
    assert PADDED_32 in report.workloads[-1].timings
    for workload in report.workloads:
        assert 1 <= workload.theoretical <= 3
        assert all(timing.total_s > 0 for timing in workload.timings.values())


def test_progress_names_the_workload_and_its_expected_duration(engines: Mapping[str, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    options = BenchOptions(Budget(exit=1), repeats=2, shapes=((1, 8),), max_single=2)
    run_bench(engines["bert"], TEXTS, options, lambda *state: told.append(state))
    assert told[0] == ("load", 0, 1)
    begun = [what for what, done, _ in told[1:] if done == 0]
    assert begun == [
        "1 of 3: 1 x 8 tokens",
        "2 of 3: file, batch 1 (2 texts)",
        "3 of 3: file, all 4 texts",
    ]
    for place, runs in zip(begun, (32, 4, 2), strict=True):
        mine = [(what, done, total) for what, done, total in told if what.startswith(place)]
        assert [done for _, done, _ in mine] == list(range(runs + 1))
        assert {total for _, _, total in mine} == {runs}
        assert all(re.fullmatch(r", about \d+:\d\d", what[len(place) :]) for what, _, _ in mine[1:])


def test_theory_is_weighted_by_tokens(engines: Mapping[str, Path]) -> None:
    options = BenchOptions(Budget(exit=1), repeats=1, shapes=(), max_single=1)

    report = run_bench(engines["bert"], TEXTS, options)

    assert [workload.theoretical for workload in report.workloads] == [3.0, 3.0]
    assert [workload.mean_depth for workload in report.workloads] == [1.0, 1.0]


def test_command_prints_json(engines: Mapping[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "rows"
    texts.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    command = [str(engines["bert"]), "--input", str(texts), "--repeats", "1", "--depth", "0.7"]
    columns = ["--input-format", "jsonl", "--text-column", "body"]

    result = CliRunner().invoke(main, [*command, *columns, "--shapes", "2x8", "--json"])

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rule"]["name"] == "fpabee"
    assert report["workloads"][0]["realised"] > 0


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
    quiet = CliRunner().invoke(main, [*command, "--quiet"])
    assert quiet.exit_code == 0
    assert quiet.stderr == ""


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 1), (1000.0, 3)])
def test_units_are_repeated_while_there_is_time(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    counts: list[int] = []
    count = bench._timing

    def noted(times: list[list[float]]) -> bench.Timing:
        counts.append(sum(map(len, times)))
        return count(times)

    monkeypatch.setattr(bench, "_timing", noted)
    options = BenchOptions(Budget(exit=1), 3, seconds, shapes=(), max_single=2)
    run_bench(engines["bert"], TEXTS, options)
    assert counts == [2 * times] * 3 + [times] * 4
