#!/usr/bin/env python
"""Does the runtime answer on this processor as it did on another one? See `scripts/check_arm`.

    python scripts/check_arm.py make FOLDER [ENGINES ...]
    python scripts/check_arm.py check FOLDER --processor cortex-a72

`make` runs on x86. It writes tiny models with every form of head into FOLDER, each as an engines
folder and as a packed file with the answers that the file gives there. Folders that fpabee 1.0
wrote are checked as well, and so are ENGINES, if any. `check` needs the runtime and no PyTorch, and
prints one line for each check. What the answers have to be is in the folders: the reference logits
of the PyTorch model, and the answers of the packed file. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner
from numpy.typing import NDArray

import fpabee.runtime
from fpabee.runtime import Engine
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS
from fpabee.runtime.artifact.reference import Text, read_reference
from fpabee.runtime.check import (
    BATCH_LIMIT,
    EXPORT_LIMIT,
    Logits,
    exits_near_ties,
    logit_differences,
    logit_sizes,
    requirements_of,
)
from fpabee.runtime.encoding import TextEncoder, padded_inputs, padding_values
from fpabee.runtime.errors import CheckError, FpabeeError
from fpabee.runtime.machine import environment
from fpabee.runtime.rules.measures import Integers, Mask
from fpabee.runtime.rules.rules import ExitRule
from fpabee.runtime.targets import rule_of, why_not
from fpabee.runtime.tasks import task_of

ROOT = Path(__file__).parents[1]
ENGINES = "engines"
PACKED = "packed"
ANSWERS = "answers.npz"
"""The logits and exits of the packed file for single texts, where it was made."""
TARGETS = ("openvino-fp32", "openvino-bf16")
CONVERSION = "conversion"
OLD = "1.0-"
"""How the names of folders of fpabee 1.0 begin. They cannot be mended, so they may be refused."""
WIDE = 2**14  # the inner size of layers for which heads that attend cost little
# Of the texts of the tiny models. The vectors of processors have 4, 8 or 16 numbers, so padding
# begins and ends within and between them.
TEXTS = 20
MOST_WORDS = 50
ROWS = 300

Answers = tuple[Logits, Integers]
"""The logits `[rows, labels]` and the exits `[rows]` of a packed file."""


def make_models(folder: Path) -> None:
    """Engines folders of tiny models, one for each way of pooling, and one of a conversion."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import WORDS, add_exit_0, make_model
    from tests.exporter.convert.conftest import TEXTS as TO_CONVERT
    from tests.exporter.convert.conftest import make_telling

    from fpabee.calibration import Bound, CalibrationOptions, calibrate
    from fpabee.exporter import ExportOptions, export
    from fpabee.exporter.convert import ConvertOptions, convert
    from fpabee.exporter.exit_config import Pooling
    from fpabee.exporter.targets import build_targets
    from fpabee.runtime.files import Row

    def texts(count: int) -> list[str]:
        draw = random.Random(count)
        return [" ".join(draw.choices(WORDS, k=draw.randint(1, MOST_WORDS))) for _ in range(count)]

    bound = Bound(changed_answers=0.2)
    for pooling in Pooling:
        engines = folder / pooling.value / ENGINES
        queries = 2 if pooling is Pooling.ATTENTION else 0
        model = folder / "models" / pooling.value
        make_model("bert", model, queries=queries, pooling=pooling.value)
        export(model, engines, ExportOptions(texts=texts(TEXTS)))
        add_exit_0(engines)
        rows = [Row(text) for text in texts(ROWS)]
        calibrate(engines, rows, CalibrationOptions(goals={"kept": bound}, threads=1))
    source = make_model("bert", folder / "models" / "wide", intermediate_size=WIDE)
    classifier = make_telling(source, folder / "models" / CONVERSION, None)
    engines = folder / CONVERSION / ENGINES
    file = folder / "models" / "texts.txt"
    file.write_text("\n".join(TO_CONVERT), encoding="utf-8")
    convert(classifier, file, engines, ConvertOptions(bound=bound))
    form = EnginesFolder.read(engines).manifest.model.pooling
    assert form == Pooling.ATTENTION.value, f"its heads have the form {form}"
    for engines in sorted(folder.glob(f"*/{ENGINES}")):
        refused = build_targets(engines, TARGETS).refused
        for name, error in refused.items():
            click.echo(f"{engines.parent.name}: {name} was not built here: {error}")


