"""What a case of the tables is, and what its command may leave: one line, and nothing else."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import MANIFEST_NAME

COMMANDS = {
    "run": "fpabee.runtime.cli.run",
    "inspect": "fpabee.runtime.cli.inspect",
    "calibrate": "fpabee.calibration.cli",
    "export": "fpabee.exporter.cli.export",
    "bench": "fpabee.exporter.cli.bench",
    "fpabee": "fpabee.__main__",
}


class Place:
    """A folder of the case's own, and copies of what is shared in it, made when asked for."""

    def __init__(
        self,
        root: Path,
        models: Mapping[str, Path],
        engines: Mapping[str, Path],
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.root = root
        self.patch = patch
        self.stdin = b""
        self._models = models
        self._engines = engines

    def model(self, family: str = "bert") -> Path:
        """A copy of a tiny model."""
        return Path(shutil.copytree(self._models[family], self.root / f"model-{family}"))

    def engines(self, family: str = "bert") -> Path:
        """A copy of its engines folder."""
        return Path(shutil.copytree(self._engines[family], self.root / f"engines-{family}"))

    def shared_model(self, family: str = "bert") -> Path:
        """The model itself, for cases that do not touch it."""
        return self._models[family]

    def shared_engines(self, family: str = "bert") -> Path:
        """The engines folder itself, for cases that do not touch it."""
        return self._engines[family]

    def file(self, name: str, content: bytes | str) -> Path:
        """A file."""
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def texts(self) -> Path:
        """A good input."""
        return self.file("texts.txt", "the film is not bad\nrain\n")


Arguments = Sequence[object]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: what is wrong.
        make: makes it, and gives the arguments of the command.
        says: what the line must contain.
        command: which command, see `COMMANDS`.
        code: its exit code: 1 for bad input, 2 for usage.
    """

    name: str
    make: Callable[[Place], Arguments]
    says: tuple[str, ...]
    command: str = "run"
    code: int = 1


def no_space(what: str, make: Callable[[Place], Arguments]) -> Callable[[Place], Arguments]:
    """As if the disk were full for a function, named by its path."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def case(place: Place) -> Arguments:
        arguments = make(place)
        place.patch.setattr(what, full)
        return arguments

    return case


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


def run(
    command: str, arguments: Arguments, place: Place, capfd: pytest.CaptureFixture[str]
) -> Outcome:
    """Run a command in this process; its output is taken at the file descriptors."""
    main = importlib.import_module(COMMANDS[command]).main
    assert isinstance(main, click.Command)
    place.patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(place.stdin)))
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return Outcome(int(caught.value.code or 0), *capfd.readouterr())


def check(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a case: its exit code, one line, nothing on stdout, nothing half written."""
    arguments = case.make(place)
    before = contents(place.root)
    outcome = run(case.command, arguments, place, capfd)
    place.patch.undo()
    assert outcome.out == ""
    check_line(outcome.err, case.says)
    assert outcome.code == case.code
    assert contents(place.root) == before


def check_line(err: str, says: Sequence[str]) -> None:
    """One line that can be printed and says what is wrong and what to do."""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    message, _, hint = lines[0].partition(" -> ")
    assert message
    assert hint.strip(), "it does not say what to do"
    assert len(lines[0]) < 1000
    assert lines[0].isprintable()
    for part in says:
        assert part in lines[0], lines[0]


def contents(root: Path) -> dict[str, str | None]:
    """Every file with its hash, and every folder and link."""
    return {
        str(path.relative_to(root)): sha256_of(path) if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_manifest(folder: Path, change: Callable[[Any], object]) -> Path:
    """Change the manifest of an engines folder."""
    change_json(folder / MANIFEST_NAME, change)
    return folder


def changed_heads(folder: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """Change the weights of a segment's head, and correct the hash."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(folder / file)
    for tensor in proto.graph.initializer:
        if "classifier" in tensor.name:
            values = change(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, folder / file)
    return corrected(folder, file)


def corrected(folder: Path, file: str) -> Path:
    """Write the hash of a file as it is now into the manifest, as its maker would."""
    digest = sha256_of(folder / file)

    def correct(manifest: Any) -> None:
        for record in (manifest["tokenizer"], *manifest["graphs"].values()):
            if record["file"] == file:
                record["sha256"] = digest
        if file in manifest["files"]:
            manifest["files"][file] = digest

    return change_manifest(folder, correct)
