"""Every option of a command reaches the function of the library that the command calls."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import click
import pytest
from click.testing import CliRunner

from fpabee.calibration import Bound, CalibrationOptions, Goal
from fpabee.calibration.goals import DEFAULT_GOALS
from fpabee.calibration.result import Report
from fpabee.commands import convert as convert_command
from fpabee.exporter import ExportOptions
from fpabee.exporter.convert import ConvertOptions, places
from fpabee.exporter.exit_config import Pooling
from fpabee.exporter.targets import PlanOptions
from fpabee.exporter.training import TrainOptions
from fpabee.runtime import ProblemType
from fpabee.runtime.files import ReadOptions, Row

from .test_command import COMMANDS

READING = "--column text=body --column text_pair=other --column label=kind"
READ = ReadOptions(None, "body", "other", "kind")
ROWS = [
    Row("a", "b", ("x",), {"text": "e", "label": "m"}),
    Row("c", "d", ("y",), {"text": "f", "label": "n"}),
]
MULTI = ProblemType.MULTI_LABEL
ENGINES = Path("engines")
BUILDS = "fpabee.commands.build.build_targets"
CALIBRATES = "fpabee.commands.calibrate.calibrate"
CONVERTS = "fpabee.exporter.convert.workflow.convert"
EXPORTS = "fpabee.exporter.pipeline.export"
LOADS = "fpabee.runtime.Engine.load"
PACKS = "fpabee.exporter.single_file.pack"
TRAINS = "fpabee.exporter.training.workflow.train"
TRAIN = "train --backbone encoder --train rows.csv --dev dev.csv --output model"


def goal(name: str, goal: Goal | Bound, **others: Any) -> CalibrationOptions:
    return CalibrationOptions(goals={name: goal}, **others)


# A command line, the function that it calls, and the beginning of that function's arguments.
CALLS: dict[str, tuple[str, list[Any]]] = {
    "build engines onnxruntime-int8": (
        BUILDS,
        [ENGINES, ("onnxruntime-int8",), [], PlanOptions()],
    ),
    "build engines tensorrt-rtx-fp16 openvino-fp32 --texts rows.csv --sm 8.9,120 --batch 1,2,4 "
    f"--sequence 8,16,32 {READING}": (
        BUILDS,
        [
            ENGINES,
            ("tensorrt-rtx-fp16", "openvino-fp32"),
            [("a", "b"), ("c", "d")],
            PlanOptions((1, 2, 4), (8, 16, 32), ("8.9", "12.0")),
        ],
    ),
    "calibrate engines --data rows.csv": (
        CALIBRATES,
        [ENGINES, ANY, CalibrationOptions()],
    ),
    "calibrate engines --data rows.csv --max-drop 1.5 --test dev.csv --target fast --threads 2 "
    f"--rule energy --rule pcee --metric macro_f1 {READING}": (
        CALIBRATES,
        [
            ENGINES,
            ROWS,
            goal(
                "drop-1.5",
                Goal(max_drop=1.5),
                target="fast",
                threads=2,
                rules=("energy", "pcee"),
                metric="macro_f1",
                reading=READ,
            ),
            ANY,
            {"report": Report(ROWS, "dev.csv")},
        ],
    ),
    "calibrate engines --data rows.csv --changed 1 --target slow --quick-target fast": (
        CALIBRATES,
        [
            ENGINES,
            ANY,
            goal("changed-1", Bound(changed_answers=0.01), target="slow", quick_target="fast"),
        ],
    ),
    "calibrate engines --data rows.csv --speedup 2 --force": (
        CALIBRATES,
        [ENGINES, ANY, goal("speedup-2", Goal(speedup=2.0), force=True)],
    ),
    "calibrate engines --data rows.csv --risk 4 --changed 3 --missed 2 --false-alarms 1 "
    "--threshold a=0.7 --threshold b=c=0.2 --confidence 90": (
        CALIBRATES,
        [
            ENGINES,
            ANY,
            goal(
                "risk-4-changed-3-missed-2-false-alarms-1",
                Bound(
                    confidence=0.9,
                    drop=0.04,
                    changed_answers=0.03,
                    missed=0.02,
                    false_alarms=0.01,
                    thresholds={"a": 0.7, "b=c": 0.2},
                ),
            ),
        ],
    ),
    "calibrate engines --data rows.csv --confidence 90": (
        CALIBRATES,
        [
            ENGINES,
            ANY,
            CalibrationOptions(goals=DEFAULT_GOALS | {"safe": Bound(drop=0.005, confidence=0.9)}),
        ],
    ),
    "convert model rows.csv --confidence 90": (
        CONVERTS,
        ["model", Path("rows.csv"), ENGINES, ConvertOptions(confidence=0.9)],
    ),
    "convert model rows.csv": (CONVERTS, ["model", Path("rows.csv"), ENGINES, ConvertOptions()]),
    "convert model rows.csv -o out --changed 2 --missed 3 --false-alarms 4 --threshold bad=0.7 "
    "--confidence 90 --adapter lora --train-texts dev.csv --no-int8 --group-column id "
    f"--max-length 64 --threads 2 --force --problem-type multi_label_classification {READING}": (
        CONVERTS,
        [
            "model",
            Path("rows.csv"),
            Path("out"),
            ConvertOptions(
                bound=Bound(
                    confidence=0.9,
                    changed_answers=0.02,
                    missed=0.03,
                    false_alarms=0.04,
                    thresholds={"bad": 0.7},
                ),
                adapter=Path("lora"),
                train_texts=Path("dev.csv"),
                int8=False,
                problem_type=MULTI,
                max_length=64,
                group_column="id",
                threads=2,
                reading=READ,
                force=True,
                confidence=0.9,
            ),
        ],
    ),
    "convert model rows.csv --top 3 --changed 5": (
        CONVERTS,
        [
            "model",
            Path("rows.csv"),
            ENGINES,
            ConvertOptions(bound=Bound(changed_answers=0.05), top=3),
        ],
    ),
    "export model": (EXPORTS, ["model", ENGINES, ExportOptions(texts=[])]),
    "export model -o out --exits 2,4 --max-length 12 --texts rows.csv --force --problem-type "
    f"multi_label_classification {READING}": (
        EXPORTS,
        ["model", Path("out"), ExportOptions((2, 4), MULTI, 12, [("a", "b"), ("c", "d")], True)],
    ),
    "pack engines -o one": (
        PACKS,
        [ENGINES, Path("one"), None, None, False, PlanOptions((1, 1, 32))],
    ),
    "pack engines -o one --target tensorrt-rtx-fp16 --sm 8.9,120 --batch 1,2,4 "
    "--sequence 8,16,32": (
        PACKS,
        [
            ENGINES,
            Path("one"),
            "tensorrt-rtx-fp16",
            None,
            False,
            PlanOptions((1, 2, 4), (8, 16, 32), ("8.9", "12.0")),
        ],
    ),
    "pack engines -o one --target fast --operating-point safe --layout transformers.js": (
        PACKS,
        [ENGINES, Path("one"), "fast", "safe", True],
    ),
    "run engines rows.csv --target fast --operating-point safe --max-length 9 --threads 2": (
        LOADS,
        [ENGINES, "fast", "safe", {"max_length": 9, "threads": 2}],
    ),
    "serve engines --target fast --operating-point safe --max-length 9 --threads 2 --check "
    "--watch 1 --device 1": (
        LOADS,
        [
            ENGINES,
            {"target": "fast", "operating_point": "safe", "max_length": 9, "threads": 2}
            | {"check": True, "watch": 1.0, "device": 1},
        ],
    ),
    TRAIN: (
        TRAINS,
        [Path("model"), TrainOptions(train="rows.csv", dev="dev.csv", backbone="encoder")],
    ),
    f"{TRAIN} --test dev.csv --problem-type multi_label_classification --exits 2,4 --distill 0 "
    "--pooling attention --epochs 0.5 --lr 1e-4 --batch-size 4 --max-length 64 --seed 7 --bf16 "
    f"--force --no-exit-0 {READING}": (
        TRAINS,
        [
            Path("model"),
            TrainOptions(
                train="rows.csv",
                dev="dev.csv",
                test="dev.csv",
                backbone="encoder",
                problem_type=MULTI,
                exits=(2, 4),
                distill=0.0,
                pooling=Pooling.ATTENTION,
                epochs=0.5,
                lr=1e-4,
                batch_size=4,
                max_length=64,
                seed=7,
                bf16=True,
                exit_0=False,
                reading=READ,
                force=True,
            ),
        ],
    ),
}
# Options that other functions take, or that say what is printed; other tests are about them.
ELSEWHERE = {
    "calibrate": "--all-targets --set-default --report",
    "convert": "--single-file",
    "export": "--fp16 --int8",
    "run": "--input --output --full-depth --metrics --on-error --rule --column --input-format "
    "--with-text --scores --resume --unbuffered",
    "serve": "--host --port --allowed-host --max-rows",
}


class CalledError(Exception):
    """The arguments of a function that ends the command instead of doing its work."""


def call(*positional: Any, **named: Any) -> None:
    named.pop("progress", None)
    raise CalledError(*positional, *([named] if named else []))


@pytest.mark.parametrize("line", CALLS)
def test_options_reach_the_library(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, expected = CALLS[line]
    command, *arguments = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "encoder", "lora"):
        if folder != "model" or command != "train":
            Path(folder).mkdir()
            Path(folder, "config.json").write_text("{}")
    Path("lora", "adapter_config.json").write_text("{}")
    for file in ("rows.csv", "dev.csv"):
        Path(file).write_text("body,other,kind,text,label\na,b,x,e,m\nc,d,y,f,n\n")
    monkeypatch.setattr(places, "require", lambda _: None)  # as if peft were installed
    monkeypatch.setattr(convert_command, "check_inputs", lambda *_: None)  # two texts are too few
    monkeypatch.setattr(function, call)
    result = CliRunner().invoke(importlib.import_module(COMMANDS[command]).main, arguments)
    assert isinstance(result.exception, CalledError), result.output
    assert list(result.exception.args)[: len(expected)] == expected


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "inspect"])
def test_every_option_has_a_test(command: str) -> None:
    lines = [line.split() for line in CALLS if line.startswith(f"{command} ")]
    tested = {word for line in lines for word in line} | {*ELSEWHERE.get(command, "").split()}
    params = importlib.import_module(COMMANDS[command]).main.params
    options = [param for param in params if isinstance(param, click.Option)]
    missing = {each.opts[0] for each in options if not tested & {*each.opts, *each.secondary_opts}}
    assert missing <= {"--quiet", "--json"}