def add_case(case: Path, engines: Path) -> None:
    """Let a case be an engines folder that exists."""
    case.mkdir()
    (case / ENGINES).symlink_to(engines)


def make_packed(case: Path) -> None:
    """The packed file of an engines folder, and what it answers here to single texts."""
    from fpabee.exporter.single_file import pack
    from fpabee.exporter.targets.check import FP32_TARGET

    pack(case / ENGINES, case / PACKED, FP32_TARGET)
    texts, _ = read_reference(EnginesFolder.read(case / ENGINES))
    logits, exits = alone(PackedFile(case, "onnxruntime"), texts)
    np.savez(case / ANSWERS, logits=logits, exits=exits)


class PackedFile:
    """A packed file in a library, which knows nothing of fpabee.

    Args:
        case: holds the packed file, and its engines folder, which tokenizes the texts.
        library: `onnxruntime` or `openvino`.
    """

    def __init__(self, case: Path, library: str) -> None:
        engines = EnginesFolder.read(case / ENGINES)
        self._encoder = TextEncoder(engines.path, engines.manifest.tokenizer)
        self._padding = padding_values(engines.manifest.tokenizer)
        file = case / PACKED / "model.onnx"
        self._run: Callable[[dict[str, NDArray[Any]]], Answers]
        if library == "onnxruntime":
            import onnxruntime

            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            self._names = [each.name for each in session.get_inputs()]
            self._run = lambda inputs: tuple(session.run(["logits", "exit"], inputs))
        else:
            import openvino

            # By default, OpenVINO computes in fp16 on ARM, and in bf16 on some x86.
            settings = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = openvino.Core().compile_model(file, "CPU", settings)
            self._names = [each.get_any_name() for each in compiled.inputs]
            self._run = lambda inputs: (compiled(inputs)["logits"], compiled(inputs)["exit"])

    def __call__(self, texts: Sequence[Text]) -> Answers:
        """Answer texts in one batch."""
        arrays = padded_inputs(self._encoder.encode(texts), self._padding)
        arrays["attention_mask"] = (arrays[ATTENTION_BIAS][:, 0, 0] == 0).astype(np.int64)
        return self._run({name: arrays[name] for name in self._names})


def alone(packed: PackedFile, texts: Sequence[Text]) -> Answers:
    """The answers of a packed file to texts, each of which runs alone."""
    answers = [packed([text]) for text in texts]
    logits = np.concatenate([logits for logits, _ in answers])
    exits = np.concatenate([exits for _, exits in answers])
    return logits, exits


class Failed(Exception):  # noqa: N818
    """A check failed; the message says what was measured."""


def at_most(value: float, limit: float) -> str:
    """The figure of a check: a value, and what is allowed."""
    figure = f"{value:.1e} (at most {limit:.0e})"
    if not value <= limit:  # as NaN is not, either
        raise Failed(figure)
    return figure


def equal(same: Mask, tied: Mask, what: str) -> str:
    """The figure of a check: how many rows `[rows]` are the same, near ties left out."""
    compared = int((~tied).sum())
    figure = f"{int((same & ~tied).sum())} of {compared} {what} are the same"
    if not same[~tied].all() or not compared:
        raise Failed(figure)
    return figure


@dataclass
class Report:
    """Prints one line for each check.

    Attributes:
        processor: what runs the checks.
        library: what is checked: a target, or a library.
        case: the name of the model that is checked.
        failures: the lines of the checks that failed.
    """

    processor: str
    library: str = ""
    case: str = ""
    failures: list[str] = field(default_factory=list)

    def line(self, what: str, verdict: str, figure: str) -> str:
        """Print a line of the table."""
        line = f"{self.processor:<11} {self.library:<17} {self.case:<12} {what:<28}"
        line += f" {verdict:<7} {figure}"
        click.echo(line)
        return line

    @contextmanager
    def check(self, what: str) -> Iterator[list[str]]:
        """A check, which passes if nothing is raised in it; it appends its figure to the list."""
        figure: list[str] = []
        try:
            yield figure
        except Exception as error:  # noqa: BLE001 - the other checks run on
            said = error.message if isinstance(error, FpabeeError) else str(error)
            name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
            self.failures.append(self.line(what, "FAILED", name + said))
        else:
            self.line(what, "passed", " ".join(figure))


