"""`fpabee-export --from ENGINES --exits`: a new folder, calibrated again, beside the old one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from fpabee.calibration import Bound, CalibrationOptions, Goal, RiskOf, calibrate
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.cli.export import main
from fpabee.exporter.prune import keep as keep_exits_module
from fpabee.exporter.prune.drop_exits import DropExitsOptions, drop_exits
from fpabee.exporter.prune.merge import merge_graphs
from fpabee.exporter.targets import tensorrt
from fpabee.exporter.targets.options import RTX, PlanOptions
from fpabee.exporter.targets.plan_worker import PlanRequest, PlanResult
from fpabee.runtime import Engine, FPabee, read_manifest
from fpabee.runtime.artifact.folder import write_manifest
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.files import Row

from ...calibration.conftest import label_rows
from ...doubles.device import Double, serve

TARGET = "onnxruntime-fp32"

Drop = Callable[..., Result]


def contents(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, engines: Mapping[str, Path]
) -> tuple[Path, list[Row]]:
    """A calibrated engines folder, and its rows. Read-only: see `calibrated`."""
    folder = Path(shutil.copytree(engines["bert"], tmp_path_factory.mktemp("placed") / "engines"))
    rows = label_rows(folder, count=100)
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


@pytest.fixture
def drop(tmp_path: Path) -> Drop:
    """Drops exits of a folder; the new one is `new`, unless another is given."""

    def run(source: Path, exits: str, *options: object, new: Path = tmp_path / "new") -> Result:
        given = ("--from", source, "--exits", exits, "-o", new, "--quiet", "--threads", 1)
        return CliRunner().invoke(main, [str(argument) for argument in (*given, *options)])

    return run


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "new"


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_one_error(result: Result, *parts: str) -> None:
    """Exit code 1, nothing on stdout, and one line that says what is wrong and what to do."""
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("error: ")
    for part in (*parts, " -> "):
        assert part in line


def change_target(folder: Path, **changes: Any) -> None:
    """Change the record of the folder's target, and add another one with its points."""
    manifest = read_manifest(folder)
    mine = manifest.targets[TARGET]
    gpu = Target(
        backend="onnxruntime",
        precision="fp32",
        device="cuda",
        tolerance=None,
        operating_points={"edge": mine.operating_points["usual"]},
    )
    targets = {TARGET: msgspec.structs.replace(mine, **changes), "gpu": gpu}
    write_manifest(folder, msgspec.structs.replace(manifest, targets=targets))


def test_points_are_calibrated_again_and_the_old_folder_stays(
    calibrated: Path, made: tuple[Path, list[Row]], drop: Drop, new: Path
) -> None:
    change_target(calibrated)
    before = contents(calibrated)
    content = json.loads(succeeded(drop(calibrated, "1,3", "--json")))
    assert contents(calibrated) == before
    manifest = read_manifest(new)
    assert content["layers"] == content["exits"] == [1, 3] == list(manifest.exit_layers)
    target = manifest.targets[TARGET]
    assert target.default_operating_point == "usual"
    assert set(target.operating_points) == set(content["points"]) == {"careful", "usual"}
    for name, point in content["points"].items():
        assert point["before"]["wish"] == point["after"]["wish"]
        assert point["after"]["measured_speedup"].keys() == {"1", "4"}, "the same batch size"
        assert target.operating_points[name].rule["name"] in ("fpabee", "budget")
        assert target.operating_points[name].rows == 100
        assert len(target.operating_points[name].exits) == 2
    (lost,) = content["not_valid_any_more"]
    assert (lost["target"], lost["point"]) == ("gpu", "edge")
    assert lost["command"] == f"fpabee-calibrate {new} --data DATA --target gpu"
    assert manifest.targets["gpu"].operating_points == {}
    with Engine.load(new, threads=1) as engine:
        assert engine.operating_point == "usual"
        engine.predict([row.content for row in made[1]])


