"""Build targets by name into an engines folder. Needs no torch.

The folder stays usable at every moment: new files get names of their own, the manifest is written
when a target has passed its check, and files that no target runs any more are deleted after that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import Target, with_operating_points
from ...runtime.encoding import Text
from ...runtime.errors import ArtifactError, BackendError, FpabeeError, InputError
from ...runtime.progress import Progress, silent
from .builders import BUILDERS, Builder, Workbench
from .check import Checked, checked_target
from .default import with_fastest_default
from .plans import PlanOptions


@dataclass
class BuildResult:
    """What was built.

    Attributes:
        engines: the folder with its new manifest.
        checked: what became of each target, in the order of the names.
        default: one line that says which target is the default, and why; empty: as before.
        lost_points: names of operating points, by target, that were removed because the files of
            the target have changed.
    """

    engines: EnginesFolder
    checked: list[Checked] = field(default_factory=list)
    default: str = ""
    lost_points: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def must_have(self, precision: str) -> None:
        """Raise the first refusal if all targets in a precision were refused, or none was built.

        Raises:
            FpabeeError: why the first of them was refused.
            BackendError: this machine can build none.
        """
        asked = [one for one in self.checked if precision in one.name]
        if not asked:
            raise BackendError(
                f"this machine can build no target in {precision}",
                "fpabee-build names the targets and what each of them needs",
            )
        if all(one.refused is not None for one in asked):
            assert asked[0].refused is not None
            raise asked[0].refused

    @property
    def refused(self) -> list[Checked]:
        """The targets that the folder does not have."""
        return [one for one in self.checked if one.refused is not None]


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
        names: the targets, each a name of `BUILDERS`.
        texts: texts like those to classify. Targets are checked on them as well as on the reference
            texts of the folder, and the ranges of int8 come from some of them.
        plans: how TensorRT plans are built; None: the default shapes and GPUs.
        progress: called with (what, done, total).

    Raises:
        InputError: there is no such target, or int8 has too few texts.
        ArtifactError: the folder is missing or damaged, or cannot be written.

    Example:
        ```python
        from fpabee.exporter.targets import build_targets

        result = build_targets("engines/", ["openvino-fp32"])
        for one in result.checked:
            print(one.name, one.refused or "added")
        ```
    """
    before = EnginesFolder.read(folder)
    builders = [builder_of(name) for name in dict.fromkeys(names)]
    try:
        with tempfile.TemporaryFile(dir=before.path):  # before any slow step: it must be writable
            pass
        return _build(before, builders, texts, plans or PlanOptions(), progress)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {error.filename or before.path}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def builder_of(name: str) -> Builder:
    """What builds a target.

    Raises:
        InputError: nothing builds a target of this name.
    """
    if name not in BUILDERS:
        known = "; ".join(f"{each} ({builder.needs})" for each, builder in BUILDERS.items())
        raise InputError(f"there is no target {name!r} to build", f"choose from {known}")
    return BUILDERS[name]


def buildable(precisions: Sequence[str]) -> list[str]:
    """The names of the targets in some precisions that this machine can build.

    Args:
        precisions: such as `fp16`; int8 in all of its forms is `int8`.
    """
    return [
        name
        for name, builder in BUILDERS.items()
        if builder.precision.split("-")[0] in precisions and builder.why_not() is None
    ]


def _build(
    before: EnginesFolder,
    builders: Sequence[Builder],
    texts: Sequence[Text],
    plans: PlanOptions,
    progress: Progress,
) -> BuildResult:
    bench = Workbench(before, texts, plans, progress)
    written = before
    result = BuildResult(before)
    for builder in builders:
        try:
            written, checked = _build_one(bench, builder)
        except FpabeeError as error:
            checked = Checked(builder.name, refused=error)
        bench.engines = written
        result.checked.append(checked)
        _drop_unused_files(bench)
    targets = written.manifest.targets
    if any(one.refused is None and not targets[one.name].on_gpu for one in result.checked):
        written, result.default = with_fastest_default(written, progress)
        written.write()
    result.engines = written
    for name, target in before.manifest.targets.items():
        kept = targets[name].operating_points if name in targets else {}
        if lost := sorted(target.operating_points.keys() - kept):
            result.lost_points[name] = tuple(lost)
    return result


def _build_one(bench: Workbench, builder: Builder) -> tuple[EnginesFolder, Checked]:
    """Build a target, check it if it can run here, and write the manifest.

    Raises:
        FpabeeError: it cannot be built here, or does not give what the model gives.
    """
    if problem := builder.why_not():
        raise problem
    target = builder.build(bench)
    target = with_old_points(bench.engines.manifest.targets.get(target.name), target)
    engines, checked = checked_target(bench.engines, target, builder.judged(bench), bench.progress)
    engines.write()
    return engines, checked


def with_old_points(old: Target | None, new: Target) -> Target:
    """A new target with the operating points of the old one, if it gives the same logits."""
    if old is None or _origin(old) != _origin(new):
        return new
    return with_operating_points(new, old.operating_points, old.default_operating_point)


def _origin(target: Target) -> tuple[object, ...]:
    """What the operating points of a target depend on."""
    return target.versions, [file.sha256 for file in target.files.values()]


def _drop_unused_files(bench: Workbench) -> None:
    """Delete the files that a build has left, and that the manifest does not name."""
    named = {bench.engines.path / file for file, _ in bench.engines.hashes()}
    for place in bench.places:
        for path in (*place.glob("*.onnx"), *place.glob("*.plan")):
            if path not in named:
                path.unlink()
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
