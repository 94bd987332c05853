"""Engines folders whose operating points promise something about changed answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from fpabee.runtime import (
    Certificate,
    Confidence,
    Engine,
    ExitRule,
    Prediction,
    Promise,
    read_manifest,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import with_operating_points
from fpabee.runtime.watch import Watched

EARLY = Confidence(threshold=0.3)  # many rows stop at exit 1, and some of them change


def promising(
    folder: Path,
    set_points: Callable[..., None],
    at_most: float = 1.0,
    of: str = "changed_answers",
    full_depth_changes: float = 0.0,
    target: str = "",
    **rules: ExitRule,
) -> Path:
    """Gives a folder operating points with this promise; the first one is the default."""
    set_points(folder, target=target, default=next(iter(rules)), **rules)
    promise = Promise(of=of, at_most=at_most, rows=300)
    certificate = Certificate(
        confidence=95.0, promises=(promise,), full_depth_changes=full_depth_changes
    )
    certify(folder, target, **dict.fromkeys(rules, certificate))
    return folder


def certify(folder: Path, target: str = "", **certificates: Certificate | None) -> None:
    """Replaces the certificates of a target's operating points, which are given by name."""
    manifest = read_manifest(folder)
    name = target or manifest.default_target
    before = manifest.targets[name]
    points = {
        point: replace(each, certificate=certificates.get(point, each.certificate))
        for point, each in before.operating_points.items()
    }
    changed = with_operating_points(before, points, before.default_operating_point)
    EnginesFolder(folder, manifest).with_target(name, changed).write()


def watched_by(engine: Engine) -> Watched:
    """What an engine has seen of the promise of its operating point."""
    watched = engine.watched
    assert watched is not None
    return watched


def count_changes(answers: Sequence[Prediction], full_depth: Sequence[Prediction]) -> int:
    """How many answers have other labels than those at full depth."""
    pairs = zip(answers, full_depth, strict=True)
    return sum(answer.labels != late.labels for answer, late in pairs)
