"""All that a report says, as plain records: nothing here draws or formats."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import Manifest
from ...runtime.environment import environment
from ...runtime.progress import Progress
from ...runtime.rules.measures import Measure
from ...runtime.rules.rules import ExitRule
from ..choose import PARTS
from ..descriptions import rule_in_words
from ..outcome import Outcome
from ..result import Calibration, Point, RuleComparison
from ..scoring import Scorer
from ..trace import data_sha256
from .exits import Bin, ExitScore, SegmentTime, exit_scores, reliability, segment_times
from .fronts import (
    Cell,
    FrontSetting,
    compared_measure,
    measure_fronts,
    patience_grid,
    rule_fronts,
)
from .texts import TextRow, text_rows

Record = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        result: the calibration.
        manifest: of the engines folder.
        made: when, in UTC.
        environment: versions and devices.
        fronts: of every kind of rule.
        measures: of every similarity measure.
        measure: that of the heat map.
        cells: of the heat map.
        exit_scores: each exit by itself.
        bins: of the reliability diagrams; none without labels.
        segments: measured times.
        rows: texts and answers.
        with_texts: whether the rows have their texts.
    """

    result: Calibration
    manifest: Manifest
    made: datetime
    environment: dict[str, str]
    fronts: list[FrontSetting]
    measures: list[FrontSetting]
    measure: Measure
    cells: list[Cell]
    exit_scores: list[ExitScore]
    bins: list[Bin]
    segments: list[SegmentTime]
    rows: list[TextRow]
    with_texts: bool

    @property
    def metric(self) -> str:
        """Name of the score."""
        return self.result.selector.stopping_costs.scorer.metric

    @cached_property
    def full_depth(self) -> float:
        """The score at full depth of the rows that the curves are judged on."""
        test = self.result.test
        own = self.result.selector.stopping_costs.scorer
        return own.full_depth if test is None else Scorer(test, self.metric).full_depth


def gather(result: Calibration, texts: bool, progress: Progress) -> Report:
    """Compute what a report says.

    Args:
        result: the calibration.
        texts: whether to keep the texts of the rows.
        progress: called with (what, done, total).

    Raises:
        ArtifactError: the engines folder is gone or damaged.
    """
    manifest = read_manifest(result.folder)
    bins = reliability(result)
    measure = compared_measure(result)
    return Report(
        result=result,
        manifest=manifest,
        made=datetime.now(timezone.utc),
        environment=environment(),
        fronts=rule_fronts(result, progress),
        measures=measure_fronts(result, progress),
        measure=measure,
        cells=patience_grid(result, measure),
        exit_scores=exit_scores(result, bins),
        bins=bins,
        segments=segment_times(result),
        rows=text_rows(result, manifest.task.labels, texts),
        with_texts=texts,
    )


def summary(report: Report) -> Record:
    """What was calibrated, on what, with what."""
    result, manifest = report.result, report.manifest
    target = manifest.targets[result.target]
    label_thresholds = result.label_thresholds
    return {
        "made": report.made.isoformat(timespec="seconds"),
        "target": result.target,
        "backend": target.backend,
        "precision": target.precision,
        "batch_sizes": [model.batch for model in result.costs],
        "model_type": manifest.model.model_type,
        "layers": result.layers[-1],
        "exit_layers": list(result.layers),
        "problem_type": manifest.task.problem_type.value,
        "labels": list(manifest.task.labels),
        "metric": report.metric,
        "full_depth_score": report.full_depth,
        "rows": len(result.rows),
        "labelled": result.rows.expected is not None,
        "held_out": result.held_out,
        "curves_held_out": result.held_out if result.test else f"{PARTS}-fold cross-fitting",
        "held_out_rows": result.points[0].held_out.rows,
        "data_sha256": data_sha256(result.texts),
        "default": result.default,
        "cuts": None if label_thresholds is None else label_thresholds.to_dict(),
        "environment": report.environment,
        "target_versions": target.versions,
    }


def tables(report: Report) -> dict[str, list[Record]]:
    """Every table of the report by name: rows of the same columns."""
    result = report.result
    return {
        "points": [_point(point, result.default) for point in result.points],
        "contenders": [_contender(comparison) for comparison in result.comparisons],
        "fronts": [_front(setting, "kind") for setting in report.fronts],
        "measures": [_front(setting, "measure") for setting in report.measures],
        "depths": [
            {"point": point.name, "exit": number, "layer": layer, "rows": rows}
            for point in result.points
            for number, (layer, rows) in enumerate(
                zip(result.layers, point.held_out.exits, strict=True), start=1
            )
        ],
        "exits": [dataclasses.asdict(score) for score in report.exit_scores],
        "reliability": [dataclasses.asdict(bin) for bin in report.bins],
        "patience": [
            {"measure": report.measure.value, **dataclasses.asdict(cell)} for cell in report.cells
        ],
        "segments": [dataclasses.asdict(segment) for segment in report.segments],
        "rows": [_row(row, report.with_texts) for row in report.rows],
    }


def _rule(rule: ExitRule) -> Record:
    return {"rule": rule_in_words(rule), "settings": json.dumps(rule.to_dict())}


def _outcome(outcome: Outcome) -> Record:
    return {
        "metric": outcome.metric,
        "score": outcome.score,
        "full_depth_score": outcome.full_depth_score,
        "drop": outcome.drop,
        "drop_low": outcome.interval[0],
        "drop_high": outcome.interval[1],
        "mean_depth": outcome.mean_depth,
        "theoretical_speedup": outcome.theoretical,
        "estimated_speedup": outcome.estimated,
        "rows": outcome.rows,
    }


def _point(point: Point, default: str) -> Record:
    certificate = point.certificate
    tested = None if certificate is None else f"{point.goal}, tested on {certificate.rows} rows"
    return {
        "name": point.name,
        "default": point.name == default,
        "wish": str(point.goal),
        "kind": point.kind,
        **_rule(point.rule),
        **_outcome(point.held_out),
        **{f"measured_speedup_batch_{size}": ratio for size, ratio in point.measured.items()},
        "chosen_on_drop": point.chosen_on.drop,
        "chosen_on_rows": point.chosen_on.rows,
        "optimism": point.optimism,
        "certificate": tested,
    }


def _contender(comparison: RuleComparison) -> Record:
    return {"kind": comparison.kind, **_rule(comparison.rule), **_outcome(comparison.held_out)}


def _front(setting: FrontSetting, curve: str) -> Record:
    return {
        curve: setting.curve,
        "wished_speedup": setting.wished,
        **_rule(setting.rule),
        "estimated_speedup": setting.speedup,
        "drop": setting.drop,
        "mean_depth": setting.mean_depth,
        "chosen_on_speedup": setting.chosen_speedup,
        "chosen_on_drop": setting.chosen_drop,
    }


def _row(row: TextRow, texts: bool) -> Record:
    record: Record = {"line": row.line}
    if texts:
        record |= {"text": row.text, "text_pair": row.text_pair}
    record |= {"labels": row.labels}
    for number, answer in enumerate(row.answers, start=1):
        record[f"answer_exit_{number}"] = answer
    record["full_depth_probability"] = row.probability
    return record | {f"exit_{name}": number for name, number in row.exits.items()}
