"""What is compared is what the report says, and its ratios are those of its times."""

from __future__ import annotations

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
    WITH_RULE,
    Workload,
    _run_graph,
    run_bench,
)
from fpabee.exporter.cli.bench import main, show
from fpabee.exporter.merge import write_one_graph
from fpabee.runtime import Engine, Entropy

from ..doubles.openvino import add_openvino

TEXTS = ["turn on the light", "", "is it not a good film", "book a table " * 5]


def test_the_full_graph_gives_the_last_exit(engines: Mapping[str, Path], tmp_path: Path) -> None:
    write_one_graph(engines["bert"], tmp_path)
    with Engine.load(engines["bert"]) as engine:
        rows, expected = engine.encode(TEXTS), engine.trace(TEXTS).logits[-1]
    found: list[NDArray[np.float32]] = []
    with Engine.load(tmp_path) as one, one.chain() as graph:
        enqueue = graph.execution.enqueue

        def noted(hidden: Any) -> Any:
            outputs = enqueue(hidden)
            found.append(outputs().copy())
            return outputs

        graph.execution.enqueue = noted  # type: ignore[method-assign]
        _run_graph(graph, rows)
    order = np.argsort([-len(row) for row in rows], kind="stable")
    np.testing.assert_allclose(np.concatenate(found), expected[order], atol=1e-5)


def test_report_and_progress(
    exit_0_engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(bench, "_REPEATS", 2)
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    add_openvino(folder, "fp32")
    rule = Entropy(threshold=0.99)
    with Engine.load(folder, "openvino-fp32") as engine:
        engine.window_bytes = engine._row_bytes(len(engine.encode(TEXTS)[0])) + 1
        assert [len(rows) for rows in engine.windows(TEXTS)] == [2, 1, 1]
        target, found = run_bench(folder, engine, rule, TEXTS, lambda *state: told.append(state))
        trace, layers = engine.trace(TEXTS, rule=rule), engine.manifest.exit_layers
    assert target == "openvino-fp32"
    names = ["texts one by one", "file of 4 texts"]
    assert [workload.name for workload in found] == names
    assert [len(workload.seconds[WITH_RULE]) for workload in found] == [4, 3]
    assert [workload.texts for workload in found] == [4, 4]
    ran = [layers[number] for number in trace.exits]
    for workload in found:
        assert set(workload.seconds) == {FULL_GRAPH, FULL_DEPTH, WITH_RULE}
        assert all(min(seconds) > 0 for seconds in workload.seconds.values())
        assert workload.mean_depth == sum(ran) / 4
        tokens = sum(layer * length for layer, length in zip(ran, trace.lengths, strict=True))
        assert workload.theoretical == pytest.approx(3 * trace.lengths.sum() / tokens)
    assert told[0] == ("load", 0, 1)
    assert told[1:] == [
        (name, done, units)
        for name, units in zip(names, (4, 3), strict=True)
        for done in range(units + 1)
    ]


def test_the_command_prints_a_table_that_is_not_cut(
    engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_REPEATS", 1)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS[2:]))
    command = [str(engines["bert"]), "--input", str(texts), "--depth", "0.8", "--rule", "entropy"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    lines = [line.split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0][1:3]] == ["workload", FULL_GRAPH]
    assert {len(line) for line in lines} == {7 + 2}
    assert [line[1].strip() for line in lines[2:]] == ["texts one by one", "file of 2 texts"]
    assert "Rule: entropy" in result.stdout
    assert "threads; fpabee " in result.stdout


def test_the_speed_up_is_that_of_the_times_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians would give 1.00x: the texts that stop early are fewer than half."""
    seconds = {FULL_GRAPH: [0.09] * 3, FULL_DEPTH: [0.09] * 3, WITH_RULE: [0.09, 0.01, 0.09]}
    some, none = (Workload("file", 6, seconds, depth, 1.5) for depth in (2.0, 0.0))
    show([none, some], Entropy(threshold=0.1), 3)
    shown = capsys.readouterr().out
    without, row = (line.split("|")[1:-1] for line in shown.splitlines() if "| file" in line)
    times, ratios = row[1:4], row[4:]
    assert [cell.strip() for cell in times] == ["45.000", "45.000 (1.00x)", "31.667"]
    assert [cell.strip() for cell in ratios] == ["1.42x", "1.50x", "0.947"]
    assert [cell.strip() for cell in without[5:]] == ["no layers", ""]
