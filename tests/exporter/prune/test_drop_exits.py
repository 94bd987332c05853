"""`fpabee-export --from ENGINES --exits`: a new folder, calibrated again, beside the old one."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from fpabee.calibration import CalibrationOptions, Goal, calibrate
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.cli.export import main
from fpabee.exporter.prune import keep as keep_exits_module
from fpabee.exporter.prune.merge import merge_graphs
from fpabee.exporter.targets.options import RTX, PlanOptions
from fpabee.runtime import Engine, FPabee, read_manifest
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.files import Row

WORDS = ("the", "good", "bad", "film", "plot", "music", "stop", "turn", "on", "light", "rain")
QUICK = ("--quiet", "--threads", "1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def contents(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def make_rows(folder: Path, count: int = 100) -> list[Row]:
    """Random texts, most of them labelled as the model has it at full depth."""
    generator = random.Random(3)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(count)]
    with Engine.load(folder, threads=1) as engine:
        answers = [prediction.labels for prediction in engine.predict(texts, full_depth=True)]
        names = engine.labels
    return [
        Row(text, None, answer if generator.random() > 0.1 else (names[0],), {}, line)
        for line, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)
    ]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, list[Row]]:
    """A calibrated engines folder, and its rows. Read-only: see `calibrated`."""
    engines = request.getfixturevalue("engines")
    folder = Path(shutil.copytree(engines["bert"], tmp_path_factory.mktemp("placed") / "engines"))
    rows = make_rows(folder)
    goals = {"careful": Goal(max_drop=2.0), "usual": Goal(max_drop=10.0)}
    options = CalibrationOptions(
        goals=goals, default="usual", rules=("fpabee",), batch_size=4, threads=1
    )
    calibrate(folder, rows, options)
    return folder, rows


@pytest.fixture
def calibrated(made: tuple[Path, list[Row]], tmp_path: Path) -> Path:
    """A calibrated engines folder of one's own."""
    return Path(shutil.copytree(made[0], tmp_path / "engines"))


