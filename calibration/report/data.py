"""Everything that a report says, as plain records; nothing here draws or formats."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import Manifest
from ...runtime.environment import environment
from ...runtime.progress import Progress
from ...runtime.rules.base import ExitRule
from ..descriptions import promise_in_words, rule_in_words
from ..result import Calibration, Point, RuleComparison
from ..scoring import Scorer
from .exits import Bin, ExitScore, exit_scores, reliability
from .fronts import FrontSetting, rule_fronts
from .texts import TextRow, text_rows

Record = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        result: the calibration.
        manifest: the manifest of the engines folder.
        made: when the report was made, in UTC.
        environment: versions and devices.
        fronts: the curve of each rule that matters.
        bins: the reliability diagrams; empty without labels.
        exit_scores: each exit on its own.
        rows: texts and answers.
        with_texts: whether the rows have their texts.
    """

    result: Calibration
    manifest: Manifest
    made: datetime
    environment: dict[str, str]
    fronts: list[FrontSetting]
    bins: list[Bin]
    exit_scores: list[ExitScore]
    rows: list[TextRow]
    with_texts: bool

    @property
    def metric(self) -> str:
        """Name of the score."""
        return self.result.selector.stopping_costs.scorer.metric

    @property
    def full_depth(self) -> float:
        """The score at full depth of the rows that the curves are judged on."""
        test, scorer = self.result.test, self.result.selector.stopping_costs.scorer
        return scorer.full_depth if test is None else Scorer(test, self.metric).full_depth


def gather(result: Calibration, texts: bool, progress: Progress) -> Report:
    """Compute what a report says.

    Args:
        result: the calibration.
        texts: whether to keep the texts of the rows.
        progress: called with (what, done, total).

    Raises:
        ArtifactError: the engines folder is missing or damaged.
    """
    manifest, bins = read_manifest(result.folder), reliability(result)
    return Report(
        result=result,
        manifest=manifest,
        made=datetime.now(timezone.utc),
        environment=environment(),
        fronts=rule_fronts(result, progress),
        bins=bins,
        exit_scores=exit_scores(result, bins),
        rows=text_rows(result, manifest.task.labels, texts),
        with_texts=texts,
    )


def summary(report: Report) -> Record:
    """What was calibrated, on which rows, and with which versions."""
    result, manifest = report.result, report.manifest
    target = manifest.targets[result.target]
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
        "held_out_rows": result.points[0].held_out.rows,
        "default": result.default,
        "environment": report.environment,
        "target_versions": target.versions,
    }


def tables(report: Report) -> dict[str, list[Record]]:
    """Every table of the report by name; the records of a table have the same keys."""
    result = report.result
    return {
        "points": [_point(point, result) for point in result.points],
        "contenders": [
            _judged(one) | {"chosen_on_mean_depth": one.chosen_on.mean_depth}
            for one in result.comparisons
        ],
        "fronts": [_front(setting) for setting in report.fronts],
        "depths": [
            {"point": point.name, "exit": number, "layer": layer, "rows": rows}
            for point in result.points
            for number, layer, rows in zip(
                result.rows.exits, result.layers, point.chosen_on.exits, strict=True
            )
        ],
        "exits": [dataclasses.asdict(score) for score in report.exit_scores],
        "reliability": [dataclasses.asdict(bin) for bin in report.bins],
        "rows": [_row(row, report.with_texts) for row in report.rows],
    }


def _rule(rule: ExitRule) -> Record:
    return {"rule": rule_in_words(rule), "settings": json.dumps(rule.to_dict())}


def _judged(found: Point | RuleComparison) -> Record:
    outcome = found.held_out
    return {
        "kind": found.kind,
        **_rule(found.rule),
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
        "exit_0_changed": outcome.exit_0_changed,
    }


def _point(point: Point, result: Calibration) -> Record:
    certificate = point.certificate
    tested = None if certificate is None else f"{point.goal}, tested on {certificate.rows} rows"
    return {
        "name": point.name,
        "default": point.name == result.default,
        "wish": str(point.goal),
        **_judged(point),
        **{f"measured_speedup_batch_{size}": ratio for size, ratio in point.measured.items()},
        "promise": promise_in_words(point, result),
        "chosen_on_drop": point.chosen_on.drop,
        "chosen_on_mean_depth": point.chosen_on.mean_depth,
        "chosen_on_rows": point.chosen_on.rows,
        "optimism": point.optimism,
        "certificate": tested,
    }


def _front(setting: FrontSetting) -> Record:
    return {
        "kind": setting.curve,
        **_rule(setting.rule),
        "estimated_speedup": setting.estimated_speedup,
        "drop": setting.drop,
        "mean_depth": setting.mean_depth,
    }


def _row(row: TextRow, texts: bool) -> Record:
    record: Record = {"line": row.line}
    if texts:
        record |= {"text": row.text, "text_pair": row.text_pair}
    record |= {"labels": row.labels}
    for number, answer in row.answers.items():
        record[f"answer_exit_{number}"] = answer
    return record | {f"exit_{name}": number for name, number in row.exits.items()}
