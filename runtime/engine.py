"""The engine: an engines folder, loaded and ready to classify texts."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from .artifact.folder import EnginesFolder
from .backends.base import Backend
from .check import Agreement
from .core import Core, check_here, check_target, open_before
from .encoding import EncodedRow, Text
from .errors import (
    FpabeeError,
    InputError,
    RuleError,
    seconds_of,
    whole_number,
)
from .hub import engines_folder
from .predictions import Prediction, Tally, Trace
from .rules.rules import ExitRule, Uncertainty
from .targets import no_promise, open_backend, rule_here, rule_instead, target_of
from .tasks.ranked import Ranked, pairs_of, top_of
from .watch import Watch, Watched

_LEAST_TOKENS = 8


class Engine:
    """A loaded engines folder. Thread-safe; use `Engine.load`, and close it or use `with`.

    Only the process that loaded it can use it. In a process that is forked from it later, calls
    raise `BackendError`.

    Attributes:
        manifest: the manifest of the folder, as it was when the engine was loaded.
        revision: its SHA-256 in hexadecimal digits; it holds the hashes of all files.
        target: the target in use.
        labels: label names in the order of the logits.
        multi_label: whether a row may have any number of labels.
        max_length: tokens to which texts are truncated, special tokens included.
        core: what the other rooms of this package use; it may change at any time.

    Example:
        ```python
        from fpabee.runtime import Engine, FPabee

        with Engine.load("engines/") as engine:
            first, second = engine.predict(["turn on the lights", ("a text", "and its pair")])
            print(first.labels, first.scores, "after", first.layer, "layers")
            engine.predict(["play jazz"], rule=FPabee(threshold=0.3, patience=2))
            engine.predict(["play jazz"], deadline_ms=20.0)
            print(engine.tally.shares)
        ```
    """

    @classmethod
    def load(
        cls,
        path: str | Path,
        target: str | None = None,
        operating_point: str | None = None,
        threads: int | None = None,
        *,
        rule: ExitRule | None = None,
        max_length: int | None = None,
        check: bool | None = None,
        revision: str | None = None,
        device: int = 0,
        watch: float | None = None,
    ) -> Engine:
        """Load an engines folder.

        Args:
            path: the engines folder that an export wrote, or `owner/name` of one on the Hugging
                Face hub, of which the files of the target are downloaded. A folder that exists
                here is taken.
            target: a built target, such as `onnxruntime-fp32`; default: the manifest's.
            operating_point: the name of a calibrated rule of the target. The default is the
                target's default point, or the cautious rule of a folder that is not calibrated. A
                point with a quick pass also opens the target of that pass. Where this cannot run,
                or was built again since the point was certified, a point that is named, or whose
                target is named, is refused. Otherwise, the same point without a quick pass runs
                instead or, if there is none, the default rule of the folder; a warning says so.
            threads: CPU threads, at most 1024; default: the cores that this process may use.
            rule: a rule of your own instead of an operating point, for the exits of the target.
            max_length: truncate texts to this many tokens, special tokens included. The default
                and the largest value is what the model and the target take.
            check: run `check` at once, which loads all segments. By default, this is done once on
                each new kind of machine: where the system, the features of the processor, the GPU
                or the version of the library differ from those on which the target was verified.
                The user's cache directory remembers it. False: never.
            revision: a branch, a tag or a commit on the hub; default: its main branch.
            device: the number of the GPU, from 0, among those that `CUDA_VISIBLE_DEVICES` leaves.
                A target for the CPU has only device 0. With TensorRT, the CUDA device and
                context of the calling thread stay as they are.
            watch: watch the promise of the operating point about changed answers, and spend at most
                this percentage of all layers that run on it, such as 1.0; see `watched`. Some rows
                run on to full depth after they are answered, so calls that have such rows return
                later. Rows with a deadline, `max_exit` or a rule of their own are not watched.

        Returns:
            The engine; close it, or use it in a `with` statement.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another version; the hub does not
                provide it; or it would run TensorRT plans from there without being asked.
            BackendError: the target does not exist, it cannot run here or on this device, or
                `threads` or `device` is impossible.
            InputError: `max_length` is not a whole number, or leaves no room for text; or `watch`
                is not a percentage.
            MissingExtraError: the target's inference library is not installed, or the package that
                downloads from the hub.
            RuleError: the operating point or rule does not exist or does not fit the model, or
                both are given; a named point has a quick pass that cannot run here or has lost its
                promise; or there is no promise to watch.
            CheckError: unless `check` is False, the target is not the model that was exported, or
                this kind of machine computes something else.
        """
        if rule is not None and operating_point is not None:
            raise RuleError(
                f"both operating point {operating_point!r} and a rule are given",
                "give one of them: an operating point is a rule with its settings",
            )
        folder = engines_folder(path, target, revision)
        engines = EnginesFolder.read(folder)
        name = target_of(engines, target)
        point = None
        if rule is None:
            point, rule = rule_here(engines, name, operating_point)
        with ExitStack() as opened:
            backend = open_backend(engines, name, threads, device)
            opened.callback(backend.close)
            before: list[Backend] = []
            try:
                before = open_before(engines, point, backend, {}, check)
            except FpabeeError as error:
                if target is not None or operating_point is not None:
                    raise no_promise(engines.manifest, name, point, error) from error
                point, rule = rule_instead(engines, name, point, error)
            for each in before:
                opened.callback(each.close)
            watching = None if watch is None else Watch(engines.manifest, name, watch, point)
            engine = cls(engines, backend, rule, point, max_length, *before)
            engine.core.watch = watching
            check_here(engines, backend, check, engine._rule_of_reference)
            opened.pop_all()
        return engine

    def __init__(
        self,
        engines: EnginesFolder,
        backend: Backend,
        rule: ExitRule,
        operating_point: str | None = None,
        max_length: int | None = None,
        quick: Backend | None = None,
    ) -> None:
        """Called by `Engine.load`, which opens the backends."""
        self.core = Core(engines, backend, rule, operating_point, max_length, quick)
        self.target = backend.name
        self.manifest = engines.manifest
        self.revision = hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest()
        self.labels = self.manifest.task.labels
        self.multi_label = self.core.task.flags
        self.max_length = self.core.max_length

    def __repr__(self) -> str:
        point = self.operating_point or "no operating point"
        return f"<Engine {str(self.core.engines.path)!r}, {self.target}, {point}>"

    def __call__(self, text: Text) -> Prediction:
        """Classify one text; see `predict` for the errors.

        Args:
            text: a string, or a (text, text_pair) tuple.
        """
        (prediction,) = self.predict([text])
        return prediction

    def predict(
        self,
        texts: Sequence[Text],
        *,
        rule: ExitRule | None = None,
        full_depth: bool = False,
        max_exit: int | None = None,
        deadline_ms: float | None = None,
    ) -> list[Prediction]:
        """Classify texts.

        A deadline is a budget for the whole call, tokenization included. Before each segment, rows
        that would miss it if the segment took as long as the one before it are answered at the
        exit that they have reached, and marked `deadline_limited`. Without exit 0, the first
        segment always runs. Answers that are late are marked `deadline_missed`. The first call
        with rows of a new length takes longer, see `warm_up`.

        Args:
            texts: strings, or (text, text_pair) tuples.
            rule: a rule for the exact pass, which replaces the engine's for this call: its exits
                are those of the target in use. So an operating point with a quick pass is not asked
                for by giving its rule, but by leaving out `rule`.
            full_depth: run every layer for every row, whatever the rule.
            max_exit: every row stops at this exit at the latest; not with `full_depth`.
            deadline_ms: milliseconds for the call, from 0.

        Returns:
            One prediction for each text, in the same order.

        Raises:
            InputError: an item is neither a text nor a pair of texts, or the deadline is not a
                number.
            RuleError: the rule or `max_exit` does not fit the model.
            BackendError: the engine is closed, a row is longer than the target takes, or the
                target's logits are not finite at an exit that a row reached.
            ArtifactError: a segment that is loaded now is missing or damaged.
        """
        self.core.check_method("predict")
        deadline = self._deadline(deadline_ms)
        route = self.core.route(rule=rule, full_depth=full_depth, max_exit=max_exit)
        windows = [self.core.run(rows, route, deadline) for rows in self.core.windows(texts)]
        missed = self.core.clock() > deadline
        answers = [
            self.core.answers(each, np.full(len(each.rows), missed), route) for each in windows
        ]
        return [answer for part in answers for answer in part]

    def stream(
        self,
        texts: Iterable[Text],
        *,
        rule: ExitRule | None = None,
        full_depth: bool = False,
        max_exit: int | None = None,
    ) -> Iterator[Prediction]:
        """Classify any number of texts in constant memory.

        Args:
            texts: strings, or (text, text_pair) tuples; read one window of rows ahead of the
                predictions that are taken.
            rule: as in `predict`.
            full_depth: run every layer for every row, whatever the rule.
            max_exit: every row stops at this exit at the latest.

        Yields:
            One prediction for each text, in the same order.

        Raises:
            FpabeeError: as in `predict`, when the predictions are taken.
        """
        self.core.check_method("predict")
        yield from self.core.stream(
            texts, self.core.route(rule=rule, full_depth=full_depth, max_exit=max_exit)
        )

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        *,
        scores: Sequence[float] | None = None,
        deadline_ms: float | None = None,
        full_depth: bool = False,
        all: bool = False,
    ) -> list[Ranked]:
        """Rank documents by how well they answer a query.

        Documents that cannot be among the best leave after a few layers. Those that are returned
        have run all layers, so their scores and their order are those of the whole model. Which
        documents leave depends on the others, so the documents of a query belong into one call.

        A deadline is a budget for the whole call. Documents that would miss it are ranked by the
        last exit that they have passed, and marked `deadline_limited`. If the model has an exit 0
        and nothing else has run, they are ranked by `scores`, or else keep their order.

        Args:
            query: the query.
            documents: the documents.
            top_k: how many documents are returned at most; default: as many as the operating point
                promises, or all of them at full depth.
            scores: those of the search that found the documents, in their order; a higher one is
                better. If the model was converted with scores of the same search, some documents
                leave before layer 1 (exit 0); otherwise, the scores are passed over. The promise
                holds with and without them.
            deadline_ms: milliseconds for the call.
            full_depth: run every layer for every document.
            all: return all documents, whatever `top_k` is; those that left early come last, by
                their predicted scores.

        Returns:
            The best documents, best first; equal scores keep the order of the documents.

        Raises:
            InputError: the model is a classifier; `top_k` is more than the operating point
                promises, and there are more documents; the documents have too many tokens for one
                call; `scores` are not one finite number for each document; or something is not a
                text.
            BackendError: as in `predict`.
            ArtifactError: as in `predict`.

        Example:
            ```python
            from fpabee.runtime import Engine

            with Engine.load("reranker-engines/") as engine:
                for best in engine.rank("a fast web server", ["nginx is ...", "A spreadsheet ..."]):
                    print(best.index, best.score, best.exit)
            ```
        """
        self.core.check_method("rank")
        deadline = self._deadline(deadline_ms)
        route = self.core.route(full_depth=full_depth)
        pairs = pairs_of(query, documents)
        most = top_of(route.rule, top_k, len(pairs))
        encoded = self.core.encode(pairs)
        rows = self.core.with_scores(encoded, scores)
        return self.core.rank(rows, route, deadline, most, with_left=all)

    def _deadline(self, deadline_ms: float | None) -> float:
        """When a call that begins now ends, in seconds of the core's clock."""
        if deadline_ms is None:
            return math.inf
        return self.core.clock() + seconds_of("deadline_ms", deadline_ms)

    def trace(self, texts: Sequence[Text], *, rule: ExitRule | None = None) -> Trace:
        """Compute the logits of every exit; those of a quick pass come before the exact pass.

        Args:
            texts: strings, or (text, text_pair) tuples.
            rule: stop rows by this rule, with NaN at exits that they do not reach; as in `predict`,
                it is a rule for the exact pass. Default: run every row through all exits, those of
                a quick pass included.

        Returns:
            The trace, rows in the order of the texts. `simulate` applies other rules to it.

        Raises:
            FpabeeError: as in `predict`.
        """
        core = self.core
        route = core.in_use.whole if rule is None else core.route(rule=rule)
        parts = [core.trace(rows, route) for rows in core.windows(texts)]
        parts = parts or [core.trace([], route)]
        return Trace(
            logits=np.concatenate([part.logits for part in parts], axis=1),
            exits=np.concatenate([part.exits for part in parts]),
            predictions=np.concatenate([part.predictions for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            first_exit=self.manifest.exits[0],
        )

    def check(self) -> Agreement:
        """Run the reference texts of the folder and compare with the PyTorch model.

        Loads all segments. Logits may differ by ten times what was measured when the target was
        made, or by the tie of its precision if that is more, see `Requirements`. If nothing was
        measured, they may differ by any finite amount.

        Returns:
            How closely the target agrees; exits are those of the engine's rule, or those of full
            depth where the point has a quick pass, or the model ranks documents.

        Raises:
            ArtifactError: the reference is missing or damaged, or no text of it fits the target.
            CheckError: the target is not the model that was exported.
        """
        return check_target(self.core.engines, self.core.backend, self._rule_of_reference)

    @property
    def _rule_of_reference(self) -> ExitRule | None:
        """The engine's rule, if the reference can show its exits; None: all layers run.

        The reference has pairs, and no queries with their documents; and it has the exits of the
        exact pass.
        """
        route = self.core.in_use
        fits = route.exits == self.core.full_depth.exits and not self.core.task.compares
        return route.rule if fits else None

    def warm_up(self, rows: int = 1, tokens: int | None = None) -> None:
        """Load the segments, and run them once at each length, because first runs take longer.

        What TensorRT for RTX compiles is kept for later processes, now and when the engine is
        closed.

        Args:
            rows: rows of a call.
            tokens: longest row in tokens; default: the longest that the target runs.

        Raises:
            InputError: `rows` or `tokens` is not a whole number from 1.
            BackendError: the engine is closed.
            ArtifactError: a segment is missing or damaged.
        """
        rows = whole_number("rows", rows, InputError)
        limits = self.core.limits
        longest = limits.max_sequence
        most = longest if tokens is None else whole_number("tokens", tokens, InputError)
        lengths = limits.sequence_lengths or _powers_of_two(longest)
        shapes = []
        for length in lengths[: bisect_left(lengths, most) + 1]:
            full = max(1, min(limits.max_batch, limits.group_tokens // length))
            shapes.append((min(rows, full), length))
        self.core.prepare(shapes)

    def use(self, operating_point: str) -> None:
        """Switch to another operating point of the target, for calls that begin from now on.

        Each point has a test of its own if promises are watched, which goes on when the point is
        used again. A point that promises nothing about changed answers is not watched.

        Args:
            operating_point: its name.

        Raises:
            RuleError: the target has no such point, or its quick pass cannot run here or was built
                again since the point was certified. The point before stays in use.
        """
        core = self.core
        try:
            core.in_use = core.route(operating_point)
        except RuleError as error:
            point = core.in_use.point
            old = "the engine's own rule" if point is None else f"point {point!r}"
            raise RuleError(f"{error.message}; {old} stays in use", error.hint) from error

    @property
    def tally(self) -> Tally:
        """Counts of what `predict` and `stream` answered since the load or `reset_tally`."""
        return self.core.tallies.total

    def reset_tally(self) -> Tally:
        """Start the tally again from zero; returns it as it was.

        Raises:
            BackendError: this process was forked after the engine was loaded.
        """
        self.core.backend.origin.check()
        return self.core.tallies.reset()

    @property
    def watched(self) -> Watched | None:
        """The result of watching the promise of the operating point in use, since the load.

        None if nothing is watched: without `watch` in `load`, or if this point promises nothing
        about changed answers.

        Raises:
            BackendError: this process was forked after the engine was loaded.
        """
        self.core.backend.origin.check()
        return None if self.core.watch is None else self.core.watch.watched(self.operating_point)

    @property
    def rule(self) -> ExitRule:
        """The rule of calls that do not give one."""
        return self.core.in_use.rule

    @property
    def operating_point(self) -> str | None:
        """The operating point in use; None with a rule of your own, or without calibration."""
        return self.core.in_use.point

    @property
    def label_thresholds(self) -> dict[str, float]:
        """The probability above which the promise of the operating point flags a label, by label.

        Without such a promise, those of the task, above which a label is predicted; empty if the
        answer is the most probable label. `Prediction.labels` are those of the task, so compare
        `probabilities` with these thresholds to flag texts.
        """
        route = self.core.in_use
        of_rule = route.rule.label_thresholds if isinstance(route.rule, Uncertainty) else ()
        decides = of_rule or self.core.task.predicted_above
        thresholds = {label: p for label, p in zip(self.labels, decides, strict=False) if p < 1}
        points = self.manifest.targets[self.target].operating_points
        certificate = None if route.point is None else points[route.point].certificate
        # A certified rule may be full depth, which knows no thresholds.
        return thresholds if certificate is None else thresholds | certificate.label_thresholds

    def run_encoded(self, rows: Sequence[EncodedRow], rule: ExitRule) -> Trace:
        """Run tokenized rows as one window, with the hidden states of all rows in memory.

        Args:
            rows: tokenized texts, such as those of a tokenizer of your own.
            rule: the rule, as in `predict`.

        Returns:
            The trace, as `trace` gives it.

        Raises:
            RuleError: the rule does not fit the model.
            BackendError: the engine is closed, a row is longer than the target takes, or the
                target's logits are not finite at an exit that a row reached.
            ArtifactError: a segment that is loaded now is missing or damaged.
        """
        return self.core.trace(rows, self.core.route(rule=rule))

    def close(self) -> None:
        """Free the segments; the engine cannot be used afterwards.

        Segments that other threads run are finished, and the last of these threads frees them. A
        call that needs another window of rows afterwards gets a `BackendError`. In a process that
        was forked after the engine was loaded, this does nothing.
        """
        for backend in self.core.backends.values():
            backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _powers_of_two(longest: int) -> tuple[int, ...]:
    lengths = [min(_LEAST_TOKENS, longest)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return tuple(lengths)
