"""The model of an engines folder, opened on one target: and what runs its segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact.manifest import NEXT, Manifest
from .backends.backend import Backend
from .backends.buffers import nbytes_of
from .backends.shapes import Bucket, Limits
from .chain import Chain, WindowResult
from .encoding import EncodedRow
from .errors import BackendError
from .exit_0 import ExitZero
from .rules.rules import ExitRule
from .rules.runner import RuleRunner

# Most memory of a window: the hidden states of all its rows, once as input and once as output.
_WINDOW_BYTES = 256 * 2**20


class Model:
    """What `Engine` and `Scheduler` run rows on. Thread-safe.

    Attributes:
        manifest: the manifest of the folder.
        target: the target in use.
        limits: the shapes that the target runs.
        window_tokens: most tokens of rows whose hidden states are in memory at a time.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend[Any]) -> None:
        """Read exit 0.

        Args:
            folder: the engines folder.
            manifest: its manifest.
            backend: what runs the segments on the target it was opened for; `close` closes it.

        Raises:
            ArtifactError: the file of exit 0 is missing or damaged, or does not fit the model.
        """
        self.manifest = manifest
        self.target = backend.name
        self.limits = backend.limits()
        per_token = _bytes_per_token(manifest, self.limits)
        self.window_tokens = max(self.limits.group_tokens, _WINDOW_BYTES // per_token)
        self._backend = backend
        self._exit_0 = ExitZero.load(folder, manifest)
        self._closed = False

    def runner(self, rule: ExitRule) -> RuleRunner:
        """A runner of a rule.

        Raises:
            RuleError: the rule does not fit the model.
        """
        task = self.manifest.task
        return RuleRunner(rule, task.problem_type, self.manifest.exits, task.label_thresholds)

    def chain(self) -> Chain[Any]:
        """A chain for one call; its execution comes from the backend's pool.

        Raises:
            BackendError: the model is closed.
        """
        if self._closed:
            raise BackendError("this engine is closed", "load it again with Engine.load")
        return Chain(self._backend, self.limits, self._exit_0)

    def run(
        self, rows: Sequence[EncodedRow], runner: RuleRunner, deadline: float = math.inf
    ) -> WindowResult:
        """Run a window of rows until all of them have stopped; see `Chain.run`."""
        with self.chain() as chain:
            return chain.run(rows, runner, deadline)

    def close(self) -> None:
        """Free the segments; calls that have begun are answered, and the last of them frees."""
        self._closed = True
        self._backend.close()


def _bytes_per_token(manifest: Manifest, limits: Limits) -> int:
    """Memory in bytes that each token of a window takes between segments.

    Each tensor that segment 1 passes on counts twice: as an input and as an output of a segment.
    The rows are assumed to be the longest ones, because a position bias takes most memory there.
    """
    sequence = limits.max_sequence
    bucket = Bucket(max(1, limits.group_tokens // sequence), sequence)
    total = 0
    for name in manifest.segments[0].calls:
        for spec in manifest.graphs[name].outputs:
            if spec.name.startswith(NEXT):
                total += nbytes_of(spec, bucket)
    return max(1, 2 * total // (bucket.batch * sequence))
