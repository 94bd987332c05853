"""Quick passes of operating points: whether one may still run here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .exits import Exits, exits_of
from .manifest import Manifest
from .operating_point import OperatingPoint, QuickPass


class QuickCosts(NamedTuple):
    """The costs of rows at a point with a quick pass, where a number of layers would say little.

    Attributes:
        time_share: the time of a row on average in files, or of a query, as a share of that at full
            depth in the exact target; None: not measured.
        doubt_share: the share of rows that are in doubt at the end of the quick pass, and run all
            layers of the exact target as well.
        p99_share: see `QuickPass`.
    """

    time_share: float | None
    doubt_share: float
    p99_share: float | None

    @classmethod
    def of(
        cls, exits: Sequence[int], measured: dict[str, float], p99_share: float | None
    ) -> QuickCosts:
        """The costs of a point; the arguments are as in `OperatingPoint` and `QuickPass`."""
        in_files = next(reversed(measured.values()), None)
        time_share = None if in_files is None else 1 / in_files
        return cls(time_share, exits[-1] / sum(exits), p99_share)


def quick_of(point: OperatingPoint) -> QuickPass | None:
    """The quick pass of an operating point, or None if it runs in one target only."""
    return point.quick if isinstance(point.quick, QuickPass) else None


def exits_of_point(manifest: Manifest, point: OperatingPoint) -> Exits:
    """The exits that rows of an operating point see."""
    return exits_of(manifest, *(each.target for each in [quick_of(point)] if each is not None))


def quick_of_named(manifest: Manifest, target: str, name: str | None) -> QuickPass | None:
    """As `quick_of`, for the operating point of a target that has this name.

    A rule that is not an operating point has no name and no quick pass.
    """
    return None if name is None else quick_of(manifest.targets[target].operating_points[name])


def quick_targets(manifest: Manifest, target: str) -> set[str]:
    """The targets of the quick passes of a target's operating points: none, or one."""
    passes = map(quick_of, manifest.targets[target].operating_points.values())
    return {each.target for each in passes if each is not None}


def logits_sha256(manifest: Manifest, target: str) -> str:
    """Hash of everything that determines the logits of a target."""
    chosen = manifest.targets[target]
    graphs = manifest.graphs_of(chosen)
    content: list[Any] = [
        sorted((name, graph.sha256) for name, graph in graphs.items()),
        sorted((name, file.sha256) for name, file in chosen.files.items()),
        [list(segment.calls) for segment in manifest.segments],
        [manifest.tokenizer.sha256, manifest.tokenizer.max_length],
        sorted(chosen.versions.items()),
        manifest.exit_0 and manifest.exit_0.sha256,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def quick_problem(manifest: Manifest, quick: QuickPass) -> str:
    """Why a quick pass has lost its promise, or an empty text if it keeps it."""
    if quick.target not in manifest.targets:
        return f"its quick pass runs in target {quick.target}, which the folder does not have"
    if logits_sha256(manifest, quick.target) != quick.sha256:
        return (
            f"its quick pass runs in target {quick.target}, which was built again since the point "
            "was certified"
        )
    return ""