@dataclass
class Expected:
    """The answers that an engines folder has to give to its reference texts.

    Attributes:
        engines: the folder.
        texts: the texts.
        logits: `[exits, rows, labels]` of the PyTorch model.
    """

    engines: EnginesFolder
    texts: list[Text]
    logits: Logits

    @classmethod
    def read(cls, folder: Path) -> Expected:
        """Read the reference of an engines folder."""
        engines = EnginesFolder.read(folder)
        texts, logits = read_reference(engines)
        return cls(engines, texts, logits)

    def exits(self, rule: ExitRule) -> Integers:
        """The exits `[rows]` of a rule."""
        manifest = self.engines.manifest
        return task_of(manifest.task).simulate(self.logits, rule, manifest.exits[0]).exits

    def labels(self, rule: ExitRule) -> NDArray[Any]:
        """The labels of a rule: `[rows]`, or with many labels `[rows, labels]`."""
        manifest = self.engines.manifest
        rows = np.arange(len(self.texts))
        at_exit = self.logits[self.exits(rule) - manifest.exits[0], rows]
        return task_of(manifest.task).outputs(at_exit).answers

    def near_ties(self, rule: ExitRule) -> Mask:
        """The rows `[rows]` whose answer or exit may be another one where numbers are rounded."""
        manifest = self.engines.manifest
        task = task_of(manifest.task)
        moved = EXPORT_LIMIT * logit_sizes(self.logits)
        unsure = exits_near_ties(self.logits, rule, task, moved, manifest.exits[0])
        return unsure | task.near_ties(self.logits, moved).any(axis=0)


def check_target(report: Report, folder: Path, target: str) -> None:
    """Check a target of an engines folder: its logits, and for classifiers the answers."""
    expected = Expected.read(folder)
    texts = expected.texts
    manifest = expected.engines.manifest
    required = requirements_of(target, manifest)
    is_fp32 = manifest.targets[target].precision == "fp32"
    engine: Engine | None = None
    with report.check("Engine.load") as figure:
        try:
            engine = Engine.load(folder, target, threads=1)
        except CheckError as error:
            if not report.case.startswith(OLD):
                raise
            figure.append(f"refused: {error.message}")
    if engine is None:
        return
    with engine:
        with report.check("Engine.check") as figure:
            agreement = engine.check()
            figure.append(at_most(agreement.max_logit_difference, required.logits))
        single = np.concatenate([engine.trace([text]).logits for text in texts], axis=1)
        with report.check("single texts as on x86") as figure:
            worst = logit_differences(single, expected.logits).max()
            figure.append(at_most(worst, required.logits))
        with report.check("padded batch as single texts") as figure:
            limit = BATCH_LIMIT if target.startswith("onnxruntime") else EXPORT_LIMIT
            worst = logit_differences(engine.trace(texts).logits, single).max()
            figure.append(at_most(worst, limit if is_fp32 else required.logits))
        if manifest.task.ranks:
            return
        if not is_fp32:  # which may decide otherwise than the model, but not otherwise in a batch
            expected = replace(expected, logits=single)
        tied = expected.near_ties(engine.rule)
        exits = expected.exits(engine.rule)
        with report.check("predict as on x86") as figure:
            answers = engine.predict(texts)
            own = np.array([answer.exit for answer in answers])
            figure.append(equal(own == exits, tied, "exits"))
            every = [[label in answer.labels for label in engine.labels] for answer in answers]
            labels = expected.labels(engine.rule)
            if labels.ndim == 1:
                labels = np.eye(len(engine.labels), dtype=bool)[labels]
            figure.append(equal((np.array(every) == labels).all(axis=1), tied, "answers"))
    with report.check("fpabee-run as on x86") as figure:
        own = np.array([record["exit"] for record in run_command(folder, target, texts)])
        figure.append(equal(own == exits, tied, "exits"))