@pytest.mark.parametrize(
    ("exits", "said", "not_said"),
    [
        ("2,3", ("2 of 3 exits kept, after layers 2, 3", "before", "after"), "exit is not kept"),
        ("1,2,3", ("all exits are kept; calibrated again on the same rows: careful, usual",),
         "before"),
        ("1,2", ("the last exit is not kept: full depth is now layer 2",), "all exits are kept"),
        ("3", ("1 of 3 exits kept, after layers 3",), "the last exit is not kept"),
    ],
)  # fmt: skip
def test_what_is_said_to_people(
    exits: str, said: tuple[str, ...], not_said: str, calibrated: Path, drop: Drop, new: Path
) -> None:
    shown = succeeded(drop(calibrated, exits))
    for part in (*said, "careful", "usual", "of the PyTorch model"):
        assert part in shown
    assert not_said not in shown
    assert not re.search(r"\d\.\d+x|over old|speed-up", shown), "times are not compared"
    assert shown.splitlines()[-1] == f"next: fpabee-run {new} texts.txt"
    points = read_manifest(new).targets[TARGET].operating_points
    assert exits != "3" or [point.mean_depth for point in points.values()] == [3.0, 3.0]
    old = read_manifest(calibrated).targets[TARGET].operating_points["usual"]
    in_points = f"{100 * (old.full_depth_score - old.score):+.2f} ("
    assert exits == "1,2,3" or in_points in shown


def test_a_goal_for_speed_that_fewer_exits_cannot_meet_is_lost_alone(
    calibrated: Path, drop: Drop, new: Path
) -> None:
    points = read_manifest(calibrated).targets[TARGET].operating_points
    quick = msgspec.structs.replace(points["usual"], goal=Goal(speedup=2.9))
    changed = {"quick": quick, **points}
    change_target(calibrated, operating_points=changed, default_operating_point="quick")
    shown = succeeded(drop(calibrated, "2,3"))
    assert "no longer valid: quick of onnxruntime-fp32: " in shown
    assert "default operating point: careful (before: quick)" in shown
    target = read_manifest(new).targets[TARGET]
    assert set(target.operating_points) == {"careful", "usual"}
    assert target.default_operating_point == "careful"


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("tensorrt_rtx"), reason="needs tensorrt_rtx")
def test_built_targets_are_built_again(calibrated: Path, drop: Drop, new: Path) -> None:
    plans = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
    add_targets(calibrated, AddTargetsOptions(backends=(RTX,), plans=plans))
    (name,) = [name for name in read_manifest(calibrated).targets if name.startswith(RTX)]
    assert f"built {name} again" in succeeded(drop(calibrated, "1,3"))
    before, target = (read_manifest(folder).targets[name] for folder in (calibrated, new))
    assert target.profiles == before.profiles
    assert target.sequence_lengths == before.sequence_lengths
    assert target.compute_capabilities == ("8.6",)
    assert sorted(target.files) == ["segment_01", "segment_02"]
    for file in target.files.values():
        assert (new / file.file).is_file()


