"""The engine: an engines folder, loaded and ready to classify texts."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, Limits
from .batching import CostCurve
from .decider import Decider
from .distributions import Answers, Outputs
from .encoding import EncodedRow, Text, TextEncoder
from .errors import ArtifactError, BackendError, InputError, RuleError
from .execution import Chain, Regroup, WindowResult
from .exit_rules import Budget, ExitRule
from .manifest import NEXT, Manifest, ProblemType, read_manifest

# A window holds the hidden states of all its rows twice: what a segment reads and writes.
_WINDOW_BYTES = 256 * 2**20
# Texts that are tokenized in one call, so that memory stays flat on long lines too.
_CHUNK_TEXTS = 256
_CHUNK_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row.

    Attributes:
        labels: the predicted label, or for multi-label the predicted labels (may be none).
        scores: the probability of each predicted label.
        exit: the exit that answered, counted from 1.
        layer: encoder layers that ran.
        probabilities: of all labels, in the order of `Engine.labels`.
        truncated: whether the text had more tokens than the model takes.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    exit: int
    layer: int
    probabilities: tuple[float, ...]
    truncated: bool


@dataclass(frozen=True)
class Trace:
    """What the chain gave for some rows.

    Attributes:
        logits: `[exits, rows, labels]` float32; NaN at exits that a row did not reach.
        exits: `[rows]` exit of each row, counted from 1.
        predictions: `[rows]` class indices, or `[rows, labels]` of 0 and 1, at that exit.
        lengths: `[rows]` tokens of each row.
    """

    logits: NDArray[np.float32]
    exits: Answers
    predictions: Answers
    lengths: NDArray[np.intp]


class Engine:
    """A loaded engines folder. Thread-safe; use `Engine.load`, and close it or use `with`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: str,
        backend: Backend[Any],
        rule: ExitRule,
        operating_point: str | None = None,
        regroup: Regroup = Regroup.AUTO,
        max_length: int | None = None,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._target = target
        self._backend = backend
        # Together, so that a thread never sees the rule of one point with the name of another.
        self._in_use = (operating_point, rule)
        self._regroup = regroup
        self._encoder = TextEncoder(folder, manifest.tokenizer, max_length)
        self._limits = backend.limits()
        self._local = threading.local()
        self._cost: CostCurve | None = None
        self._cost_lock = threading.Lock()
        self._closed = False
        per_token = _bytes_per_token(manifest, self._limits)
        self._window_tokens = max(self._limits.group_tokens, _WINDOW_BYTES // per_token)
        # Refuses a rule that does not fit the model now, not at the first text.
        self._decider(rule)

    @classmethod
    def load(
        cls,
        path: str | Path,
        target: str | None = None,
        operating_point: str | None = None,
        threads: int | None = None,
        *,
        rule: ExitRule | None = None,
        regroup: Regroup = Regroup.AUTO,
        preload: bool = False,
        max_length: int | None = None,
    ) -> Engine:
        """Load an engines folder.

        Args:
            path: the folder that `fpabee-export` wrote.
            target: a built target; default: the manifest's.
            operating_point: a calibrated rule of the target, by name; default: the target's
                default, or the cautious rule of a folder that is not calibrated.
            threads: CPU threads; the process-wide pool keeps the first engine's number.
            rule: a rule of your own, instead of an operating point.
            regroup: whether undecided rows of several groups are joined.
            preload: load all segments now, instead of when first needed.
            max_length: truncate texts to fewer tokens than the model takes.

        Raises:
            ArtifactError: missing, damaged, or of another version.
            BackendError: the target cannot run here.
            RuleError: the operating point or rule does not exist or does not fit.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        name = target or manifest.default_target
        if name not in manifest.targets:
            raise BackendError(
                f"{folder} has no target {name!r}; it has {', '.join(manifest.targets)}",
                "choose one with --target, or build it with fpabee-export",
            )
        point = None if rule else _point_of(folder, manifest, name, operating_point)
        chosen = rule or _rule_of(manifest, name, point)
        backend = _open_backend(folder, manifest, name, threads)
        if preload:
            backend.preload()
        return cls(folder, manifest, name, backend, chosen, point, regroup, max_length)

    @property
    def manifest(self) -> Manifest:
        """What the folder says of itself."""
        return self._manifest

    @property
    def target(self) -> str:
        """The target in use."""
        return self._target

    @property
    def rule(self) -> ExitRule:
        """The rule that applies when a call names none."""
        return self._in_use[1]

    @property
    def operating_point(self) -> str | None:
        """The calibrated point whose rule applies; None: a rule of your own, or no calibration."""
        return self._in_use[0]

    def use(self, operating_point: str) -> None:
        """Switch to another operating point of the target, for calls that begin from now on.

        Raises:
            RuleError: the target has no such point.
        """
        point = _point_of(self._folder, self._manifest, self._target, operating_point)
        rule = _rule_of(self._manifest, self._target, point)
        self._decider(rule)
        self._in_use = (point, rule)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of the logits."""
        return self._manifest.task.labels

    def predict(
        self, texts: Sequence[Text], *, rule: ExitRule | None = None, full_depth: bool = False
    ) -> list[Prediction]:
        """Classify texts.

        Args:
            texts: strings, or (text, text_pair) tuples.
            rule: instead of the engine's.
            full_depth: run every layer for every row.

        Returns:
            One prediction a text, in their order.

        Raises:
            InputError: something is neither a text nor a pair.
            RuleError: the rule does not fit the model.
        """
        return list(self.stream(texts, rule=rule, full_depth=full_depth))

    def stream(
        self, texts: Iterable[Text], *, rule: ExitRule | None = None, full_depth: bool = False
    ) -> Iterator[Prediction]:
        """Classify any number of texts in flat memory; arguments as in `predict`."""
        for rows, result in self._windows(texts, self._chosen(rule, full_depth)):
            yield from self._predictions(rows, result)

    def trace(self, texts: Sequence[Text], *, rule: ExitRule | None = None) -> Trace:
        """The logits of every exit.

        Args:
            texts: strings, or (text, text_pair) tuples.
            rule: stop rows by this rule and leave NaN at exits not reached; default: run
                every row to full depth.

        Returns:
            The trace, rows in the order of the texts.
        """
        windows = list(self._windows(texts, rule or self._chosen(None, True)))
        results = [result for _, result in windows]
        if not results:
            shape = (len(self._manifest.segments), 0, len(self.labels))
            results = [WindowResult(np.zeros(0, np.int64), np.zeros(shape, np.float32))]
        return Trace(
            logits=np.concatenate([result.logits for result in results], axis=1),
            exits=np.concatenate([result.exits for result in results]),
            predictions=np.concatenate([self._outputs(result).answers for result in results]),
            lengths=np.array([len(row) for rows, _ in windows for row in rows], np.intp),
        )

    def encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize texts as the engine does."""
        return self._encoder.encode(texts)

    @property
    def limits(self) -> Limits:
        """The shapes that the target runs."""
        return self._limits

    def run_encoded(self, rows: Sequence[EncodedRow], rule: ExitRule) -> WindowResult:
        """Run tokenized rows (see `encode`) as one window.

        Raises:
            RuleError: the rule does not fit the model.
        """
        chain = self._chain()
        many = sum(len(row) for row in rows) > self._limits.group_tokens
        cost = self._cost_curve(chain) if many else None
        return chain.run(rows, self._decider(rule), cost)

    def time_segments(self, rows: int, tokens: int) -> list[float]:
        """Seconds of each segment on a group of `rows` rows of `tokens` tokens, run once."""
        return self._chain().time_segments(rows, tokens)

    def close(self) -> None:
        """Free the segments; the engine cannot be used afterwards."""
        self._closed = True
        # The threads' executions hold sessions and buffers.
        self._local = threading.local()
        self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def multi_label(self) -> bool:
        """Whether a row may have any number of labels."""
        return self._manifest.task.problem_type is ProblemType.MULTI_LABEL

    def _chosen(self, rule: ExitRule | None, full_depth: bool) -> ExitRule:
        return Budget(exit=len(self._manifest.segments)) if full_depth else rule or self.rule

    def _decider(self, rule: ExitRule) -> Decider:
        task = self._manifest.task
        return Decider(rule, task.problem_type, len(self._manifest.segments), task.cuts)

    def _outputs(self, result: WindowResult) -> Outputs:
        task = self._manifest.task
        return result.outputs(task.problem_type, task.cuts)

    def _chain(self) -> Chain[Any]:
        if self._closed:
            raise BackendError("this engine is closed", "load it again with Engine.load")
        chain: Chain[Any] | None = getattr(self._local, "chain", None)
        if chain is None:
            chain = Chain(
                self._backend.open(),
                self._limits,
                len(self._manifest.segments),
                len(self.labels),
            )
            self._local.chain = chain
        return chain

    def _windows(
        self, texts: Iterable[Text], rule: ExitRule
    ) -> Iterator[tuple[list[EncodedRow], WindowResult]]:
        if isinstance(texts, str):
            raise InputError("the texts are one string", "give a list: engine.predict([text])")
        self._decider(rule)
        window: list[EncodedRow] = []
        tokens = 0
        for chunk in _chunks(texts):
            for row in self._encoder.encode(chunk):
                window.append(row)
                tokens += len(row)
                if tokens >= self._window_tokens:
                    yield window, self.run_encoded(window, rule)
                    window, tokens = [], 0
        if window:
            yield window, self.run_encoded(window, rule)

    def _cost_curve(self, chain: Chain[Any]) -> CostCurve | None:
        if self._regroup is Regroup.NEVER or len(self._manifest.segments) == 1:
            return None
        if self._regroup is Regroup.ALWAYS:
            return CostCurve((1, self._limits.group_tokens), (1.0, 1.0), 0.0)
        with self._cost_lock:
            if self._cost is None:
                self._cost = chain.measure()
            return self._cost

    def _predictions(self, rows: list[EncodedRow], result: WindowResult) -> Iterator[Prediction]:
        layers = self._manifest.exit_layers
        outputs = self._outputs(result)
        probabilities = outputs.probabilities.tolist()
        for number, row in enumerate(rows):
            answer = outputs.answers[number]
            chosen = np.flatnonzero(answer) if self.multi_label else [int(answer)]
            exit_number = int(result.exits[number])
            yield Prediction(
                labels=tuple(self.labels[index] for index in chosen),
                scores=tuple(probabilities[number][index] for index in chosen),
                exit=exit_number,
                layer=layers[exit_number - 1],
                probabilities=tuple(probabilities[number]),
                truncated=row.truncated,
            )


def _bytes_per_token(manifest: Manifest, limits: Limits) -> int:
    """Memory of a token of a window: what segment 1 hands on, read and written at once.

    Taken for the longest rows, where a position bias weighs most.
    """
    sequence = limits.max_sequence
    sizes = {"batch": max(1, limits.group_tokens // sequence), "sequence": sequence}
    total = 0
    for name in manifest.segments[0].calls:
        for spec in manifest.graphs[name].outputs:
            if spec.name.startswith(NEXT):
                shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
                total += math.prod(shape) * np.dtype(spec.dtype).itemsize
    return max(1, 2 * total // (sizes["batch"] * sequence))


def _chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    iterator = iter(texts)
    for first in iterator:
        chunk, characters = [first], _characters(first)
        for text in itertools.islice(iterator, _CHUNK_TEXTS - 1):
            chunk.append(text)
            characters += _characters(text)
            if characters >= _CHUNK_CHARACTERS:
                break
        yield chunk


def _characters(text: Text) -> int:
    """Size of a text or a pair; what is neither is refused when it is encoded."""
    parts = text if isinstance(text, tuple) else (text,)
    return sum(len(part) for part in parts if isinstance(part, str))


def _point_of(folder: Path, manifest: Manifest, target: str, name: str | None) -> str | None:
    """The operating point to run: the one that is named, or the target's default."""
    points = manifest.targets[target].operating_points
    if name is None:
        return manifest.targets[target].default_operating_point or None
    if name in points:
        return name
    elsewhere = [other for other, t in manifest.targets.items() if name in t.operating_points]
    if elsewhere:
        raise RuleError(
            f"operating point {name!r} was measured on {', '.join(elsewhere)}, not on {target}",
            f"calibrate it here: fpabee-calibrate {folder} --data DATA --target {target}",
        )
    raise RuleError(
        f"target {target} has no operating point {name!r}; it has: "
        f"{', '.join(points) or 'none yet'}",
        f"make points: fpabee-calibrate {folder} --data DATA --target {target}",
    )


def _rule_of(manifest: Manifest, target: str, point: str | None) -> ExitRule:
    if point is None:
        return ExitRule.from_dict(manifest.default_rule)
    return ExitRule.from_dict(manifest.targets[target].operating_points[point].rule)


def _open_backend(folder: Path, manifest: Manifest, name: str, threads: int | None) -> Backend[Any]:
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}", "give at least 1")
    target = manifest.targets[name]
    if target.backend == "onnxruntime" and target.device == "cuda":
        from .backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(folder, manifest, target)
    if target.backend == "onnxruntime":
        from .backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(folder, manifest, target, threads)
    if target.backend in ("tensorrt", "tensorrt-rtx"):
        from .backends.tensorrt import TensorRtBackend

        return TensorRtBackend(folder, manifest, target, name)
    raise ArtifactError(
        f"the manifest names backend {target.backend!r}, which this fpabee does not have",
        "pip install -U fpabee, or choose another --target",
    )