def run_command(folder: Path, target: str, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """The records that `fpabee-run` writes for texts."""
    # In this process, because under emulation no program starts another one without binfmt_misc.
    from fpabee.commands.run import main as command

    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    rows = [{"text": text, "text_pair": pair} for text, pair in pairs]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "texts.jsonl")
        output = Path(place, "answers.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        options = ["--output", str(output), "--target", target, "--threads", "1", "--quiet"]
        result = CliRunner().invoke(command, [str(folder), str(file), *options])
        if result.exit_code:
            raise Failed(f"exit code {result.exit_code}: {result.output.strip()}")
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def check_packed(report: Report, case: Path, library: str) -> None:
    """Check the packed file of an engines folder in a library, without the runtime of fpabee."""
    expected = Expected.read(case / ENGINES)
    manifest = expected.engines.manifest
    _, rule = rule_of(manifest, "onnxruntime-fp32", None)
    tied = expected.near_ties(rule)
    with np.load(case / ANSWERS) as file:
        answers = dict(file)
    packed: PackedFile | None = None
    with report.check("packed file loads"):
        packed = PackedFile(case, library)
    if packed is None:
        return
    runs: dict[str, Callable[[Sequence[Text]], Answers]] = {
        "single texts": partial(alone, packed),
        "a padded batch": packed,
    }
    for what, run in runs.items():
        with report.check(f"packed, {what}") as figure:
            logits, exits = run(expected.texts)
            figure.append(equal(exits == answers["exits"], tied, "exits"))
            same = ~tied
            worst = logit_differences(logits[same], answers["logits"][same]).max()
            figure.append(at_most(worst, EXPORT_LIMIT))


@click.group()
def main() -> None:
    """Check the runtime on another processor than the one where folders were made."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, resolve_path=True))
@click.argument("others", nargs=-1, type=click.Path(exists=True, path_type=Path, resolve_path=True))
def make(folder: Path, others: tuple[Path, ...]) -> None:
    """Write what is checked into FOLDER; OTHERS are more engines folders to check."""
    click.echo("making tiny models with every form of head")
    make_models(folder)
    for number, engines in enumerate(others, start=1):
        add_case(folder / f"other-{number}", engines)
    for engines in sorted(folder.glob(f"*/{ENGINES}")):
        if not EnginesFolder.read(engines).manifest.task.ranks:
            click.echo(f"packing {engines.parent.name}")
            make_packed(engines.parent)
    for name in ("engines", "reranker"):
        add_case(folder / f"{OLD}{name}", ROOT / "tests" / "golden" / "1.0" / name)


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--processor", default="this", help="What the processor is called in the table.")
def check(folder: Path, processor: str) -> None:
    """Check what `make` wrote into FOLDER."""
    report = Report(processor)
    report.line("import fpabee.runtime", "passed", "")
    for name, value in environment().items():
        click.echo(f"{processor:<11} {name}: {value}")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        for engines in sorted(folder.glob(f"*/{ENGINES}")):
            report.case = engines.parent.name
            manifest = EnginesFolder.read(engines).manifest
            for target in manifest.targets:
                report.library = target
                problem = why_not(manifest, target)
                if problem is not None:
                    report.line("target", "skipped", problem.message)
                    continue
                check_target(report, engines, target)
            for library in ("onnxruntime", "openvino"):
                if (engines.parent / PACKED).is_dir():
                    report.library = library
                    check_packed(report, engines.parent, library)
    report.library = report.case = ""
    with report.check("no warning in fpabee"):
        places = [(Path(each.filename), each) for each in raised]
        package = Path(fpabee.runtime.__file__).parents[1]
        said = {
            f"{path.name}:{each.lineno}: {each.message}"
            for path, each in places
            if path.is_relative_to(package)
        }
        if said:
            raise Failed("; ".join(sorted(said)))
    if report.failures:
        click.echo("")
        click.echo("\n".join(["failed:", *report.failures]))
        sys.exit(1)


if __name__ == "__main__":
    main()
