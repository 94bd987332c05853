"""Convert: run the classifier, train exits on its predictions, export, certify, publish.

Everything is made in a folder beside the output, OUTPUT.partial. It stays if the conversion is
interrupted or the disk is full, and the same call goes on from the steps that are complete.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ... import __version__
from ...calibration.calibrate import calibrate
from ...calibration.goals import Bound, CalibrationOptions
from ...calibration.guarantee import check_possible, needs_in_words, rows_needed
from ...calibration.progress import Progress, silent
from ...calibration.result import Calibration, Report
from ...calibration.scoring import AGREEMENT, Scorer, same_answers
from ...calibration.settings import exits_of
from ...runtime.artifact.folder import EnginesFolder, sha256_of
from ...runtime.artifact.manifest import ProblemType, Task
from ...runtime.backends.onnxruntime import check_installed
from ...runtime.encoding import EncodedRow, Text
from ...runtime.errors import InputError, RowError
from ...runtime.files import read_rows
from ...runtime.files.rows import data_sha256, encode_labels
from ...runtime.predictions import decision_thresholds
from ...runtime.quality import Labels
from ...runtime.rules.measures import Integers, Mask, Outputs
from ...runtime.rules.rules import Budget
from ...runtime.targets import runnable_targets
from ..checkpoint import save_checkpoint
from ..exit_0_files import save_exit_0
from ..model import MultiExitModel
from ..paths import check_output
from ..pipeline import ExportOptions, export
from ..staging import staging, system_errors
from ..targets.build import build_targets
from ..targets.builders import INT8_TARGETS, OPENVINO_TARGETS, buildable
from ..targets.check import FP32_TARGET
from ..tokenizer import load_tokenizer, pad_id, row_limit
from ..training.bag_of_ngrams import learn
from ..training.examples import Examples, encoded_rows
from ..training.trainer import probabilities
from .classifier import Classifier
from .heads import choose_form, store, train_heads
from .options import Chosen, Conversion, ConvertOptions
from .places import check_places, unfinished
from .states import States, run_classifier
from .texts import Texts, split

logger = logging.getLogger(__name__)

_SEED = 42
# The summary recommends more texts if fewer than so many times the least certify.
_FEW = 2
# Above this accuracy, the classifier has probably been trained on these texts.
_TOO_GOOD = 0.98


def convert(
    classifier: str | Path,
    texts: str | Path,
    output: str | Path = "engines",
    options: ConvertOptions | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Turn a classifier and texts without labels into an engines folder with a guarantee.

    Half of the distinct texts train exits and exit 0 on the predictions of the classifier, 40 %
    certify, and 10 % are reported on; with `train_texts`, 90 % certify. The weights stay, so full
    depth gives the logits of the classifier.

    Args:
        classifier: a folder or hub id of an `AutoModelForSequenceClassification`.
        texts: a file in any format of `runtime.read_rows`: texts like those to classify, which the
            classifier was not trained on. If there are labels, accuracy is reported as well.
        output: the engines folder to write.
        options: default: at most 1 % of the decisions change, with 95 % confidence.
        progress: called with (what, done, total).

    Raises:
        ModelError: the classifier or the adapter cannot be used.
        InputError: the texts or train texts are too few or too similar, or a promise cannot be
            kept.
        RowError: a row cannot be read.
        ArtifactError: the output folder exists, or cannot be written.
        MissingExtraError: a package that is needed is not installed.
        CheckError: the export differs too much from the model.

    Example:
        ```python
        from fpabee.calibration import Bound
        from fpabee.exporter.convert import ConvertOptions, convert

        options = ConvertOptions(bound=Bound(changed_answers=0.01))
        result = convert("my-classifier", "texts.jsonl", "engines/", options)
        for target in result.targets:
            point = target.points[0]
            print(target.target, point.certificate, point.held_out.mean_depth)
        ```
    """
    started = time.perf_counter()
    options = options or ConvertOptions()
    target = check_places(classifier, texts, output, options)
    check_installed()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    others = (
        None if options.train_texts is None else read_rows(options.train_texts, options.reading)
    )
    given = split(read_rows(texts, options.reading), options.group_column, others)
    too_few = _too_few(given, options.bound)
    certify = f"{len(given.calibrate):,} of {len(given.own):,} distinct texts certify"
    for line in (certify, *needs_in_words(options.bound, has_exit_0=True)):
        logger.warning(line)
    teacher = Classifier(classifier, options.problem_type, options.adapter)
    work = _Work(teacher, given, options, progress)
    with unfinished(target, work.fingerprint) as folder:
        conversion = work.run(folder)
        for left in folder.glob("engines/.manifest-*"):  # by a process that was killed
            left.unlink()
        with staging(target) as new:
            # Again, because it may have appeared meanwhile.
            inputs = (teacher.folder, texts, options.train_texts, options.adapter)
            check_output(target, options.force, inputs)
            new.rmdir()
            (folder / "engines").replace(new)
    return replace(
        conversion,
        folder=Path(output),
        warnings=(*conversion.warnings, *too_few),
        seconds=round(time.perf_counter() - started, 1),
    )


