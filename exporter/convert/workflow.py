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
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ... import __version__
from ...calibration.evidence import needs_in_words
from ...calibration.exact import rows_needed
from ...calibration.progress import Progress, silent
from ...calibration.result import one_pass
from ...runtime.artifact.folder import EnginesFolder, sha256_of
from ...runtime.artifact.manifest import ProblemType, Task
from ...runtime.artifact.trained_on import write_trained_on
from ...runtime.backends.onnxruntime import check_installed
from ...runtime.encoding import EncodedRow, Text
from ...runtime.errors import FpabeeError, InputError
from ...runtime.files.rows import data_sha256
from ...runtime.machine import require
from ...runtime.rules.rules import Budget
from ...runtime.targets import runnable_targets
from ...runtime.tasks import row_of, task_of
from ..checkpoint import save_checkpoint
from ..exit_0_files import save_exit_0
from ..model import MultiExitModel
from ..paths import check_output
from ..pipeline import ExportOptions, export
from ..staging import staging, system_errors
from ..targets.build import build_targets
from ..targets.builders import (
    INT8_TARGETS,
    OPENVINO_TARGETS,
    buildable,
    check_buildable,
    check_enough_texts,
)
from ..targets.check import FP32_TARGET
from ..targets.default import fastest_exact, fastest_with_exits
from ..tokenizer import load_tokenizer, pad_id, row_limit
from ..training.examples import encoded_rows, special_tokens
from ..unfinished import unfinished
from .altered import altered
from .classification import Classification
from .classifier import Classifier, named_task
from .heads import choose_exits, store, train_heads
from .options import Chosen, Conversion, ConvertOptions
from .places import STEPS, check_places
from .ranking import Ranking
from .states import States, Taught, most_tokens, run_classifier
from .task import ConversionTask, Passes, Uncertified

logger = logging.getLogger(__name__)

_TASKS: dict[ProblemType, type[ConversionTask[Any, Any]]] = {
    ProblemType.SINGLE_LABEL: Classification,
    ProblemType.MULTI_LABEL: Classification,
    ProblemType.RANKING: Ranking,
}

# The summary recommends more texts if fewer than so many times the least certify.
_FEW = 2


def convert(
    classifier: str | Path,
    texts: str | Path,
    output: str | Path = "engines",
    options: ConvertOptions | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Turn a classifier and texts without labels into an engines folder with a guarantee.

    Half of the distinct texts train exits and exit 0 on the predictions of the classifier, 40 %
    certify, and 10 % are reported on; with `train_texts`, 90 % certify. Two altered copies of
    each text that trains do so as well, up to 4,000. The weights stay, so full depth gives the
    logits of the classifier.

    A model with one label is a reranker. It needs queries with their documents instead of texts,
    gets no n-grams, and the guarantee is about the set of the best documents of a query. If all
    queries have the `scores` of a search, they are its exit 0.

    Args:
        classifier: a folder or hub id of an `AutoModelForSequenceClassification`, such as a
            `CrossEncoder`.
        texts: a file in any format of `runtime.read_rows`: texts like those to classify, which the
            classifier was not trained on. If there are labels, accuracy is reported as well. For a
            reranker, each line has `query`, `documents` and perhaps `scores`; those without
            documents are left out. Of duplicate texts or queries, the first is taken.
        output: the engines folder to write.
        options: default: at most 1 % of the decisions change, or the best 10 documents of at most
            5 % of the queries, with 95 % confidence.
        progress: called with (what, done, total).

    Raises:
        ModelError: the classifier or the adapter cannot be used.
        InputError: models of this kind cannot be converted, the texts or train texts are too few or
            too similar, a promise cannot be kept, or an option is for the other task.
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
    kind = named_task(classifier, options.problem_type)
    job = row_of(_TASKS, kind, "converted")(texts, options)
    too_few = _too_few(job)
    what = job.what
    no_int8 = _why_no_int8(job) if options.int8 else []
    of = f"{len(job.texts.own):,} distinct {what}"
    certify = f"{len(job.texts.calibrate):,} of {of} certify"
    for line in (certify, *needs_in_words(job.bound, f"{what} that certify"), *no_int8):
        logger.warning(line)
    teacher = Classifier(classifier, options.problem_type, options.adapter)
    work = _Work(teacher, job, progress, int8=options.int8 and not no_int8)
    with unfinished(target, STEPS, work.fingerprint) as folder:
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
        targets=tuple(replace(each, folder=Path(output)) for each in conversion.targets),
        warnings=(*conversion.warnings, *too_few),
        seconds=round(time.perf_counter() - started, 1),
    )


