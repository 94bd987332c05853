"""Metrics of a scheduler in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import Engine
from ..rules.measures import Mask
from ..rules.settling import Settled

_SECONDS = tuple(base * 10**power for power in range(-3, 2) for base in (1, 2, 5))
_ROWS = tuple(2**power for power in range(11))


class Metrics:
    """Counts what schedulers do. Their worker threads call all methods but `refused` and `text`.

    Args:
        engine: their engine. If it has an operating point, its drift is shown; if its promise is
            watched, what that has shown.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()

        def made(kind: Any, name: str, help: str, **settings: Any) -> Any:
            return kind(f"fpabee_{name}", help, registry=self._registry, **settings)

        self._rows = made(
            Counter,
            "rows",
            "Answered rows by exit; the last one is the end of the exact pass, if there is one.",
            labelnames=["exit"],
        )
        for number in engine.core.exits.numbers:
            self._rows.labels(number)
        self._limited = made(Counter, "deadline_limited_rows", "Rows stopped by a deadline.")
        self._missed = made(Counter, "deadline_missed_rows", "Rows answered after their deadline.")
        self._failed = made(Counter, "failed_rows", "Rows that got an error.")
        self._refused = made(Counter, "refused_rows", "Rows that a full queue refused.")
        self._queue = made(
            Histogram,
            "queue_seconds",
            "From arrival to the first segment, or to the answer at exit 0.",
            buckets=_SECONDS,
        )
        self._answer = made(
            Histogram, "answer_seconds", "From arrival to the answer.", buckets=_SECONDS
        )
        self._batch = made(Histogram, "batch_rows", "Rows in a run of a segment.", buckets=_ROWS)
        help = "Distance of the exits from those at calibration (total variation), from 0 to 1."
        self._drift = made(Gauge, "drift", help)
        self._registry.register(_OfWatching(engine))

    def started(self, seconds: Sequence[float]) -> None:
        """Count the seconds until the first segment of rows, or until their answer at exit 0."""
        for value in seconds:
            self._queue.observe(value)

    def ran(self, rows: int) -> None:
        """Count a run of a segment on a group of this many rows."""
        self._batch.observe(rows)

    def answered(self, settled: Settled, missed: Mask, seconds: Sequence[float]) -> None:
        """Count answers, those after their deadline, and the seconds from their arrival."""
        self._limited.inc(np.count_nonzero(settled.limited))
        self._missed.inc(np.count_nonzero(missed))
        for exit_number, value in zip(settled.exits.tolist(), seconds, strict=True):
            self._rows.labels(exit_number).inc()
            self._answer.observe(value)

    def failed(self, rows: int) -> None:
        """Count rows that got an error."""
        self._failed.inc(rows)

    def refused(self, rows: int) -> None:
        """Count rows that were not queued."""
        self._refused.inc(rows)

    def text(self) -> bytes:
        """All metrics, in Prometheus text format.

        The drift is that of the rows that have seen the exits of the operating point, see
        `Tally.drift`; it is NaN before the first of them, and without an operating point.
        """
        core = self._engine.core
        route = core.in_use
        points = self._engine.manifest.targets[self._engine.target].operating_points
        point = points.get(route.point or "")
        tally = core.tallies.of(route.exits)
        drift = float("nan")
        if point and tally.rows:
            drift = tally.drift(point.exits)
        self._drift.set(drift)
        return generate_latest(self._registry)


class _OfWatching(Collector):
    """The metrics of `Engine.watched`; none if the operating point in use is not watched."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        watched = self._engine.watched
        if watched is None:
            return
        low, high = watched.interval
        shares = {
            "estimate": watched.estimate,
            "low": low,
            "high": high,
            "permitted": watched.permitted,
        }
        labels = ("operating_point",)
        names = (watched.operating_point,)
        families = (
            (
                CounterMetricFamily,
                "fpabee_watched_rows",
                "Rows that have run to full depth to be watched.",
                watched.rows,
            ),
            (
                CounterMetricFamily,
                "fpabee_watched_changed_answers",
                "Watched rows whose answer was another one at full depth.",
                watched.changed_answers,
            ),
            (
                GaugeMetricFamily,
                "fpabee_promise_broken",
                "1 if the promise about changed answers does not hold for this traffic.",
                watched.is_broken,
            ),
        )
        for kind, name, description, value in families:
            family = kind(name, description, labels=labels)
            family.add_metric(names, value)
            yield family
        share = GaugeMetricFamily(
            "fpabee_watched_changed_share",
            "Share of changed answers: estimate, 95 % confidence sequence, and what is permitted.",
            labels=(*labels, "of"),
        )
        for of, rate in shares.items():
            share.add_metric((*names, of), rate)
        yield share
