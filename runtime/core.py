"""The core of an engine: everything between texts and answers, for the rooms of this package.

`Engine` is the face that applications see. The scheduler, calibration and benchmarks chain segments
themselves and need more than that, which may change at any time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifact.exits import Exits, exits_of
from .artifact.folder import EnginesFolder
from .artifact.quick import quick_of_named, quick_problem
from .artifact.reference import read_reference
from .backends.base import Backend
from .backends.buffers import row_bytes
from .chain.chain import Chain
from .chain.groups import Group
from .chain.route import Route
from .check import Agreement, compare, must_pass, requirements_of
from .encoding import EncodedRow, Text, TextEncoder, blocks
from .errors import (
    COPY_AGAIN,
    ArtifactError,
    FpabeeError,
    InputError,
    RuleError,
    whole_number,
)
from .exit_0 import ExitZero
from .first_run import must_check, remember
from .first_stage import FirstStage, checked_scores
from .predictions import Tallies, Tally, Trace
from .rules.measures import Integers, Mask
from .rules.rules import ExitRule
from .rules.settling import Settled
from .targets import no_promise, open_backend, rule_of
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
        rule: the rule of calls that give none.
        operating_point: its name, if it is an operating point.
        max_length: truncate texts to this many tokens, special tokens included; None: what the
            model and the target take.
        quick: runs the quick pass, for whose exits the rule then has thresholds; None: rows take
            the exact pass only.

    Attributes:
        engines: the engines folder.
        manifest: its manifest.
        task: what the logits of the model mean.
        backend: what runs the segments of the target.
        backends: what has been opened, by the name of its target.
        limits: the shapes that the target runs.
        max_length: tokens to which texts are truncated, special tokens included.
        window_bytes: memory of the rows that run at the same time, in bytes, see `windows`.
        clock: the time in seconds, by which deadlines are given.
        first_stage: exit 0 of a ranking; None: the model has none.
        full_depth: the route through the exact pass, where every row sees all exits.
        in_use: the route of calls that ask for nothing else. Another operating point is another
            route: it is swapped in one assignment, while calls run that have begun with the old
            one.
        tallies: counts of what was answered.
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
        passes = [each for each in (quick, backend) if each is not None]
        self.backends = {each.name: each for each in passes}
        self.full_depth = self.through(backend)
        self.in_use = self.through(*passes).by(rule, operating_point)
        self._routes = {operating_point: self.in_use}
        self._opening = threading.Lock()
        self.tallies = Tallies()
        self.tallies.open(self.exits)
        tokenizer = self.manifest.tokenizer
        most = min(tokenizer.max_length, self.limits.max_sequence)
        spec = msgspec.structs.replace(tokenizer, max_length=most)
        self._encoder = TextEncoder(engines.path, spec, max_length)
        self.max_length = self._encoder.limit
        self.watch: Watch | None = None

    @property
    def exits(self) -> Exits:
        """Those of the route in use."""
        return self.in_use.exits

    def through(self, *backends: Backend) -> Route:
        """The route through the targets of backends, where every row sees all exits.

        Args:
            backends: what runs the passes, in their order: that of the exact pass, perhaps after
                that of a quick pass.
        """
        *before, exact = backends
        exits = exits_of(self.manifest, *(each.name for each in before))
        by_target = {each.name: each for each in before}
        return Route.through(self.task, exits, {**by_target, "": exact})

    def route(
        self,
        point: str | None = None,
        rule: ExitRule | None = None,
        *,
        full_depth: bool = False,
        max_exit: int | None = None,
    ) -> Route:
        """How rows run; who holds a route never has to ask again.

        Args:
            point: an operating point of the target, whose quick pass is opened if it has one and
                none is open; None: the route in use.
            rule: a rule for the exact pass, in place of that of the route in use.
            full_depth: as in `Engine.predict`.
            max_exit: as in `Engine.predict`.

        Raises:
            RuleError: the target has no such point, or its quick pass cannot run here or was built
                again since the point was certified; the rule or `max_exit` does not fit; or
                `max_exit` contradicts `full_depth`.
        """
        if full_depth and max_exit is not None:
            raise RuleError(
                f"full_depth runs every layer, and max_exit {max_exit!r} stops rows before",
                "give one of `full_depth` and `max_exit`",
            )
        route = self.in_use if point is None else self._of(point)
        if rule is not None:
            route = self._by(rule)
        if full_depth:
            route = self.full_depth
        return route if max_exit is None else route.capped(max_exit)

    def _of(self, point: str) -> Route:
        """The route of an operating point, which is always the same one."""
        with self._opening:
            if point not in self._routes:
                manifest = self.manifest
                backend = self.backend
                _, rule = rule_of(manifest, backend.name, point)
                try:
                    before = open_before(self.engines, point, backend, self.backends)
                except FpabeeError as error:
                    raise no_promise(manifest, backend.name, point, error) from error
                route = self.through(*before, backend).by(rule, point)
                self.backends = self.backends | {each.name: each for each in before}
                self.tallies.open(route.exits)
                self._routes[point] = route
            return self._routes[point]

    def _by(self, rule: ExitRule) -> Route:
        """The route through the exact pass by a rule of a caller.

        Raises:
            RuleError: the rule does not fit; the message says if it fits the passes of a point.
        """
        try:
            return self.full_depth.by(rule)
        except RuleError as error:
            made_for = [str(each) for each in self._routes.values() if each.fits(rule)]
            if not made_for:
                raise
            raise RuleError(
                f"{error.message}; this rule is made for {made_for[0]}, and `rule` takes rules for "
                f"{self.full_depth}",
                "leave out `rule` to run by the engine's own rule, or give one for the exact pass",
            ) from error

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

    def check_method(self, method: str) -> None:
        """Refuse a call that belongs to another task.

        Args:
            method: the method of `Engine` that is called, or that means the same.

        Raises:
            InputError: the model is for another task.
        """
        if method != self.task.method:
            raise InputError(f"this model {self.task.does}", f"call `{self.task.method}` instead")

    def chain(self) -> Chain:
        """A chain of the segments, for code that chains segments itself, as `Scheduler` does.

        Raises:
            BackendError: the engine is closed, or this process was forked after it was loaded.
        """
        self.backend.check_open()
        return Chain(self._exit_0, self.full_depth, self.clock)

    def choose_watched(
        self, rows: int, route: Route, deadline: float = math.inf
    ) -> NDArray[np.object_]:
        """Which of some rows are watched, see `Watch.choose`.

        Args:
            rows: how many rows.
            route: theirs. Only rows of an operating point are watched.
            deadline: as in `run`. Rows with a deadline are not watched.
        """
        if self.watch is None or deadline < math.inf:
            return np.full(rows, None)
        return self.watch.choose(route.point, rows)

    def count_depth(self, exits: Integers, route: Route) -> None:
        """Count the layers of rows that were answered on a route: they pay for watching."""
        if self.watch is not None:
            self.watch.ran(exits, route.exits)

    def run(self, rows: Sequence[EncodedRow], route: Route, deadline: float = math.inf) -> Settled:
        """Run a window of rows, and keep the logits of their exits only.

        Args:
            rows: the rows of the window; in a ranking, the documents of one query.
            route: how they run.
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
        group = Group.of(np.arange(count), rows, route, deadline)
        watched = group.watched = self.choose_watched(count, route, deadline)
        try:
            with self.chain() as chain:
                for decision in chain.run(group):
                    if (settled := decision.settled) is not None:
                        window.exits[settled.rows] = settled.exits
                        window.logits[settled.rows] = settled.logits
                        window.limited[settled.rows] = settled.limited
        finally:
            for row in filter(None, watched):
                row.lost()
        self.count_depth(window.exits, route)
        return window

    def rank(
        self,
        rows: Sequence[EncodedRow],
        route: Route,
        deadline: float = math.inf,
        top_k: int | None = None,
        with_left: bool = False,
    ) -> list[Ranked]:
        """Run the documents of a query, and put them in order.

        The other arguments and the errors are those of `run`.

        Args:
            rows: the query with each of its documents.
            route: how they run.
            deadline: as in `run`.
            top_k: see `ranked`.
            with_left: see `ranked`.

        Raises:
            InputError: the documents have too many tokens.
        """
        self.check_query(rows)
        settled = self.run(rows, route, deadline)
        missed = np.full(len(rows), self.clock() > deadline)
        self.count(settled, missed, route)
        return self.in_order(settled, route, missed, top_k, with_left)

    def in_order(
        self,
        settled: Settled,
        route: Route,
        missed: Mask,
        top_k: int | None,
        with_left: bool,
    ) -> list[Ranked]:
        """The documents of a query in order; the other arguments are those of `ranked`.

        Args:
            settled: as in `ranked`.
            route: how they ran.
            missed: as in `ranked`.
            top_k: as in `ranked`.
            with_left: as in `ranked`.
        """
        left = (settled.exits < route.exits.last) & ~settled.limited
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

    def trace(self, rows: Sequence[EncodedRow], route: Route) -> Trace:
        """Run a window of rows, and keep the logits of all exits that they reach.

        Args:
            rows: as in `run`.
            route: as in `run`; `Route.whole` shows every row all exits.

        Raises:
            FpabeeError: as in `Engine.run_encoded`.
        """
        with self.chain() as chain:
            return chain.trace(rows, route)

    def stream(self, texts: Iterable[Text], route: Route) -> Iterator[Any]:
        """Answer texts in constant memory, see `Engine.stream`.

        Args:
            texts: read one window of rows ahead of the answers that are taken.
            route: how they run.

        Yields:
            The answer of each text.
        """
        for rows in self.windows(texts):
            settled = self.run(rows, route)
            yield from self.answers(settled, np.zeros(len(rows), np.bool_), route)

    def answers(self, settled: Settled, missed: Mask, route: Route) -> list[Any]:
        """Count rows in the tally, and make their answers, see `Task.results`.

        Args:
            settled: the rows, each an `EncodedRow`.
            missed: `[rows]` whether the deadline was missed.
            route: how they ran.
        """
        self.count(settled, missed, route)
        return [*self.task.results(settled, missed, route.exits)]

    def count(self, settled: Settled, missed: Mask, route: Route) -> None:
        """Count rows in the tally; the arguments are those of `answers`."""
        places = settled.exits - route.exits.first
        counts = Tally(
            exits=tuple(np.bincount(places, minlength=len(route.exits.layers)).tolist()),
            truncated=sum(row.truncated for row in settled.rows.tolist()),
            deadline_limited=int(np.count_nonzero(settled.limited)),
            deadline_missed=int(np.count_nonzero(missed)),
        )
        self.tallies.add(route.exits, counts)

    def time_exits(self, rows: int, tokens: int) -> list[float]:
        """Time the way from each exit of the route in use to the next, on a group of made-up rows.

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
        route = self.in_use.whole
        group = Group.of(np.arange(rows), made_up, route, math.inf)
        seconds = []
        with self.chain() as chain:

            def run_to_exit(group: Group) -> None:
                for _ in range(group.legs[0].segments_to_exit(group.segment)):
                    chain.enqueue(group)
                    chain.finish()

            exits = route.exits
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


def open_before(
    engines: EnginesFolder,
    point: str | None,
    backend: Backend,
    opened: Mapping[str, Backend],
    check: bool | None = None,
) -> list[Backend]:
    """What runs the passes of an operating point before its exact pass: a quick pass, or nothing.

    Args:
        engines: the engines folder.
        point: the name of the point; None: the rule is that of no point, which has no such pass.
        backend: what runs the exact pass.
        opened: what is open already, by target.
        check: as in `check_here`; the answers of a quick pass are checked as those of any target.

    Raises:
        RuleError: the point has lost its promise.
        FpabeeError: the target cannot run here.
    """
    manifest = engines.manifest
    quick = quick_of_named(manifest, backend.name, point)
    if quick is None:
        return []
    if problem := quick_problem(manifest, quick):
        raise RuleError(problem, "calibrate again")
    if quick.target in opened:
        return [opened[quick.target]]
    before = open_backend(engines, quick.target, backend.threads, backend.device)
    try:
        check_here(engines, before, check)
    except BaseException:
        before.close()
        raise
    return [before]


def check_here(
    engines: EnginesFolder, backend: Backend, check: bool | None, rule: ExitRule | None = None
) -> None:
    """Check a target if that is asked for, or if it has not been checked here yet.

    Args:
        engines: the engines folder.
        backend: runs the segments of the target.
        check: as in `Engine.load`.
        rule: as in `check_target`.

    Raises:
        FpabeeError: as in `check_target`.
    """
    kind = backend.kind_of_machine
    if check or (check is None and must_check(engines, backend.name, kind)):
        check_target(engines, backend, rule)
        remember(engines, backend.name, kind)
        backend.keep_compiled()


def check_target(
    engines: EnginesFolder, backend: Backend, rule: ExitRule | None = None
) -> Agreement:
    """Run the reference texts of a folder, and compare with the PyTorch model; see `Engine.check`.

    Args:
        engines: the engines folder.
        backend: runs the segments of the target.
        rule: a rule for the exact pass whose exits are compared; None: all rows run all layers.

    Raises:
        ArtifactError: the reference is missing or damaged, or no text of it fits the target.
        CheckError: the target is not the model that was exported.
    """
    backend.check_open()
    manifest = engines.manifest
    exits = exits_of(manifest)
    route = Route.through(task_of(manifest.task), exits, {"": backend})
    required = requirements_of(backend.name, manifest)
    texts, expected = read_reference(engines)
    # Not the encoder of an engine, which may truncate to fewer tokens than the reference.
    most = backend.limits().max_sequence
    rows = TextEncoder(engines.path, manifest.tokenizer).encode(texts)
    fits = [n for n, row in enumerate(rows) if len(row) <= most]
    if not fits:
        raise ArtifactError(
            f"no text of the reference fits the {most} tokens of {backend.name}",
            "export the model again with shorter `texts`",
        )
    with Chain(FirstStage.load(engines) or ExitZero.load(engines)) as chain:
        logits = chain.trace([rows[n] for n in fits], route).logits
    agreement = compare(
        logits, expected[:, fits], rule or route.rule, route.task, required, exits.first
    )
    what = f"target {backend.name} is not the model that was exported,"
    hint = "if it is accepted elsewhere, this machine computes otherwise: choose another `target`"
    must_pass(agreement, what, f"{COPY_AGAIN}; {hint}")
    return agreement