def _too_few(job: ConversionTask[Any, Any]) -> list[str]:
    """What to say of the number of texts, if few certify.

    Raises:
        InputError: too few certify, even if no decision changes.
    """
    bound = job.bound
    what = job.what
    needed = [rows_needed(share, 1 - bound.confidence) for share in bound.shares.values()]
    least = max(fewest for fewest, _ in needed)
    good = max(enough for _, enough in needed)
    certify = len(job.texts.calibrate)
    own = len(job.texts.own)

    def needed_for(certifying: int) -> int:
        """How many texts it takes; of a group only one certifies, and chance may deal fewer."""
        usual = certifying / job.texts.share_that_certifies
        is_usual = job.options.group_column is None and usual > own
        return 100 * math.ceil((usual if is_usual else certifying * own / certify) / 100)

    many = needed_for(good)
    if certify < least:
        raise InputError(
            f"{certify:,} of {own:,} distinct {what} certify, and {least:,} are the "
            f"least; about {needed_for(least):,} distinct {what} are needed, and {many:,} give a "
            "good chance",
            f"give more {what}, or a larger {' or '.join(f'`{of}`' for of in bound.shares)}",
        )
    if certify < _FEW * least:
        return [f"few {what} certify; {many:,} distinct {what} would probably save more layers"]
    return []


def _why_no_int8(job: ConversionTask[Any, Any]) -> list[str]:
    """What to say where int8 cannot be built; empty: it can."""
    try:
        require("quantize", "int8")
        check_buildable(INT8_TARGETS)
        check_enough_texts(len(job.numbers(job.texts.taught)), "texts that train")
    except FpabeeError as error:
        return [f"without int8, which usually makes a conversion faster: {error}"]
    return []


def _speed(certified: Any) -> float:
    """How many times as fast as all layers its point was measured to be, alone or over a file."""
    speed: float = max(certified.points[0].measured.values())
    return speed


