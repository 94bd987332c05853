"""A case of bad input, and what its command may leave behind: one line, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import numpy as np
import pytest

from fpabee import commands as fpabee
from fpabee.commands import build, calibrate, convert, export, inspect, pack, run, serve, train
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import MANIFEST_NAME

from ..runtime import running
from ..runtime.running import Result

COMMANDS: dict[str, click.Command] = {
    "run": run.main,
    "inspect": inspect.main,
    "serve": serve.main,
    "calibrate": calibrate.main,
    "export": export.main,
    "build": build.main,
    "convert": convert.main,
    "train": train.main,
    "pack": pack.main,
    "fpabee": fpabee.main,
}
OPTIONS = {
    name for command in COMMANDS.values() for option in command.params for name in option.opts
} | {"--help"}
QUIET = ("--threads", 1, "--quiet")

Arguments = Sequence[object]
Change = Callable[[Path], object]
Make = Callable[["Place"], Arguments]


@dataclass
class Place:
    """A folder of the case's own, and the models and engines folders that all cases share."""

    root: Path
    models: Mapping[str, Path]
    shared: Mapping[str, Path]
    rankers: Mapping[str, Path]
    patch: pytest.MonkeyPatch
    stdin: bytes = field(default=b"")

    def model(self, change: Change) -> Path:
        """A copy of a tiny model, changed."""
        folder = Path(shutil.copytree(self.models["bert"], self.root / "model"))
        change(folder)
        return folder

    def engines(self, change: Change = lambda _: None) -> Path:
        """A copy of an engines folder, changed."""
        folder = Path(shutil.copytree(self.shared["bert"], self.root / "engines"))
        change(folder)
        return folder

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, source: object, *options: object, folder: Path | None = None) -> Arguments:
        """The arguments that classify a file of texts."""
        return ["run", folder or self.shared["bert"], "--input", source, *QUIET, *options]

    def run_texts(self, *options: object, folder: Path | None = None) -> Arguments:
        """The arguments that classify good texts."""
        return self.run(self.file("texts.txt", "rain\n"), *options, folder=folder)

    def export(self, model: object, *options: object) -> Arguments:
        return ["export", model, "-o", self.root / "out", "--quiet", *options]


class Case:
    """Something bad, the command that must refuse it, and what its message must name.

    Args:
        name: what is bad.
        make: makes it; returns the command, see `COMMANDS`, and its arguments.
        *facts: names and numbers that the message contains; its wording is free.
        code: the exit code: 1 for bad input, 2 for wrong usage.
    """

    def __init__(self, name: str, make: Make, *facts: str, code: int = 1) -> None:
        self.name = name
        self.make = make
        self.facts = facts
        self.code = code


def each(*tables: Sequence[Case]) -> pytest.MarkDecorator:
    """Runs a test for each case."""
    cases = [case for table in tables for case in table]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def execute(arguments: Arguments, place: Place, capfd: pytest.CaptureFixture[str]) -> Result:
    """Run a command in this process; its output is captured at the file descriptors."""
    main = COMMANDS[str(arguments[0])]
    place.patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(place.stdin)))
    capfd.readouterr()
    return running.execute(main, capfd, arguments[1:])


def check(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """The exit code is right, one line says why, stdout is empty, and no file has changed."""
    arguments = case.make(place)
    before = contents(place.root)
    outcome = execute(arguments, place, capfd)
    place.patch.undo()
    assert outcome.out == ""
    assert outcome.code == case.code, outcome.err
    check_message(outcome.err, case, place)
    assert contents(place.root) == before


def check_message(err: str, case: Case, place: Place) -> None:
    """A message is one printable line that says what to do, with options that exist."""
    assert err.count("\n") == 1, err
    line = err.removesuffix("\n")
    message, _, hint = line.partition(" -> ")
    assert message.startswith("error: ")
    assert hint.strip(), "it does not say what to do"
    assert line.isprintable()
    assert len(line) < 1000
    options = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", line)) - set(case.facts)
    assert options <= OPTIONS, "it names an option that no command has"
    for fact in case.facts:
        assert without_root(fact, place) in without_root(line, place), err


def without_root(text: str, place: Place) -> str:
    """A text without the names of temporary folders, whose numbers are not facts of a message."""
    for folder in (place.root, place.root.parent):
        text = text.replace(str(folder), "")
    return text


def contents(root: Path) -> dict[str, str | None]:
    """Every file with its hash, and every folder and link."""
    return {
        str(path.relative_to(root)): sha256_of(path) if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def no_space(place: Place, what: str) -> None:
    """Let a function, named by its path, fail as on a full disk."""

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place.patch.setattr(what, Mock(side_effect=full))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_config(folder: Path, **changes: Any) -> None:
    """Change settings of a model."""
    change_json(folder / "config.json", lambda config: config.update(changes))


def manifest(change: Callable[[Any], object]) -> Change:
    """Changes the manifest of an engines folder."""
    return lambda folder: change_json(folder / MANIFEST_NAME, change)


def corrected(file: str, change: Change) -> Change:
    """Changes a file of an engines folder and corrects its hash, as its maker would."""

    def apply(folder: Path) -> None:
        change(folder / file)
        digest = sha256_of(folder / file)

        def correct(content: Any) -> None:
            for record in (content["tokenizer"], *content["graphs"].values()):
                if record["file"] == file:
                    record["sha256"] = digest
            if file in content["files"]:
                content["files"][file] = digest

        manifest(correct)(folder)

    return apply


def changed_heads(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Change the weights of a segment's head, and correct the hash."""
    import onnx
    from onnx import numpy_helper

    def apply(path: Path) -> None:
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if "classifier" in tensor.name:
                values = change(numpy_helper.to_array(tensor).copy())
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, path)

    corrected(file, apply)(folder)


def with_nan(folder: Path) -> None:
    """Let the second exit give no numbers."""
    changed_heads(folder, "onnx/fp32/segment_02.onnx", lambda values: values * np.float32("nan"))


def with_loop(path: Path) -> None:
    """Add a node to a graph that could run for ever."""
    import onnx
    from onnx import helper

    proto = onnx.load(path)
    body = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))
    onnx.save(proto, path)
