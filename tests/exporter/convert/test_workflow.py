"""Conversions of tiny classifiers: what they write, certify, continue and refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fpabee.calibration import Bound, calibrate
from fpabee.calibration.exact import useful_rows
from fpabee.calibration.scoring import Scorer
from fpabee.exporter.convert import (
    Conversion,
    ConvertOptions,
    classification,
    convert,
    workflow,
)
from fpabee.exporter.convert.classification import Classification
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.convert.heads import PASSES
from fpabee.exporter.convert.task import Passes
from fpabee.exporter.convert.texts import split
from fpabee.exporter.model import predict
from fpabee.exporter.staging import staging
from fpabee.exporter.targets import BuildResult
from fpabee.exporter.targets.builders import INT8_TARGETS, OPENVINO_TARGETS
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.exporter.tokenizer import load_tokenizer
from fpabee.exporter.training.examples import Examples, encoded_rows
from fpabee.exporter.training.trainer import probabilities
from fpabee.runtime import Budget, Engine, ExitRule
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.artifact.quick import quick_of
from fpabee.runtime.artifact.trained_on import have_trained
from fpabee.runtime.encoding import Text
from fpabee.runtime.errors import (
    ArtifactError,
    BackendError,
    CheckError,
    FpabeeError,
    InputError,
    MissingExtraError,
)
from fpabee.runtime.files import Row, read_rows

from ...closeness import assert_exported
from ...programs import spy, write_lines
from .conftest import INT8, MULTI, OPTIONS, SINGLE, TEXTS, Converted

Convert = Callable[..., Conversion]


def test_what_certifies_has_neither_trained_nor_chosen(
    converted: Converted, telling: Mapping[str, Path]
) -> None:
    calls = converted.calls
    (train, choose, calibrate, report) = converted.result.parts
    assert train + choose + calibrate + report == converted.result.texts == len(TEXTS)
    certified = calls["calibrate"].args[1]
    others = [*certified, *calls["calibrate"].kwargs["report"].rows]
    contents = [row.content for row in others]
    assert len(set(contents)) == len(contents) == calibrate + report
    model = calls["learn"].args[2]
    tokenizer = load_tokenizer(telling[SINGLE.value], model)
    untaught = encoded_rows(others, tokenizer, 64)
    # The folder knows it, so that no later calibration certifies on texts that trained.
    engines = EnginesFolder.read(converted.result.folder)
    assert not have_trained(engines, contents).any()
    assert have_trained(engines, TEXTS).sum() == train + choose
    both: tuple[Examples, ...] = calls["learn"].args[:2]
    # The texts that train, and altered copies of them, of which none is among the others.
    learnt = len(both[0].rows)
    assert len(both[1].rows) == choose
    assert 2 * train < learnt < 3 * train
    rows = [row for part in both for row in part.rows]
    assert {tuple(row.input_ids) for row in rows}.isdisjoint(tuple(r.input_ids) for r in untaught)
    # The heads see the same rows: the logits of the classifier for them.
    logits = predict(model, rows, {"input_ids": 0}, lambda output: output[-1])
    expected = probabilities(torch.from_numpy(logits), SINGLE)
    for name, first in (("choose_exits", 1), ("train_heads", 2)):
        states, lesson = calls[name].args[first : first + 2]
        assert_exported(lesson.targets, expected)
        assert len(states) == learnt + choose
        assert lesson.passes == pytest.approx(PASSES * (train + choose) / (learnt + choose))
    assert calls["choose_exits"].args[3] == learnt
    assert calls["train_heads"].args[4] == learnt + choose


def test_the_result_is_what_the_engine_does(converted: Converted) -> None:
    result = converted.result
    (*_, calibrate, report) = converted.result.parts
    (target,) = result.targets
    reported = converted.calls["calibrate"].kwargs["report"]
    (point,) = target.points
    assert [path.name for path in converted.folder.parent.iterdir()] == ["engines"]
    assert result.rows == len(TEXTS) + len(TEXTS[::5])
    assert target.target == result.default_target == "onnxruntime-fp32"
    assert target.folder == result.folder == converted.folder
    assert point.certificate is not None
    (promise,) = point.certificate.promises
    assert promise.rows == useful_rows(calibrate, 0.1, 0.05)
    assert target.full_depth_score == 1
    assert read_manifest(converted.folder).base_model == "owner/name"
    assert point.held_out.mean_depth < 3
    texts = [row.content for row in reported.rows]
    answers = reported.reference.argmax(axis=1)
    with Engine.load(converted.folder) as engine:
        assert engine.operating_point == point.name == "changed-10"
        stored = engine.manifest.targets[engine.target].operating_points["changed-10"]
        found = engine.trace(texts, rule=engine.rule)
        counts = np.bincount(found.exits, minlength=len(engine.manifest.exits))
        assert counts.tolist() == [*point.held_out.exits]
        changed = found.predictions != answers
        full = engine.trace(texts).logits[-1]
    assert len(texts) == report
    assert changed.sum() == point.held_out.changed_answers
    counted = {**dict.fromkeys(TEXTS, 1), **dict.fromkeys(TEXTS[::5], 2)}
    traffic = np.average(changed, weights=[counted[str(text)] for text in texts])
    assert traffic == pytest.approx(result.traffic)
    assert_exported(full, reported.reference)
    assert (result.exit_layers[0], result.exit_layers[-1]) == (0, 3)
    assert stored.hardware.endswith(" threads")
    assert result.accuracy is not None
    assert np.mean(answers == 2) == pytest.approx(result.accuracy[0])
    assert np.mean(found.predictions == 2) == pytest.approx(result.accuracy[1])


def test_a_target_that_changes_decisions_by_rounding_gets_no_point(
    converted: Converted, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(converted.folder, folder)
    manifest = read_manifest(folder)
    bare = msgspec.structs.replace(
        manifest.targets[FP32_TARGET], operating_points={}, default_operating_point=""
    )
    EnginesFolder(folder, manifest).with_target(FP32_TARGET, bare).write()
    _, rows, options, progress = converted.calls["calibrate"].args
    named = converted.calls["calibrate"].kwargs
    other = named["reference"].copy()
    other[::3] = np.roll(other[::3], 1, axis=-1)
    result = calibrate(folder, rows, options, progress, **named | {"reference": other})
    (point,) = result.points
    assert point.certificate is None
    assert result.full_depth_score == pytest.approx(2 / 3, abs=0.01)
    assert point.refusal.startswith("full depth has ")
    assert point.rule == Budget(exit=result.rows.exits[-1])
    manifest = read_manifest(folder)
    assert manifest.targets[FP32_TARGET].operating_points == {}
    assert ExitRule.from_dict(manifest.default_rule) == point.rule


def test_an_interrupted_conversion_continues_and_replaces_a_folder(
    converted: Converted,
    telling: Mapping[str, Path],
    texts: Path,
    convert_here: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "engines"
    unknown = tmp_path / "texts.jsonl"
    shutil.copytree(converted.folder, folder)
    unknown.write_text(texts.read_text().replace("yes", "maybe"))
    bound = Bound(changed_answers=0.2, missed=0.3, thresholds={"yes": 0.7})
    given = {"file": unknown, "model": telling[MULTI.value]}
    options = ConvertOptions(bound, force=True)
    seen: list[str] = []

    def until(stop: str, error: BaseException) -> Any:
        def progress(what: str, *_: int) -> None:
            seen.append(what)
            if what.startswith(stop):
                raise error

        return progress

    (tmp_path / "engines.partial").mkdir()  # as a kill leaves it at the beginning
    broken = BackendError("the device failed", "restart it")
    defect = ZeroDivisionError()
    times = f"{FP32_TARGET}: choose"
    for stop, error in (("segment", KeyboardInterrupt()), ("segment", defect), (times, broken)):
        with pytest.raises(type(error)) as caught:
            convert_here(options, until(stop, error), **given)
        (steps,) = (tmp_path / "engines.partial").iterdir()
        assert len([*steps.glob("logits-*.npy")]) == 1
        if isinstance(error, KeyboardInterrupt):
            assert "engines.partial keeps the finished steps" in str(caught.value)
    assert seen.count("segment_01") == 3
    del seen[:]
    monkeypatch.setattr(Scorer, "lost_label", lambda *_: "'yes' is lost")
    result = convert_here(replace(options, threads=1), until("nothing", broken), **given)
    assert "run the classifier" not in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "texts.jsonl"]
    (target,) = result.targets
    (point,) = target.points
    assert point.name == "changed-20-missed-30"
    assert point.certificate is not None
    assert point.certificate.label_thresholds == {"yes": 0.7}
    changed_answers, missed = point.certificate.promises
    assert result.parts[2] - 5 < changed_answers.rows <= result.parts[2]
    assert missed.label == "yes"
    assert 0 < missed.rows < changed_answers.rows
    assert result.accuracy is None
    assert "has label 'maybe'" in result.warnings[0]
    assert "'yes' is lost; a promise" in target.warnings[0]
    with Engine.load(folder) as engine:
        assert engine.operating_point == point.name
        assert engine.label_thresholds == {"no": 0.5, "perhaps": 0.5, "yes": 0.7}
        # What counts as a decision is what the folder predicts.
        rows = engine.predict(TEXTS[:200])
        above = [tuple(np.greater(each.probabilities, (0.5, 0.5, 0.7))) for each in rows]
        assert above == [tuple(name in each.labels for name in engine.labels) for each in rows]
        assert any(0.5 < each.probabilities[2] <= 0.7 for each in rows)


def test_exits_learn_from_train_texts_and_the_others_certify(
    telling: Mapping[str, Path],
    convert_here: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts, others = TEXTS[:400], TEXTS[380:]
    files = [
        write_lines(tmp_path / name, [{"text": text, "label": "yes"} for text in some])
        for name, some in (("texts.jsonl", texts), ("others.jsonl", others))
    ]
    learn = spy(monkeypatch, classification, "learn")
    result = convert_here(replace(OPTIONS, train_texts=files[1]), file=files[0])
    taught: tuple[Examples, ...] = learn.call_args.args[:2]
    train, choose, calibrate, report = result.parts
    assert len(taught[1].rows) == choose
    assert train + choose == result.train_texts == len(TEXTS) - 400
    assert calibrate + report == result.texts == result.rows == 400
    assert calibrate > 330
    assert "20 train texts were left out" in " ".join(result.warnings)
    tokenizer = AutoTokenizer.from_pretrained(telling[SINGLE.value])
    new = encoded_rows([Row(text) for text in TEXTS[400:]], tokenizer, 64)
    expected = {tuple(row.input_ids) for row in new}
    own = [*taught[0].rows[:train], *taught[1].rows]
    assert {tuple(row.input_ids) for row in own} == expected
    assert result.accuracy is not None


def test_a_kind_that_cannot_be_converted_is_refused_before_the_model_is_loaded(
    convert_here: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "Classifier", lambda *_: 1 / 0)
    monkeypatch.delitem(workflow._TASKS, ProblemType.SINGLE_LABEL)
    with pytest.raises(InputError, match="classifiers cannot be converted"):
        convert_here()


def test_few_texts_are_said_before_the_model_is_loaded(
    convert_here: Convert, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "Classifier", lambda *_: 1 / 0)
    few = tmp_path / "few.txt"
    few.write_text("\n".join(TEXTS[:60]))
    for file in (texts, few):
        with pytest.raises(InputError, match=r"about (8|9)00 distinct texts are needed, and \d+"):
            convert_here(None, file=file)
    monkeypatch.setattr(workflow, "_FEW", 1000)
    monkeypatch.setattr(workflow, "Classifier", Classifier)
    result = convert_here()
    assert "few texts certify" in result.warnings[-1]


def stopped(what: str, *_: int) -> None:
    """Interrupt a conversion when the model is trained."""
    if what.startswith("segment"):
        raise KeyboardInterrupt


@pytest.fixture
def can_int8(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine could quantize, and run all targets."""
    monkeypatch.setattr(workflow, "require", lambda *_: None)
    monkeypatch.setattr(workflow, "check_buildable", lambda _: None)
    monkeypatch.setattr(workflow, "buildable", list)


