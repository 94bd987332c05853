"""The core of an engine: everything between texts and answers, for the rooms of this package.

`Engine` is the face that applications see. The scheduler, calibration and benchmarks chain segments
themselves and need more than that, which may change at any time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifact.exits import Exits, exits_of
from .artifact.folder import EnginesFolder
from .backends.base import Backend
from .backends.buffers import row_bytes
from .chain.chain import Chain, Decision, not_finite
from .chain.groups import Group
from .chain.legs import Leg, legs_of
from .encoding import EncodedRow, Text, TextEncoder, blocks
from .errors import InputError, RuleError, whole_number
from .exit_0 import ExitZero
from .first_stage import FirstStage, checked_scores
from .predictions import Tally, Trace
from .rules.measures import Integers, Mask
from .rules.rules import Budget, ExitRule
from .rules.settling import Runner, Settled
from .tasks import task_of
from .tasks.ranked import Ranked, ranked
from .watch import Watch

_WINDOW_BYTES = 256 * 2**20
# Of the documents of one query, which run together: 256 of 512 tokens in an encoder of 1,024.
_QUERY_BYTES = 2 * 2**30


class Core:
    """Runs texts with one target of an engines folder. Thread-safe.

    Args:
        engines: the engines folder.
        backend: runs the segments of the target.
        quick: runs those of the quick pass of an operating point, or None without one.
        rule: the rule of calls that give none.
        operating_point: its name, if it is an operating point.
        max_length: truncate texts to this many tokens, special tokens included; None: what the
            model and the target take.

    Attributes:
        engines: the engines folder.
        manifest: its manifest.
        task: what the logits of the model mean.
        exits: those that rows may see by the rule in use, with those of the quick pass if it has
            one. Rules that a call gives see `exits.exact`.
        backend: what runs the segments of the target.
        backends: those that run rows, in the order of their passes.
        limits: the shapes that the target runs.
        max_length: tokens to which texts are truncated, special tokens included.
        window_bytes: memory of the rows that run at the same time, in bytes, see `windows`.
        clock: the time in seconds, by which deadlines are given.
        first_stage: exit 0 of a ranking; None: the model has none.
        full_depth: runs every layer of the target for every row.
        every_exit: shows every row all exits, those of the quick pass included.
        in_use: the name of the operating point in use, if it is one, and the rule of calls that
            give none. One attribute, so that a thread never sees the rule of one point with the
            name of another.
        tally: counts of what was answered.
        watch: chooses the rows that are watched; None: none are.

    Raises:
        ArtifactError: the tokenizer or exit 0 is missing or damaged.
        InputError: `max_length` is not a whole number, or leaves no room for text.
        RuleError: the rule does not fit the model.
    """

    def __init__(
        self,
        engines: EnginesFolder,
        backend: Backend,
        rule: ExitRule,
        operating_point: str | None = None,
        max_length: int | None = None,
        quick: Backend | None = None,
    ) -> None:
        self.engines = engines.absolute()
        self.manifest = engines.manifest
        self.task = task_of(self.manifest.task)
        self.backend = backend
        self.limits = backend.limits()
        self.window_bytes = _WINDOW_BYTES
        self.clock: Callable[[], float] = perf_counter
        self._row_bytes = lru_cache(None)(partial(row_bytes, self.manifest, self.limits))
        self.first_stage = FirstStage.load(engines)
        self._exit_0 = self.first_stage or ExitZero.load(engines)
        self.tally = Tally(())
        self._tally_lock = threading.Lock()
        self.add_quick_pass(quick)
        self.full_depth = self._runner(Budget(exit=self.exits.exact.last))
        (leg,) = self.legs(self.full_depth)
        self._runs_on = (self.full_depth, leg)
        self.use(operating_point, rule, has_quick_pass=quick is not None)
        tokenizer = self.manifest.tokenizer
        most = min(tokenizer.max_length, self.limits.max_sequence)
        spec = msgspec.structs.replace(tokenizer, max_length=most)
        self._encoder = TextEncoder(engines.path, spec, max_length)
        self.max_length = self._encoder.limit
        self.watch: Watch | None = None

    def add_quick_pass(self, quick: Backend | None) -> None:
        """Have rows run first in another target, if their rule has thresholds for that pass.

        Args:
            quick: what runs the target, or None without a quick pass.
        """
        name = "" if quick is None else quick.name
        backends = {"": self.backend} if quick is None else {name: quick, "": self.backend}
        exits = exits_of(self.manifest, name)
        self.backends = tuple(backends.values())
        self._legs = {each.last: legs_of(each, backends) for each in (exits.exact, exits)}
        self.exits = exits
        self.every_exit = self._runner(Budget(exit=exits.last), exits)
        with self._tally_lock:
            self.tally += Tally((0,) * len(exits))

    def use(self, operating_point: str | None, rule: ExitRule, has_quick_pass: bool) -> None:
        """Have calls that give no rule use this one.

        Args:
            operating_point: the name of the point; None: it is a rule of the caller's own.
            rule: the rule.
            has_quick_pass: whether it has thresholds for the exits of a quick pass.
        """
        exits = self.exits if has_quick_pass else self.exits.exact
        self.in_use = (operating_point, self._runner(rule, exits))

    @property
    def in_use_has_quick_pass(self) -> bool:
        """Whether the rule of calls that give none has thresholds for a quick pass."""
        _, usual = self.in_use
        return bool(self.exits_seen(usual).quick)

    def exits_seen(self, runner: Runner[Any]) -> Exits:
        """The exits that rows see by a rule.

        Args:
            runner: what applies the rule.
        """
        return self.exits if runner.exits == self.exits.numbers else self.exits.exact

    def legs(self, runner: Runner[Any]) -> tuple[Leg, ...]:
        """The passes of rows through segments by a rule.

        Args:
            runner: what applies the rule.
        """
        return self._legs[runner.exits[-1]]

    def encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize texts.

        Args:
            texts: strings, or (text, text_pair) tuples.

        Raises:
            InputError: a text is neither a string nor a pair of strings, or is not Unicode.
            BackendError: this process was forked after the engine was loaded.
        """
        self.backend.origin.check()
        return self._encoder.encode(texts)

    def windows(self, texts: Iterable[Text]) -> Iterator[list[EncodedRow]]:
        """Tokenize texts, and divide them into windows: rows that run at the same time.

        Args:
            texts: strings, or (text, text_pair) tuples; some are read before they are needed.

        Yields:
            Rows in the order of the texts. A window ends with the row at which its hidden states
            reach `window_bytes`.

        Raises:
            FpabeeError: as in `encode`.
        """
        self.backend.origin.check()
        encoded = self._encoder.stream(texts)
        for window in blocks(encoded, lambda row: self._row_bytes(len(row)), self.window_bytes):
            yield window
            # The thread that tokenizes the next texts does not exist in a forked process.
            self.backend.origin.check()

    def runner(
        self,
        rule: ExitRule | None = None,
        *,
        full_depth: bool = False,
        max_exit: int | None = None,
        has_quick_pass: bool = False,
    ) -> Runner[Any]:
        """What applies a rule to rows of this model, for code that chains segments itself.

        Args:
            rule: the rule; default: the engine's.
            full_depth: as in `predict`.
            max_exit: as in `predict`.
            has_quick_pass: whether `rule` has thresholds for the exits of the quick pass.

        Raises:
            RuleError: the rule or `max_exit` does not fit the model, or it contradicts
                `full_depth`.
        """
        if full_depth and max_exit is not None:
            raise RuleError(
                f"full_depth runs every layer, and max_exit {max_exit!r} stops rows before",
                "give one of `full_depth` and `max_exit`",
            )
        exits = self.exits if has_quick_pass else self.exits.exact
        _, usual = self.in_use
        runner = usual
        if rule is not None and not (self.in_use_has_quick_pass and rule == usual.rule):
            runner = self._runner(rule, exits)
        if full_depth:
            runner = self.full_depth
        if max_exit is None:
            return runner
        return self.task.runner(runner.rule.capped(max_exit), runner.exits)

    def check_method(self, method: str) -> None:
        """Refuse a call that belongs to another task.

        Args:
            method: the method of `Engine` that is called, or that means the same.

        Raises:
            InputError: the model is for another task.
        """
        if method != self.task.method:
            raise InputError(f"this model {self.task.does}", f"call `{self.task.method}` instead")

    def check_open(self) -> None:
        """Check that the engine can run.

        Raises:
            BackendError: the engine is closed, or this process was forked after it was loaded.
        """
        self.backend.check_open()

    def chain(self, runner: Runner[Any] | None = None) -> Chain:
        """A chain of the segments, for code that chains segments itself, as `Scheduler` does.

        Args:
            runner: that of all rows; None: they may have any.

        Raises:
            BackendError: the engine is closed, or this process was forked after it was loaded.
        """
        self.check_open()
        backends = self.backends
        if self.exits.quick and runner is not None and self.watch is None:
            backends = tuple(each.backend for each in self.legs(runner))
        return Chain(backends, self._exit_0, self._runs_on, self.clock)

    def choose_watched(
        self, rows: int, runner: Runner[Any], deadline: float = math.inf
    ) -> NDArray[np.object_]:
        """Which of some rows are watched, see `Watch.choose`.

        Args:
            rows: how many rows.
            runner: their rule. Only rows by the engine's own rule are watched.
            deadline: as in `run`. Rows with a deadline are not watched.
        """
        point, usual = self.in_use
        if self.watch is None or runner is not usual or deadline < math.inf:
            return np.full(rows, None)
        return self.watch.choose(point, rows)

    def count_depth(self, exits: Integers) -> None:
        """Count the layers of rows that were answered at these exits: they pay for watching."""
        if self.watch is not None:
            self.watch.ran(exits)

    def run(
        self, rows: Sequence[EncodedRow], runner: Runner[Any], deadline: float = math.inf
    ) -> Settled:
        """Run a window of rows, and keep the logits of their exits only.

        Args:
            rows: the rows of the window; in a ranking, the documents of one query.
            runner: decides which of them stop.
            deadline: when their answers should be there, in seconds of `clock`.

        Returns:
            All rows, in their order.

        Raises:
            BackendError: as in `Engine.run_encoded`.
            ArtifactError: a segment that is loaded now is missing or damaged.
        """
        count = len(rows)
        window = Settled(
            rows=np.fromiter(rows, np.object_, count),
            exits=np.zeros(count, np.int64),
            logits=np.zeros((count, len(self.task.labels)), np.float32),
            limited=np.zeros(count, np.bool_),
        )
        watched = self.choose_watched(count, runner, deadline)
        try:
            for decision in self.decisions(rows, runner, deadline, watched):
                if (settled := decision.settled) is not None:
                    window.exits[settled.rows] = settled.exits
                    window.logits[settled.rows] = settled.logits
                    window.limited[settled.rows] = settled.limited
        finally:
            for row in filter(None, watched):
                row.lost()
        self.count_depth(window.exits)
        return window

    def rank(
        self,
        rows: Sequence[EncodedRow],
        runner: Runner[Any],
        deadline: float = math.inf,
        top_k: int | None = None,
        with_left: bool = False,
    ) -> list[Ranked]:
        """Run the documents of a query, and put them in order.

        The other arguments and the errors are those of `run`.

        Args:
            rows: the query with each of its documents.
            runner: decides which documents leave early.
            deadline: as in `run`.
            top_k: see `ranked`.
            with_left: see `ranked`.

        Raises:
            InputError: the documents have too many tokens.
        """
        self.check_query(rows)
        settled = self.run(rows, runner, deadline)
        missed = np.full(len(rows), self.clock() > deadline)
        self.count(settled, missed)
        return self.in_order(settled, runner, missed, top_k, with_left)

    def in_order(
        self,
        settled: Settled,
        runner: Runner[Any],
        missed: Mask,
        top_k: int | None,
        with_left: bool,
    ) -> list[Ranked]:
        """The documents of a query in order; the other arguments are those of `ranked`.

        Args:
            settled: as in `ranked`.
            runner: what has decided which of them left.
            missed: as in `ranked`.
            top_k: as in `ranked`.
            with_left: as in `ranked`.
        """
        left = (settled.exits < runner.exits[-1]) & ~settled.limited
        return ranked(
            settled, missed, left, self.manifest.task.activation, top_k, with_left=with_left
        )

    def with_scores(
        self, rows: Sequence[EncodedRow], scores: Sequence[float] | None
    ) -> Sequence[EncodedRow]:
        """The documents of a query with the scores of the search, which exit 0 uses.

        Args:
            rows: the query with each of its documents.
            scores: of the documents; None: they are not known. They are passed over if the model
                has no exit 0.

        Raises:
            InputError: the scores are not one finite number for each document.
        """
        if scores is None:
            return rows
        checked = checked_scores(scores, len(rows))
        if self.first_stage is None or not rows:
            return rows
        return self.first_stage.attach(rows, checked)

    def query_bytes(self, rows: Sequence[EncodedRow]) -> int:
        """Memory of the documents of a query while they run."""
        return sum(self._row_bytes(len(row)) for row in rows)

    def is_query_possible(self, rows: Sequence[EncodedRow]) -> bool:
        """Whether the documents of a query need no more memory than a query may take."""
        return self.query_bytes(rows) <= _QUERY_BYTES

    def check_query(self, rows: Sequence[EncodedRow]) -> None:
        """Refuse a query whose documents need more memory than a query may take.

        Raises:
            InputError: they have too many tokens.
        """
        if not self.is_query_possible(rows):
            tokens = sum(map(len, rows))
            raise InputError(
                f"{len(rows)} documents with their query have {tokens:,} tokens, which need more "
                f"than {_QUERY_BYTES // 2**20} MiB",
                "give fewer documents at a time, or a smaller `max_length`",
            )

    def run_encoded(self, rows: Sequence[EncodedRow], rule: ExitRule) -> Trace:
        """Run tokenized rows as one window, see `Engine.run_encoded`."""
        return self.trace(rows, self.runner(rule))

    def trace(self, rows: Sequence[EncodedRow], runner: Runner[Any]) -> Trace:
        """Run a window of rows, and keep the logits of all exits that they reach.

        Args:
            rows: as in `run`.
            runner: as in `run`; `every_exit` runs rows through all passes.

        Raises:
            FpabeeError: as in `Engine.run_encoded`.
        """
        runner.check_alone()
        first = self.exits.first
        shape = (len(runner.exits), len(rows), len(self.task.labels))
        logits = np.full(shape, np.nan, np.float32)
        exits = np.full(len(rows), first, np.int64)
        for decision in self.decisions(rows, runner):
            logits[decision.exit - first, decision.rows] = decision.logits
            if (settled := decision.settled) is not None:
                exits[settled.rows] = settled.exits
        at_exit = logits[exits - first, np.arange(len(rows))]
        lengths = np.array([len(row) for row in rows], np.intp)
        return Trace(logits, exits, self.task.outputs(at_exit).answers, lengths, first)

    def answers(self, settled: Settled, missed: Mask) -> list[Any]:
        """Count rows in the tally, and make their answers, see `Task.results`.

        Args:
            settled: the rows, each an `EncodedRow`.
            missed: `[rows]` whether the deadline was missed.
        """
        self.count(settled, missed)
        return [*self.task.results(settled, missed, self.exits)]

    def count(self, settled: Settled, missed: Mask) -> None:
        """Count rows in the tally; the arguments are those of `answers`."""
        places = settled.exits - self.exits.first
        counts = Tally(
            exits=tuple(np.bincount(places, minlength=len(self.exits.layers)).tolist()),
            truncated=sum(row.truncated for row in settled.rows.tolist()),
            deadline_limited=int(np.count_nonzero(settled.limited)),
            deadline_missed=int(np.count_nonzero(missed)),
        )
        with self._tally_lock:
            self.tally += counts

    def reset_tally(self) -> Tally:
        """Start the tally again from zero, see `Engine.reset_tally`."""
        self.backend.origin.check()
        with self._tally_lock:
            before = self.tally
            self.tally = Tally((0,) * len(self.exits))
        return before

    def time_exits(self, rows: int, tokens: int) -> list[float]:
        """Time the way from each exit to the next once, on a group of made-up rows.

        Args:
            rows: rows of the group.
            tokens: tokens in a row.

        Returns:
            Seconds for each exit. For exits from 1 this is the time of a segment, including the
            time to read the logits; for the exit at the end of an exact pass, of all segments.

        Raises:
            InputError: `rows` or `tokens` is not a whole number from 1.
            BackendError: the engine is closed, or rows of that length are too long for it.
        """
        rows = whole_number("rows", rows, InputError)
        tokens = whole_number("tokens", tokens, InputError)
        ids = np.zeros(tokens, np.int64)
        made_up = [EncodedRow(ids, ids, truncated=False)] * rows
        runner = self.every_exit
        legs = self.legs(runner)
        group = Group.of(np.arange(rows), made_up, runner, math.inf, legs)
        seconds = []
        with self.chain(runner) as chain:

            def run_to_exit(group: Group) -> None:
                for _ in range(group.legs[0].segments_to_exit(group.segment)):
                    chain.enqueue(group)
                    chain.finish()

            exits = self.exits
            after = len(exits) - len(exits.before_layers)
            ways: list[Callable[[Group], object]] = [chain.ask_exit_0]
            for way in (*ways * len(exits.before_layers), *[run_to_exit] * after):
                started = self.clock()
                way(group)
                seconds.append(self.clock() - started)
        return seconds

    def prepare(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Run groups of these rows and tokens once, and keep what was compiled for them."""
        for rows, tokens in shapes:
            self.time_exits(rows, tokens)
        self.backend.keep_compiled()

    def _runner(self, rule: ExitRule, exits: Exits | None = None) -> Runner[Any]:
        """What applies a rule; default: at the exits without a quick pass."""
        return self.task.runner(rule, (exits or self.exits.exact).numbers)

    def decisions(
        self,
        rows: Sequence[EncodedRow],
        runner: Runner[Any],
        deadline: float = math.inf,
        watched: NDArray[np.object_] | None = None,
    ) -> Iterator[Decision]:
        """Run a window of rows until the rule or the deadline has stopped all of them.

        The other arguments and the errors are those of `run`.

        Args:
            rows: the rows of the window.
            runner: their rule.
            deadline: as in `run`.
            watched: as `choose_watched` gives it; default: no row is watched.
        """
        window = Group.of(np.arange(len(rows)), rows, runner, deadline, self.legs(runner))
        if watched is not None:
            window.watched = watched
        with self.chain(runner) as chain:
            for decision in chain.run(window):
                if len(decision.failed):
                    raise not_finite(decision.target, decision.exit)
                yield decision
