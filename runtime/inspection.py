"""The targets of an engines folder, and whether its files are intact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from .artifact.folder import resolve, verified, verified_graph
from .artifact.manifest import Manifest
from .engine import Engine
from .errors import ArtifactError, FpabeeError
from .targets import backend_class


class TargetState(msgspec.Struct, frozen=True):
    """One target of a folder.

    Attributes:
        name: the target.
        size: bytes of its files, or of the graphs that it runs.
        unavailable_reason: why it cannot run here; empty if it can.
    """

    name: str
    size: int
    unavailable_reason: str


class Integrity(msgspec.Struct, frozen=True):
    """The result of checking a folder.

    Attributes:
        files: how many files the manifest names.
        damaged: a message for each file that is missing or has another hash.
        agreement: for each target that passed, how closely it agrees with the PyTorch model.
        refused: for each target that can run here but did not pass, the reason.
    """

    files: int
    damaged: tuple[str, ...]
    agreement: dict[str, str]
    refused: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether nothing is damaged and no target is refused."""
        return not self.damaged and not self.refused


def target_states(
    folder: Path, manifest: Manifest, describe: Callable[[FpabeeError], str] = str
) -> list[TargetState]:
    """The targets of a folder, and whether each can run here.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        describe: how to write the error that explains why a target cannot run here.
    """
    states = []
    for name, target in manifest.targets.items():
        graphs = target.files or manifest.graphs_of(target)
        files = [graph.file for graph in graphs.values()]
        size, unavailable_reason = 0, ""
        try:
            for file in files:
                size += resolve(folder, file).stat().st_size
            backend_class(target).check(target, name)
        except FpabeeError as error:
            unavailable_reason = describe(error)
        states.append(TargetState(name, size, unavailable_reason))
    return states


def check_integrity(folder: Path, manifest: Manifest, states: Iterable[TargetState]) -> Integrity:
    """Compare every hash, and run the reference texts on every target that can run here.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        states: the result of `target_states`.
    """
    records = dict.fromkeys(_records(folder, manifest))
    damaged = []
    for file, sha256 in records:
        try:
            (verified_graph if file.endswith(".onnx") else verified)(folder, file, sha256)
        except ArtifactError as error:
            damaged.append(error.message)
    agreement, refused = dict[str, str](), dict[str, str]()
    for state in states:
        if state.unavailable_reason:
            continue
        try:
            with Engine.load(folder, state.name) as engine:
                agreement[state.name] = str(engine.check())
        except FpabeeError as error:
            refused[state.name] = error.message
    return Integrity(len(records), tuple(damaged), agreement, refused)


def _records(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file that the folder must have, with its hash."""
    yield manifest.tokenizer.file, manifest.tokenizer.sha256
    for graphs in (manifest.graphs, *manifest.precisions.values()):
        yield from ((graph.file, graph.sha256) for graph in graphs.values())
    for target in manifest.targets.values():
        yield from ((file.file, file.sha256) for file in target.files.values())
    if manifest.exit_0 is not None:
        yield manifest.exit_0.file, manifest.exit_0.sha256
    yield from manifest.files.items()
