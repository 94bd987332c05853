"""An engines folder that version 0.1.0 wrote works in every later version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from fpabee.runtime import Engine, read_manifest
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.artifact.manifest import MANIFEST_NAME
from fpabee.runtime.cli.inspect import main as inspect
from fpabee.runtime.cli.run import main as run

GOLDEN = Path(__file__).parent / "golden" / "engines_1_0"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
TEXTS: list[str] = EXPECTED["texts"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "engines", tmp_path / "engines"))


def succeeds(command: click.Command, *arguments: object) -> str:
    """Runs a command and returns its standard output."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("point", EXPECTED["points"])
def test_every_operating_point_gives_the_same_answers(point: str) -> None:
    with Engine.load(GOLDEN / "engines", operating_point=point, threads=1) as engine:
        predictions = engine.predict(TEXTS)
    for found, expected in zip(predictions, EXPECTED["points"][point], strict=True):
        assert list(found.labels) == expected["labels"]
        assert found.exit == expected["exit"]
        np.testing.assert_allclose(found.scores, expected["scores"], rtol=0, atol=1e-5)


def test_it_can_be_inspected_and_checked() -> None:
    report = json.loads(succeeds(inspect, GOLDEN / "engines", "--check", "--json"))
    assert all(point in json.dumps(report) for point in EXPECTED["points"])


def test_the_default_operating_point_runs_on_a_file(tmp_path: Path) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    succeeds(run, GOLDEN / "engines", "--input", source, "--output", output, "--threads", 1)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    expected = EXPECTED["points"]["balanced"]
    assert [record["labels"] for record in records] == [answer["labels"] for answer in expected]


def test_its_manifest_survives_a_rewrite(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    before = json.loads(path.read_text(encoding="utf-8"))
    write_manifest(folder, read_manifest(folder))
    after = json.loads(path.read_text(encoding="utf-8"))
    assert_kept(before, after)  # among them `cuts`, `wish` and `surely`, whose classes were renamed


def assert_kept(before: Any, after: Any) -> None:
    """Every value is still there; a later version may add others."""
    if isinstance(before, dict):
        for key, value in before.items():
            assert key in after
            assert_kept(value, after[key])
    else:
        assert after == before