@pytest.mark.usefixtures("can_int8")
def test_int8_takes_its_ranges_from_texts_that_train(
    convert_here: Convert, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a conversion without int8 does not continue one with it."""
    asked: list[tuple[list[str], list[Text]]] = []

    def build_targets(_: Path, names: list[str], texts: list[Text], **__: Any) -> None:
        asked.append((names, texts))
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "build_targets", build_targets)
    steps = []
    for with_int8 in (False, True):
        with pytest.raises(KeyboardInterrupt):
            convert_here(replace(OPTIONS, int8=with_int8))
        steps += [path.name for path in (tmp_path / "engines.partial").iterdir()]
    parts = split(read_rows(texts))
    taught = [parts.units[number].content for number in parts.taught]
    (plain, no_texts), (both, some) = asked
    assert plain == [*OPENVINO_TARGETS]
    assert no_texts == []
    assert both == [*OPENVINO_TARGETS, *INT8_TARGETS]
    assert sorted(some, key=str) == sorted(taught, key=str)
    assert some != taught, "a file may be sorted, and the first texts set the ranges"
    assert len(set(steps)) == 2


@pytest.mark.usefixtures("can_int8")
def test_what_is_refused_is_said_once(
    convert_here: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_targets(folder: Path, names: Sequence[str], *_: object, **__: object) -> BuildResult:
        error = CheckError("int8 changes answers", "give more texts")
        return BuildResult(read_manifest(folder), {}, dict.fromkeys(INT8_TARGETS, error))

    monkeypatch.setattr(workflow, "build_targets", build_targets)
    result = convert_here()
    names = ", ".join(INT8_TARGETS)
    assert (
        result.warnings.count(f"not built: {names}: int8 changes answers -> give more texts") == 1
    )
    assert " ".join(result.warnings).count("changes answers") == 1
    assert result.default_target == FP32_TARGET


@pytest.mark.usefixtures("with_int8")
@pytest.mark.parametrize("wins", [True, False])
def test_a_quick_pass_runs_where_it_takes_less_time(
    wins: bool, convert_here: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Classification.saved

    def saved(self: Any, uncertified: Any, ways: Sequence[Passes], progress: Any) -> list[float]:
        assert max(measure(self, uncertified, ways, progress)) < 1
        return [float(bool(way.quick) == wins) for way in ways]

    monkeypatch.setattr(Classification, "saved", saved)
    result = convert_here()
    (exact,) = result.targets
    assert exact.target == result.default_target == FP32_TARGET
    (point,) = exact.points
    assert point.certificate is not None
    assert point.certificate.confidence == 95.0, "it is one test, whatever is tried"
    target = read_manifest(tmp_path / "engines").targets[FP32_TARGET]
    assert target.default_operating_point == "changed-10"
    usual = target.operating_points["changed-10"]
    quick = quick_of(usual)
    if not wins:
        assert [*target.operating_points] == ["changed-10"]
        assert quick is None
        return
    assert [*target.operating_points] == ["changed-10-one-pass", "changed-10"]
    assert quick is not None
    assert (quick.target, quick.alone) == (INT8, "changed-10-one-pass")
    assert point.quick_target == INT8
    with Engine.load(tmp_path / "engines") as engine:
        assert engine.operating_point == "changed-10"
        first, last = engine.core.in_use.legs
        assert (first.backend.name, last.backend.name) == (INT8, FP32_TARGET)
        assert len(engine.predict(TEXTS[:40])) == 40


@pytest.mark.usefixtures("with_int8")
def test_a_conversion_says_where_one_pass_is_faster_than_the_point_in_use(
    convert_here: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(self: Any, uncertified: Any, ways: Sequence[Passes], progress: Any) -> list[float]:
        return [float(bool(way.quick)) for way in ways]

    monkeypatch.setattr(Classification, "saved", saved)
    monkeypatch.setattr(workflow, "_speed", lambda made: 1 + (not made.points[0].quick_target))
    result = convert_here()
    (said,) = [warning for warning in result.warnings if "one-pass" in warning]
    assert "changed-10-one-pass is faster on this machine; it keeps the same promise" in said
    (exact,) = result.targets
    assert exact.points[0].quick_target, "measured times choose no certificate"


NO_INT8 = "without int8, which usually makes a conversion faster: "


@pytest.mark.usefixtures("can_int8")
@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("require", MissingExtraError("int8 needs nncf", "pip install nncf"), "pip install nncf"),
        ("check_buildable", BackendError("a CPU with VNNI is needed"), "VNNI is needed"),
        ("check_enough_texts", InputError("32 texts are needed"), "32 texts are needed"),
    ],
)
def test_a_conversion_without_int8_says_why_before_the_model_is_loaded(
    name: str,
    error: FpabeeError,
    says: str,
    convert_here: Convert,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def refuse(*_: object) -> None:
        raise error

    def classifier(*arguments: Any) -> Classifier:
        assert says in caplog.text
        return Classifier(*arguments)

    def build_targets(_: Path, names: list[str], *__: object, **___: object) -> None:
        asked.append(names)
        raise KeyboardInterrupt

    # A command that ran before may have silenced it.
    caplog.set_level("WARNING", logger="fpabee.exporter")
    monkeypatch.setattr(workflow, name, refuse)
    monkeypatch.setattr(workflow, "Classifier", classifier)
    monkeypatch.setattr(workflow, "build_targets", build_targets)
    with pytest.raises(KeyboardInterrupt):
        convert_here()
    assert asked == [[*OPENVINO_TARGETS]]
    assert [line for line in caplog.messages if "int8" in line] == [f"{NO_INT8}{error}"]
    caplog.clear()
    monkeypatch.setattr(workflow, "Classifier", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_here(replace(OPTIONS, int8=False))
    assert "int8" not in caplog.text


def test_a_conversion_with_other_groups_starts_anew(convert_here: Convert, tmp_path: Path) -> None:
    """A text that has trained would certify otherwise."""
    seen: list[str] = []
    runs: list[int] = []

    def progress(what: str, *_: int) -> None:
        seen.append(what)
        stopped(what)

    file = tmp_path / "texts.jsonl"
    options = replace(OPTIONS, group_column="group")
    for groups in (300, 300, 299):
        rows = [{"text": text, "group": n % groups} for n, text in enumerate(TEXTS)]
        write_lines(file, rows)
        with pytest.raises(KeyboardInterrupt):
            convert_here(options, progress, file=file)
        runs.append(seen.count("run the classifier"))
    first, again, other = runs
    assert 0 < first == again < other


@pytest.mark.parametrize("other", [OPTIONS, ConvertOptions(Bound(changed_answers=0.2))])
def test_a_second_conversion_into_one_folder_is_refused_and_touches_nothing(
    other: ConvertOptions, convert_here: Convert, tmp_path: Path
) -> None:
    def progress(what: str, *_: int) -> None:
        if what == "segment_01":
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(ArtifactError, match=r"partial is being written by another conv"):
                convert_here(other)
            assert sorted(tmp_path.rglob("*")) == before
            refused.append(what)

    refused: list[str] = []
    convert_here(OPTIONS, progress)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_conversion_that_ends_when_its_folder_has_moved_adds_the_targets_again(
    convert_here: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def moves_and_ends(target: Path) -> Iterator[Path]:
        with staging(target) as new:
            yield new
        raise KeyboardInterrupt

    options = replace(OPTIONS, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "staging", moves_and_ends)
        with pytest.raises(KeyboardInterrupt):
            convert_here(options)
    first = read_manifest(tmp_path / "engines")
    convert_here(options)
    again = read_manifest(tmp_path / "engines")
    assert again.default_rule == first.default_rule
    assert again.default_rule["name"] == "budget"
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


BAD: dict[str, tuple[Bound, str]] = {
    "unknown label": (Bound(changed_answers=0.1, thresholds={"x": 0.5}), "no label 'x'"),
    "too few texts": (
        Bound(changed_answers=0.001),
        r"2\d\d of 6\d\d distinct texts certify, and 2,995 are the least; about 7,500",
    ),
    "too few flagged texts": (
        Bound(missed=0.02, thresholds={"yes": 0.5}),
        "missed of 'yes' needs at least 149 texts",
    ),
    "nothing is flagged": (
        Bound(changed_answers=0.1, thresholds={"yes": 1 - 1e-12}),
        "decides the same",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_promises_that_cannot_be_kept_are_refused(
    case: str, convert_here: Convert, tmp_path: Path
) -> None:
    bound, message = BAD[case]
    with pytest.raises(InputError, match=message):
        convert_here(ConvertOptions(bound))
    assert not [*tmp_path.iterdir()]


def test_what_is_in_the_way_stays(
    converted: Converted,
    convert_here: Convert,
    telling: Mapping[str, Path],
    texts: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="the drop of a metric needs labels"):
        ConvertOptions(Bound(drop=0.1))
    with pytest.raises(ArtifactError, match=r"already holds an engines folder .* `force`"):
        convert(telling[SINGLE.value], texts, converted.folder, OPTIONS)
    partial = tmp_path / "engines.partial"
    partial.mkdir()
    (partial / "conversion").write_bytes(b"\xff of somebody else")
    with pytest.raises(ArtifactError, match=r"engines\.partial is in the way: it holds conversion"):
        convert_here()
    assert [path.name for path in tmp_path.rglob("*")] == ["engines.partial", "conversion"]


def test_labels_of_some_texts_are_not_ignored_in_silence() -> None:
    texts = SimpleNamespace(own=[Row("rain", labels=("yes",)), Row("sun"), Row("book")])
    given: Any = SimpleNamespace(texts=texts, warnings=[])
    task: Any = None
    assert Classification._labels(given, task) is None
    assert given.warnings == ["accuracy is not known: only 1 of 3 texts have a label"]
    texts.own = [Row("rain"), Row("sun")]
    assert Classification._labels(given, task) is None
    assert len(given.warnings) == 1, "nobody expects an accuracy"