def _too_few(texts: Texts, bound: Bound) -> list[str]:
    """What to say of the number of texts, if few certify.

    Raises:
        InputError: too few certify, even if no decision changes.
    """
    level = (1 - bound.confidence) / 2  # with exit 0, two lists are tested
    least = max(rows_needed(share, 1 - bound.confidence)[0] for share in bound.shares.values())
    good = max(rows_needed(share, level)[1] for share in bound.shares.values())
    certify = len(texts.calibrate)
    texts_for_one = len(texts.own) / certify
    many = 100 * math.ceil(good * texts_for_one / 100)
    if certify < least:
        raise InputError(
            f"{certify:,} of {len(texts.own):,} distinct texts certify, and {least:,} are the "
            f"least; about {100 * math.ceil(least * texts_for_one / 100):,} distinct texts are "
            f"needed, and {many:,} give a good chance",
            "give more texts, or allow more",
        )
    if certify < _FEW * least:
        return [f"few texts certify; {many:,} distinct texts would probably save more layers"]
    return []


class _Work:
    """The steps of a conversion.

    Args:
        teacher: the classifier.
        texts: the texts and their parts.
        options: the settings.
        progress: called with (what, done, total).

    Raises:
        ModelError: the head of the classifier is not the usual one of its family, or its tokenizer
            cannot be used.
    """

    def __init__(
        self, teacher: Classifier, texts: Texts, options: ConvertOptions, progress: Progress
    ) -> None:
        self.teacher = teacher
        self.texts = texts
        self.options = options
        self.progress = progress
        self.task = Task(problem_type=teacher.problem_type, labels=teacher.labels)
        thresholds = decision_thresholds(self.task, options.bound.thresholds)
        if self.task.problem_type is ProblemType.MULTI_LABEL:
            # What is promised about labels is said of those that the folder predicts.
            self.task = msgspec.structs.replace(self.task, label_thresholds=thresholds)
        self.plain = teacher.multi_exit(teacher.exit_config(()))
        self.tokenizer = load_tokenizer(teacher.folder, self.plain)
        self.max_length = row_limit(teacher.folder, self.tokenizer, self.plain, options.max_length)
        self.padding = {"input_ids": pad_id(self.tokenizer, self.plain)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            self.padding["token_type_ids"] = self.tokenizer.pad_token_type_id

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result."""
        settings = replace(self.options, train_texts=None, force=False, threads=None)
        folders = (self.teacher.folder, self.options.adapter)
        files = [path for folder in folders if folder for path in sorted(folder.iterdir())]
        content = [
            __version__,
            msgspec.to_builtins(settings, enc_hook=str),
            data_sha256(self.texts.rows, labels=False),
            [part.tolist() for part in (self.texts.taught, self.texts.calibrate)],
            [sha256_of(path) for path in files if path.is_file()],
        ]
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()

    def run(self, folder: Path) -> Conversion:
        """Do all that is not done yet, and leave the engines folder in `engines`."""
        texts = self.texts
        bound = self.options.bound
        rows = encoded_rows(texts.rows, self.tokenizer, self.max_length)
        logits, states = run_classifier(
            self.teacher, rows, self.padding, texts.taught, folder, self.progress
        )
        check_possible(bound, self.task, logits[texts.calibrate])
        model_dir = folder / "model"
        engines = folder / "engines"
        for left in (model_dir, engines):  # by a run that was stopped
            if left.is_dir():
                shutil.rmtree(left)
        chosen = self._train(model_dir, rows, logits, states)
        wanted = ExportOptions(max_length=self.max_length)
        export(model_dir, engines, wanted, self.progress)
        refusals = self._add_targets(engines)
        conversion = self._certify(engines, logits, chosen)
        if removed := texts.removed:
            refusals.append(f"{removed:,} train texts were left out: they are among the others")
        return replace(conversion, warnings=(*refusals, *conversion.warnings))

    def _train(
        self,
        model_dir: Path,
        rows: Sequence[EncodedRow],
        logits: NDArray[np.float32],
        states: States,
    ) -> Chosen:
        """Train the exits and exit 0, and write the model."""
        texts = self.texts
        targets = probabilities(torch.from_numpy(logits), self.task.problem_type).numpy()
        train, choose = (
            Examples([rows[n] for n in numbers], targets[numbers])
            for numbers in (texts.train, texts.choose)
        )
        model, chosen = self._model(states, logits[states.rows])
        exit_0 = learn(train, choose, self.plain, _SEED, self.progress)
        save_checkpoint(model, model_dir)
        with system_errors(model_dir):
            self.tokenizer.save_pretrained(model_dir)
        save_exit_0(model_dir, exit_0)
        return chosen

    def _model(self, states: States, logits: NDArray[np.float32]) -> tuple[MultiExitModel, Chosen]:
        """The weights of the classifier, and heads of the form that suits the texts."""
        teacher = self.teacher
        count = int(np.isin(states.rows, self.texts.train).sum())
        thresholds = decision_thresholds(self.task, self.options.bound.thresholds)
        share = min(self.options.bound.shares.values())
        chosen = choose_form(teacher, states, logits, count, share, thresholds, self.progress)
        form = chosen.form
        config = teacher.exit_config(form.exits(teacher.layers), form.pooling)
        hidden = len(config.exits) - 1 if form.width else 0
        config = replace(
            config,
            hidden_layers=hidden,
            hidden_width=form.width,
            queries=form.queries,
            label_thresholds=self.task.label_thresholds,
        )
        model = teacher.multi_exit(config)
        self.progress("train heads", 0, 1)
        heads = train_heads(form, teacher, states, logits, len(states))
        store(heads, form, model)
        return model, chosen

    def _add_targets(self, engines: Path) -> list[str]:
        """Complete the engines folder, whose texts run to full depth where there is no point.

        Returns:
            Why targets were not built.
        """
        folder = EnginesFolder.read(engines)
        full_depth = Budget(exit=folder.manifest.exits[-1])
        changed = folder.with_manifest(
            default_rule=full_depth.to_dict(), base_model=self.teacher.base_model
        )
        changed.write()
        names = buildable(OPENVINO_TARGETS)
        texts: list[Text] = []
        if self.options.all_targets and util.find_spec("nncf") is not None:
            names += buildable(INT8_TARGETS)
            # Ranges come from texts that do not certify.
            texts = [self.texts.rows[number].content for number in self.texts.taught]
        result = build_targets(engines, names, texts, progress=self.progress)
        return [f"{name} was not built: {error}" for name, error in result.refused.items()]

    def _certify(self, engines: Path, logits: NDArray[np.float32], chosen: Chosen) -> Conversion:
        """Certify the targets; the default is the fastest at full depth, if it has a point."""
        texts = self.texts
        bound = self.options.bound
        folder = EnginesFolder.read(engines)
        fastest = folder.manifest.default_target
        others = runnable_targets(folder) if self.options.all_targets else [fastest]
        certifying = [texts.rows[number] for number in texts.calibrate]
        reported = [texts.rows[number] for number in texts.report]
        report = Report(reported, "texts that decided nothing", logits[texts.report])
        targets = []
        for name in dict.fromkeys([FP32_TARGET, *others]):
            options = CalibrationOptions(
                goals={bound.point: bound},
                metric=AGREEMENT,
                target=name,
                threads=self.options.threads,
            )
            targets.append(
                calibrate(
                    engines,
                    certifying,
                    options,
                    self.progress,
                    reference=logits[texts.calibrate],
                    report=report,
                )
            )
        by_name = {each.target: each for each in targets}
        if by_name[fastest].points[0].certificate is None:
            fastest = FP32_TARGET
        EnginesFolder.read(engines).with_manifest(default_target=fastest).write()
        warnings: list[str] = []
        changed, answers = _decided(by_name[fastest])
        return Conversion(
            folder=engines,
            default_target=fastest,
            targets=tuple(targets),
            exit_layers=folder.manifest.exit_layers,
            chosen=chosen,
            rows=int(texts.weights.sum()),
            texts=len(texts.own),
            train_texts=len(texts.rows) - len(texts.own),
            parts=texts.sizes,
            traffic=float(np.average(changed, weights=texts.weights[texts.report])),
            accuracy=self._accuracy(logits, answers, warnings),
            warnings=tuple(warnings),
            seconds=0.0,
        )

    def _accuracy(
        self, logits: NDArray[np.float32], answers: Integers, warnings: list[str]
    ) -> tuple[float, float] | None:
        """The accuracy of the classifier and of a target on the texts of the report.

        Args:
            logits: `[rows, labels]` of the classifier, for all texts and train texts.
            answers: of the target, for the texts of the report, see `encode_labels`.
            warnings: where to add what makes the result less useful.
        """
        expected = self._labels(warnings)
        if expected is None:
            return None
        problem_type = self.task.problem_type
        own = logits[: len(self.texts.own)]
        of_classifier = Outputs(own, problem_type, self.task.label_thresholds).answers
        right = same_answers(of_classifier, expected, problem_type)
        if right.mean() > _TOO_GOOD:
            warnings.append(
                f"the classifier is right on {right.mean():.1%} of these texts: if it was "
                "trained on them, the guarantee does not hold for new texts"
            )
        report = self.texts.report
        converted = same_answers(answers, expected[report], problem_type)
        return float(right[report].mean()), float(converted.mean())

    def _labels(self, warnings: list[str]) -> Labels | None:
        """The labels of all texts; None if some have none, or one that the classifier lacks."""
        rows = self.texts.own
        given = [row.labels for row in rows if row.labels is not None]
        if len(given) < len(rows):
            if given:
                known = f"{len(given):,} of {len(rows):,}"
                warnings.append(f"accuracy is not known: only {known} texts have a label")
            return None
        try:
            places = [row.where for row in rows]
            return encode_labels(given, self.task.labels, self.task.problem_type, places)
        except RowError as error:
            warnings.append(f"accuracy is not known: {error.message}")
            return None


def _decided(result: Calibration) -> tuple[Mask, Integers]:
    """For the texts of the report: whether the decision changed, and the answers."""
    assert result.test is not None
    scorer = Scorer(result.test, AGREEMENT)
    at = result.test.at(exits_of(result.points[0].rule, result.test))
    return scorer.changed[at], scorer.answers[at]