def test_plans_keep_their_shapes_and_a_failed_build_loses_nothing_else(
    double: Double, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = PlanOptions((1, 2, 4), (8, 16, 32), hardware_compatible=True)
    (name,) = add_targets(
        double.folder, AddTargetsOptions(backends=("tensorrt",), plans=plans)
    ).built
    before = read_manifest(double.folder).targets[name]
    serve(monkeypatch, new)
    result = drop_exits(double.folder, new, DropExitsOptions((1, 3)))
    after = result.manifest.targets[name]
    assert result.built == (name,)
    for field in ("profiles", "batch_sizes", "sequence_lengths", "hardware_compatible"):
        assert getattr(after, field) == getattr(before, field)

    def fail(request: PlanRequest) -> PlanResult:
        return PlanResult(error="no kernel fits")

    monkeypatch.setattr(tensorrt, "_run_worker", fail)
    result = drop_exits(double.folder, new, DropExitsOptions((2, 3), force=True))
    assert (result.built, result.left_out) == ((), (name,))
    assert "no kernel fits" in result.manifest.not_built["tensorrt-fp32"].reason
    assert read_manifest(new) == result.manifest


def test_rows_that_were_not_kept_can_be_given(
    calibrated: Path, made: tuple[Path, list[Row]], drop: Drop, new: Path, tmp_path: Path
) -> None:
    shutil.rmtree(calibrated / "calibration")
    data = tmp_path / "dev.rows"
    columns = ("--input-format", "jsonl", "--text-column", "body", "--label-column", "kind")
    given = ("--calibration-data", data, *columns)
    data.write_text('{"body": "a"}\n')
    assert_one_error(drop(calibrated, "1,3", *given), "line 1 has no label")
    assert not new.exists()
    lines = [json.dumps({"body": row.text, "kind": (row.labels or ("",))[0]}) for row in made[1]]
    data.write_text("\n".join(lines) + "\n")
    succeeded(drop(calibrated, "1,3", *given))
    assert set(read_manifest(new).targets[TARGET].operating_points) == {"careful", "usual"}
    assert not (calibrated / "calibration").exists()
    shown = succeeded(drop(calibrated, "1,3", new=tmp_path / "without"))
    assert "no longer valid: usual of onnxruntime-fp32: its rows are not in" in shown


def test_impossible_settings_are_refused(
    engine_copy: Callable[..., Path], calibrated: Path, drop: Drop, new: Path
) -> None:
    assert_one_error(drop(calibrated, "1,3", "--target", "tpu"), "no target 'tpu'")
    assert_one_error(drop(calibrated, "2,4"), "a model with 3 exits")
    assert_one_error(drop(calibrated, "2,3", new=calibrated), "overwritten", "output")
    assert_one_error(drop(calibrated, "2,3", new=engine_copy("bert", "plain")), "--force")
    assert not new.exists()


def test_a_merge_that_changes_the_model_leaves_nothing(
    calibrated: Path, drop: Drop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        proto = merge_graphs(*arguments)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("classifier.bias"):
                values = numpy_helper.to_array(tensor) + 1
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return proto

    monkeypatch.setattr(keep_exits_module, "merge_graphs", wrong)
    assert_one_error(drop(calibrated, "2,3"), "differs from the PyTorch model from exit 1 on")
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_guarantee_needs_rows_that_chose_no_exits_and_no_labels(
    engine_copy: Callable[..., Path],
    made: tuple[Path, list[Row]],
    drop: Drop,
    new: Path,
    tmp_path: Path,
) -> None:
    source = engine_copy("bert")
    rows = [Row(row.text, None, None, {}, row.line) for row in made[1]]
    bound = Bound(0.4, 0.95, RiskOf.DISAGREEMENT)
    options = CalibrationOptions(bound=bound, name="sure", unlabelled=True, threads=1)
    calibrate(source, rows, options)
    shown = succeeded(drop(source, "2,3"))
    assert "sure of onnxruntime-fp32: its guarantee needs rows that chose no exits" in shown
    assert read_manifest(new).targets[TARGET].operating_points == {}
    data = tmp_path / "new.txt"
    data.write_text("\n".join(row.text for row in rows) + "\n")
    succeeded(drop(source, "2,3", "--calibration-data", data, "--force"))
    target = read_manifest(new).targets[TARGET]
    certificate = target.operating_points["sure"].certificate
    assert certificate is not None
    found = (certificate.risk_of, certificate.risk, certificate.confidence)
    assert found == ("disagreement", 40.0, 95.0)
    assert target.default_operating_point == "sure"


def test_a_folder_without_points_keeps_its_rule_and_replaces_another(
    engine_copy: Callable[..., Path], drop: Drop
) -> None:
    source, new = engine_copy("bert"), engine_copy("albert", "new")
    succeeded(drop(source, "1,3", "--force"))
    with Engine.load(new, threads=1) as engine:
        assert engine.manifest.exit_layers == (1, 3)
        assert engine.rule == FPabee(threshold=0.1, patience=1)
        assert engine.predict(["the good film"])[0].layer in (1, 3)
