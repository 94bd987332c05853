"""Build targets by name into an engines folder. Needs no torch.

The folder stays usable at every moment: new files get names of their own, the manifest is written
when a target has passed its check, and files that no target runs any more are deleted at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import Manifest, with_operating_points
from ...runtime.check import Agreement
from ...runtime.encoding import Text
from ...runtime.errors import ArtifactError, FpabeeError
from ...runtime.targets import why_not
from ..staging import locked
from .builders import Builder, Workbench, builder_of, check_enough_texts
from .check import checked_target
from .default import with_fastest_default
from .plans import PlanOptions


@dataclass
class BuildResult:
    """The result of a build.

    Attributes:
        manifest: of the folder, with the new targets.
        added: how each new target agrees with the PyTorch model, by its name; None: it cannot run
            on this machine.
        refused: why the folder does not have a target that was asked for, by its name.
        default: one line that says which target is the default, and why; empty: as before.
        lost_points: names of operating points, by target, that were removed because what the target
            runs has changed.
    """

    manifest: Manifest
    added: dict[str, Agreement | None] = field(default_factory=dict)
    refused: dict[str, FpabeeError] = field(default_factory=dict)
    default: str = ""
    lost_points: dict[str, tuple[str, ...]] = field(default_factory=dict)


def build_targets(
    folder: str | Path,
    names: Sequence[str],
    texts: Sequence[Text] = (),
    plans: PlanOptions | None = None,
    progress: Progress = silent,
) -> BuildResult:
    """Build targets into an engines folder.

    A target that fails leaves the folder as it was, and the others are built all the same.

    Args:
        folder: the engines folder.
        names: the targets, such as `openvino-int8`. An unknown name is refused with a list of
            those that this machine can build.
        texts: texts like those to classify. Targets are checked on them as well as on the reference
            texts of the folder, and the ranges of int8 come from some of them.
        plans: how TensorRT plans are built; None: the default shapes and GPUs.
        progress: called with (what, done, total).

    Raises:
        InputError: there is no such target, or int8 has too few texts.
        ArtifactError: the folder is missing or damaged, cannot be written, or another process is
            building targets into it.

    Example:
        ```python
        from fpabee.exporter.targets import build_targets

        result = build_targets("engines/", ["openvino-fp32"])
        print(list(result.added), result.refused)
        ```
    """
    path = Path(folder)
    builders = [builder_of(name) for name in dict.fromkeys(names)]
    try:
        with _alone(path):
            before = EnginesFolder.read(path)
            if any(builder.quantizes(before, texts) for builder in builders):
                check_enough_texts(len(texts))
            with tempfile.TemporaryFile(dir=path):  # before any slow step: it must be writable
                pass
            bench = Workbench(before, texts, plans or PlanOptions(), progress)
            return _build(bench, builders)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {error.filename or path}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other builds away from a folder.

    Raises:
        ArtifactError: another process is building into it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError as error:
            raise ArtifactError(
                f"another process is building targets into {path}", "wait until it has ended"
            ) from error
        except OSError:
            pass  # Some network drives cannot lock folders. One build at a time works there, too.
        yield


def _build(bench: Workbench, builders: Sequence[Builder]) -> BuildResult:
    before = bench.engines.manifest
    result = BuildResult(before)
    try:
        for builder in builders:
            try:
                name, agreement = _add(bench, builder)
            except FpabeeError as error:
                result.refused[builder.name] = error
            else:
                result.added[name] = agreement
    finally:
        bench.drop_unused_files()
    targets = bench.engines.manifest.targets
    if any(not targets[name].on_gpu for name in result.added):
        bench.engines, result.default = with_fastest_default(bench.engines, bench.progress)
        bench.engines.write()
    result.manifest = bench.engines.manifest
    for name, target in before.targets.items():
        kept = targets[name].operating_points if name in targets else {}
        if lost := sorted(target.operating_points.keys() - kept):
            result.lost_points[name] = tuple(lost)
    return result


def _add(bench: Workbench, builder: Builder) -> tuple[str, Agreement | None]:
    """Build a target, check it if it can run here, and write the manifest.

    Raises:
        FpabeeError: it cannot be built here, or does not give what the model gives.
    """
    if problem := builder.why_not():
        raise problem
    engines, target = builder.build(bench)
    name = target.name
    engines = engines.with_target(name, target)
    agreement = None
    if why_not(engines.manifest, name) is None:
        more = builder.more_texts(bench)
        engines, agreement = checked_target(engines, name, more, bench.progress)
    engines = _with_old_points(bench.engines, engines, name)
    engines.write()
    bench.engines = engines
    return name, agreement


def _with_old_points(before: EnginesFolder, after: EnginesFolder, name: str) -> EnginesFolder:
    """A folder whose new target keeps its operating points if it runs the same files."""
    old = before.manifest.targets.get(name)
    new = after.manifest.targets[name]
    if old is None or old.versions != new.versions:
        return after
    # Of the target alone: its points may name the target of a quick pass.
    bare = before.with_target(name, with_operating_points(old, {}, ""))
    if bare.hashes(name) != after.hashes(name):
        return after
    points = old.operating_points
    return after.with_target(name, with_operating_points(new, points, old.default_operating_point))