class _Work:
    """The steps of a conversion.

    Args:
        teacher: the classifier.
        job: the task with its texts.
        progress: called with (what, done, total).
        int8: whether targets in int8 are built.

    Raises:
        ModelError: the head of the classifier is not the usual one of its family, or its tokenizer
            cannot be used.
    """

    def __init__(
        self,
        teacher: Classifier,
        job: ConversionTask[Any, Any],
        progress: Progress,
        *,
        int8: bool,
    ) -> None:
        self.teacher = teacher
        self.job = job
        self.int8 = int8
        self.options = job.options
        self.progress = progress
        self.task = Task(problem_type=teacher.problem_type, labels=teacher.labels)
        kind = task_of(self.task)
        thresholds = kind.decision_thresholds(job.bound.thresholds)
        if kind.flags:
            # What is promised about labels is said of those that the folder predicts.
            self.task = msgspec.structs.replace(self.task, label_thresholds=thresholds)
        self.plain = teacher.multi_exit(teacher.exit_config(()))
        self.tokenizer = load_tokenizer(teacher.folder, self.plain)
        longest = self.options.max_length
        self.max_length = row_limit(teacher.folder, self.tokenizer, self.plain, longest)
        self.padding = {"input_ids": pad_id(self.tokenizer, self.plain)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            self.padding["token_type_ids"] = self.tokenizer.pad_token_type_id

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result."""
        settings = replace(self.options, train_texts=None, force=False, threads=None)
        folders = (self.teacher.folder, self.options.adapter)
        files = [path for folder in folders if folder for path in sorted(folder.iterdir())]
        texts = self.job.texts
        content = [
            __version__,
            msgspec.to_builtins(settings, enc_hook=str),
            data_sha256(self.job.rows, labels=False),
            [part.tolist() for part in (texts.taught, texts.calibrate)],
            [sha256_of(path) for path in files if path.is_file()],
        ]
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()

    def run(self, folder: Path) -> Conversion:
        """Do all that is not done yet, and leave the engines folder in `engines`."""
        job = self.job
        taught = job.texts.taught
        numbers = job.numbers(taught)
        units = np.repeat(np.arange(len(taught)), job.lengths(taught))
        rows = encoded_rows(job.rows, self.tokenizer, self.max_length)
        trained = len(job.numbers(job.texts.train))
        if job.learns_from_altered:
            copies = self._altered(rows)
            if copies:
                logger.warning(f"{len(copies):,} altered copies of {job.what} train as well")
            new = np.arange(len(copies))
            numbers = np.insert(numbers, trained, len(rows) + new)
            units = np.insert(units, trained, len(taught) + new)
            rows += copies
            trained += len(copies)
        kept = Taught(numbers, trained, units, job.needed, job.fewest_tokens)
        logits, states = run_classifier(
            self.teacher, rows, self.padding, kept, folder, self.progress
        )
        job.check_possible(self.task, logits)
        model_dir = folder / "model"
        engines = folder / "engines"
        for left in (model_dir, engines):  # by a run that was stopped
            if left.is_dir():
                shutil.rmtree(left)
        chosen = self._train(model_dir, rows, logits, states)
        wanted = ExportOptions(max_length=self.max_length)
        export(model_dir, engines, wanted, self.progress)
        warnings = self._add_targets(engines)
        conversion = self._certify(Uncertified(engines, logits, chosen))
        if removed := job.texts.removed:
            what = f"train {job.what}"
            warnings.append(f"{removed:,} {what} were left out: they are among the others")
        fitting = len(np.unique(units[np.isin(numbers, states.rows)]))
        if fitting < len(taught):
            warnings.append(
                f"exits learned from {fitting:,} of the {len(taught):,} {job.what} that train: "
                "the file of their hidden states takes no more"
            )
        return replace(conversion, warnings=(*warnings, *conversion.warnings))

    def _altered(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Altered copies of the rows that train, as far as their states fit beside all others.

        Those that are the same as a row that does not train are left out. So no text that certifies
        has trained, which errs on the safe side: a new text may be the same as a copy.
        """
        texts = self.job.texts
        taught_tokens = sum(len(rows[number]) for number in self.job.numbers(texts.taught))
        room = most_tokens(self.teacher) - taught_tokens
        trains = self.job.numbers(texts.train)
        others = np.setdiff1d(np.arange(len(rows)), trains)
        known = {rows[number].input_ids.tobytes() for number in others}
        special = special_tokens(self.tokenizer, self.max_length)
        copies = altered([rows[number] for number in trains], special, self.max_length, room)
        return [copy for copy in copies if copy.input_ids.tobytes() not in known]

    def _train(
        self,
        model_dir: Path,
        rows: Sequence[EncodedRow],
        logits: NDArray[np.float32],
        states: States,
    ) -> Chosen:
        """Train the exits and exit 0, and write the model."""
        model, chosen = self._model(states, logits)
        exit_0 = self.job.exit_0(self.task, rows, logits, self.plain, self.progress)
        save_checkpoint(model, model_dir)
        with system_errors(model_dir):
            self.tokenizer.save_pretrained(model_dir)
            taught = self.job.numbers(self.job.texts.taught)
            write_trained_on(model_dir, (self.job.rows[number].content for number in taught))
        if exit_0 is not None:
            save_exit_0(model_dir, exit_0)
        return chosen

    def _model(self, states: States, logits: NDArray[np.float32]) -> tuple[MultiExitModel, Chosen]:
        """The weights of the classifier, and heads of the form that suits it."""
        teacher = self.teacher
        job = self.job
        lesson = job.lesson(self.task, logits, states.rows)
        chosen_by = job.numbers(job.texts.choose)
        count = int(np.isin(states.rows, chosen_by, invert=True).sum())
        judge = partial(job.judge, self.task, logits, states.rows[count:])
        chosen = choose_exits(teacher, states, lesson, count, judge, self.progress)
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
        heads = train_heads(form, teacher, states, lesson, len(states), self.progress)
        store(heads, form, model)
        return model, chosen

    def _add_targets(self, engines: Path) -> list[str]:
        """Add targets to the engines folder; without an operating point, rows run all layers.

        Returns:
            Why targets were refused.
        """
        folder = EnginesFolder.read(engines)
        full_depth = Budget(exit=folder.manifest.exits[-1])
        changed = folder.with_manifest(
            default_rule=full_depth.to_dict(), base_model=self.teacher.base_model
        )
        changed.write()
        names = buildable(OPENVINO_TARGETS)
        texts: list[Text] = []
        if self.int8:
            names += buildable(INT8_TARGETS)
            # Ranges come from texts that do not certify; shuffled, because the first ones set them.
            taught = self.job.numbers(self.job.texts.taught)
            shuffled = np.random.default_rng(0).permutation(taught)
            texts = [self.job.rows[number].content for number in shuffled]
        result = build_targets(engines, names, texts, progress=self.progress)
        refused: dict[str, list[str]] = {}
        for name, error in result.refused.items():
            refused.setdefault(str(error), []).append(name)
        return [f"not built: {', '.join(names)}: {why}" for why, names in refused.items()]

    def _progress_of(self, target: str) -> Progress:
        """The progress of steps that are done for each target."""
        return lambda what, done, total: self.progress(f"{target}: {what}", done, total)

    def _certified(self, uncertified: Uncertified, name: str) -> Any:
        """Certify a target, with a quick pass where that takes less time.

        A point without a quick pass stays beside one that has it, for machines that cannot run it.
        """
        job = self.job
        progress = self._progress_of(name)
        usual = job.bound.point
        alone = Passes(name)
        with_quick_pass = self._with_quick_passes(uncertified.engines, name)
        if not with_quick_pass:
            return job.certify(uncertified, alone, usual, progress)
        ways = [alone, *with_quick_pass]
        saved = job.saved(uncertified, ways, progress)
        best = ways[int(np.argmax(saved))]
        if best == alone:
            return job.certify(uncertified, alone, usual, progress)
        one = job.certify(uncertified, alone, one_pass(usual), progress)
        both = job.certify(uncertified, best, usual, progress)
        if not both.points[0].quick_target:
            return one  # not even the most cautious setting of both passes keeps the promise
        # Measured times follow from the texts that certify. To choose by them would choose between
        # two certificates, of which each may be wrong in 5 % of all conversions.
        if _speed(one) > _speed(both):
            job.warnings.append(
                f"{name}: these texts allow {usual} only cautious thresholds, so that "
                f"{one_pass(usual)} is faster on this machine; it keeps the same promise"
            )
        return both

    def _with_quick_passes(self, engines: Path, name: str) -> list[Passes]:
        """A target after each quick pass that the same library can run here."""
        folder = EnginesFolder.read(engines)
        targets = folder.manifest.targets
        return [
            Passes(name, other)
            for other in runnable_targets(folder)
            if other in INT8_TARGETS and targets[other].backend == targets[name].backend
        ]

    def _certify(self, uncertified: Uncertified) -> Conversion:
        """Certify the targets; the default is the fastest one that keeps its promise."""
        job = self.job
        engines = uncertified.engines
        texts = job.texts
        manifest = EnginesFolder.read(engines).manifest
        by_name = {
            name: self._certified(uncertified, name)
            for name in dict.fromkeys([FP32_TARGET, fastest_exact(manifest)])
        }
        layers = manifest.exit_layers[-1]
        depths = {}
        for name, each in by_name.items():
            point = each.points[0]
            if point.certificate is not None:
                has_quick_pass = bool(point.quick_target)
                depths[name] = (
                    layers / _speed(each) if has_quick_pass else point.chosen_on.mean_depth
                )
        default = fastest_with_exits(manifest, depths) if depths else FP32_TARGET
        EnginesFolder.read(engines).with_manifest(default_target=default).write()
        results: dict[str, Any] = {job.results: tuple(by_name.values())}
        return Conversion(
            **results,
            folder=engines,
            default_target=default,
            exit_layers=manifest.exit_layers,
            chosen=uncertified.chosen,
            rows=int(texts.weights.sum()),
            texts=len(texts.own),
            train_texts=len(texts.units) - len(texts.own),
            parts=texts.sizes,
            traffic=job.traffic(by_name[default]),
            accuracy=job.accuracy(self.task, uncertified.logits, by_name[default]),
            warnings=tuple(job.warnings),
            seconds=0.0,
        )