def test_points_are_calibrated_again_and_the_old_folder_stays(
    calibrated: Path, made: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    before, new = contents(calibrated), tmp_path / "new"
    result = run("--from", calibrated, "--exits", "1,3", "-o", new, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert contents(calibrated) == before
    manifest = read_manifest(new)
    assert content["layers"] == content["exits"] == [1, 3] == list(manifest.exit_layers)
    target = manifest.targets["onnxruntime-fp32"]
    assert target.default_operating_point == "usual"
    assert set(target.operating_points) == set(content["points"]) == {"careful", "usual"}
    for name, point in content["points"].items():
        assert point["before"]["wish"] == point["after"]["wish"]
        rule = target.operating_points[name].rule
        assert rule["name"] in ("fpabee", "budget")
    with Engine.load(new, threads=1) as engine:
        assert engine.operating_point == "usual"
        engine.predict([row.content for row in made[1]])


def test_a_table_compares_the_points_for_people(calibrated: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    result = run("--from", calibrated, "--exits", "2,3", "-o", new, *QUICK)
    assert result.exit_code == 0, result.output
    assert "2 of 3 exits kept, after layers 2, 3" in result.stdout
    assert "of the PyTorch model" in result.stdout
    assert "the last exit was dropped" not in result.stdout
    for word in ("careful", "usual", "before", "after"):
        assert word in result.stdout
    assert not re.search(r"\d\.\d+x|over old|speed-up", result.stdout), "times are not compared"
    assert result.stdout.splitlines()[-1] == f"next: fpabee-run {new} texts.txt"
    points = read_manifest(new).targets["onnxruntime-fp32"].operating_points
    assert points["usual"].rows == 100
    assert len(points["usual"].exits) == 2


@pytest.mark.parametrize(
    ("exits", "said", "not_said"),
    [
        (
            "1,2,3",
            "all exits are kept; calibrated again on the same rows: careful, usual",
            "before",
        ),
        ("1,2", "the last exit was dropped: full depth is now layer 2", "all exits are kept"),
        ("3", "1 of 3 exits kept, after layers 3", "the last exit was dropped"),
    ],
)
def test_what_else_is_said_for_people(
    exits: str, said: str, not_said: str, calibrated: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    result = run("--from", calibrated, "--exits", exits, "-o", new, *QUICK)
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert not_said not in result.stdout
    points = read_manifest(new).targets["onnxruntime-fp32"].operating_points
    if exits == "3":
        assert [point.mean_depth for point in points.values()] == [3.0, 3.0]


def test_points_of_other_targets_are_named(calibrated: Path, tmp_path: Path) -> None:
    manifest = read_manifest(calibrated)
    mine = manifest.targets["onnxruntime-fp32"]
    gpu = Target(
        backend="onnxruntime",
        precision="fp32",
        device="cuda",
        tolerance=None,
        operating_points={"edge": mine.operating_points["usual"]},
    )
    targets = {**manifest.targets, "gpu": gpu}
    write_manifest(calibrated, msgspec.structs.replace(manifest, targets=targets))
    new = tmp_path / "new"
    result = run("--from", calibrated, "--exits", "1,3", "-o", new, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    (lost,) = json.loads(result.stdout)["not_valid_any_more"]
    assert (lost["target"], lost["point"]) == ("gpu", "edge")
    assert lost["command"] == f"fpabee-calibrate {new} --data DATA --target gpu"
    assert read_manifest(new).targets["gpu"].operating_points == {}


def test_a_goal_for_speed_that_fewer_exits_cannot_meet_is_lost_alone(
    calibrated: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(calibrated)
    target = manifest.targets["onnxruntime-fp32"]
    usual = target.operating_points["usual"]
    quick = msgspec.structs.replace(usual, goal=Goal(speedup=2.9))
    points = {"quick": quick, **target.operating_points}
    changed = msgspec.structs.replace(
        target, operating_points=points, default_operating_point="quick"
    )
    targets = {**manifest.targets, "onnxruntime-fp32": changed}
    write_manifest(calibrated, msgspec.structs.replace(manifest, targets=targets))
    new = tmp_path / "new"
    result = run("--from", calibrated, "--exits", "2,3", "-o", new, *QUICK)
    assert result.exit_code == 0, result.output
    assert "no longer valid: quick of onnxruntime-fp32: " in result.stdout
    assert "default operating point: careful (before: quick)" in result.stdout
    made = read_manifest(new).targets["onnxruntime-fp32"]
    assert set(made.operating_points) == {"careful", "usual"}
    assert made.default_operating_point == "careful"


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("tensorrt_rtx"), reason="needs tensorrt_rtx")
def test_built_targets_are_built_again(calibrated: Path, tmp_path: Path) -> None:
    plans = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
    add_targets(calibrated, AddTargetsOptions(backends=(RTX,), plans=plans))
    (name,) = [name for name in read_manifest(calibrated).targets if name.startswith(RTX)]
    shapes = ("--batch", "1,2,4", "--sequence", "8,16,32")
    new = tmp_path / "new"
    result = run("--from", calibrated, "--exits", "1,3", "-o", new, *QUICK, *shapes)
    assert result.exit_code == 0, result.output
    assert f"built {name} again" in result.stdout
    target = read_manifest(new).targets[name]
    assert target.compute_capabilities == ("8.6",)
    assert sorted(target.files) == ["segment_01", "segment_02"]
    for file in target.files.values():
        assert (new / file.file).is_file()


def test_rows_that_were_not_kept_can_be_given(
    calibrated: Path, made: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    shutil.rmtree(calibrated / "calibration")
    new = tmp_path / "new"
    placed = ("--from", calibrated, "--exits", "1,3", "-o", new, *QUICK)
    data = tmp_path / "dev.rows"
    lines = [json.dumps({"body": row.text, "kind": (row.labels or ("",))[0]}) for row in made[1]]
    data.write_text("\n".join(lines) + "\n")
    columns = ("--input-format", "jsonl", "--text-column", "body", "--label-column", "kind")
    result = run(*placed, "--calibration-data", data, *columns)
    assert result.exit_code == 0, result.output
    assert set(read_manifest(new).targets["onnxruntime-fp32"].operating_points) == {
        "careful",
        "usual",
    }
    assert not (calibrated / "calibration").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"texts": "a"}', 'no string field "text"'), ('{"text": "a"}', "line 1 has no label")],
)
def test_rows_that_cannot_be_used_are_refused_first(
    calibrated: Path, tmp_path: Path, line: str, message: str
) -> None:
    data = tmp_path / "dev.jsonl"
    data.write_text(f"{line}\n")
    new = tmp_path / "new"
    given = ("--calibration-data", data, *QUICK)
    refused = run("--from", calibrated, "--exits", "1,3", "-o", new, *given)
    assert_one_error(refused, message)
    assert not new.exists()


def test_a_point_whose_rows_are_gone_is_named(calibrated: Path, tmp_path: Path) -> None:
    shutil.rmtree(calibrated / "calibration")
    result = run("--from", calibrated, "--exits", "1,3", "-o", tmp_path / "new", *QUICK)
    assert result.exit_code == 0, result.output
    assert "no longer valid: usual of onnxruntime-fp32: its rows are not in" in result.stdout


def assert_one_error(result: Result, *parts: str) -> None:
    """Exit code 1, nothing on stdout, and one line that says what is wrong and what to do."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("error: ")
    for part in (*parts, " -> "):
        assert part in line


def test_impossible_settings_are_refused(
    engine_copy: Callable[..., Path], calibrated: Path, tmp_path: Path
) -> None:
    new, plain = tmp_path / "new", engine_copy("bert", "plain")
    given = ("--from", calibrated, *QUICK)
    assert_one_error(run(*given, "--exits", "1,3", "-o", new, "--target", "tpu"), "no target 'tpu'")
    assert_one_error(run(*given, "--exits", "2,4", "-o", new), "a model with 3 exits")
    assert_one_error(run(*given, "--exits", "2,3", "-o", calibrated), "overwritten", "output")
    assert_one_error(run(*given, "--exits", "2,3", "-o", plain), "--force")
    assert not new.exists()


def test_a_merge_that_changes_the_model_leaves_nothing(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    merge = merge_graphs

    def wrong(*arguments: Any) -> Any:
        proto = merge(*arguments)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("classifier.bias"):
                values = onnx.numpy_helper.to_array(tensor) + 1
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return proto

    monkeypatch.setattr(keep_exits_module, "merge_graphs", wrong)
    result = run("--from", calibrated, "--exits", "2,3", "-o", tmp_path / "new", *QUICK)
    assert_one_error(result, "differs from the PyTorch model from exit 1 on")
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_bound_is_tested_again(
    engine_copy: Callable[..., Path], made: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    from fpabee.calibration import Bound, RiskOf

    source = engine_copy("bert")
    bound = Bound(0.4, 0.95, RiskOf.DISAGREEMENT)
    options = CalibrationOptions(bound=bound, name="sure", rules=("entropy",), threads=1)
    calibrate(source, made[1], options)
    new = tmp_path / "new"
    result = run("--from", source, "--exits", "2,3", "-o", new, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    target = read_manifest(new).targets["onnxruntime-fp32"]
    certificate = target.operating_points["sure"].certificate
    assert certificate is not None
    assert (certificate.risk_of, certificate.risk) == ("disagreement", 40.0)
    assert target.default_operating_point == "sure"


def test_labels_are_not_needed_for_points_that_did_without(
    engine_copy: Callable[..., Path], made: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    source = engine_copy("bert")
    rows = [Row(row.text, None, None, {}, row.line) for row in made[1]]
    options = CalibrationOptions(
        goals={"usual": Goal(max_drop=5.0)}, default="usual", unlabelled=True, threads=1
    )
    calibrate(source, rows, options)
    result = run("--from", source, "--exits", "1,3", "-o", tmp_path / "new", *QUICK, "--json")
    assert result.exit_code == 0, result.output


def test_a_folder_without_points_keeps_its_rule_and_replaces_another(
    engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    source, new = engine_copy("bert"), engine_copy("albert", "new")
    result = run("--from", source, "--exits", "1,3", "-o", new, "--force", *QUICK)
    assert result.exit_code == 0, result.output
    with Engine.load(new, threads=1) as engine:
        assert engine.manifest.exit_layers == (1, 3)
        assert engine.rule == FPabee(threshold=0.1, patience=1)
        assert engine.predict(["the good film"])[0].layer in (1, 3)
