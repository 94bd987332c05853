"""The examples in the docstrings of the public interface."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from .calibration.conftest import label_rows, write


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Docstrings of a package ("") and of its public names and their methods, by name."""
    module = importlib.import_module(package)
    yield "", inspect.getdoc(module) or ""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or inspect.isfunction(value):
            yield name, inspect.getdoc(value) or ""
        for attribute, member in vars(value).items() if isinstance(value, type) else ():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", inspect.getdoc(member) or ""


@pytest.mark.parametrize(
    ("package", "folders", "with_code"),
    [
        (
            "runtime",
            ["engines", "reranker-engines"],
            ["", "Engine", "Engine.rank", "Manifest", "ReadOptions", "read_rows"],
        ),
        ("runtime.serving", ["engines"], ["Scheduler"]),
        ("calibration", ["engines"], ["CalibrationOptions", "calibrate", "threshold_for_depth"]),
        ("exporter", ["model_dir"], ["export"]),
        ("exporter.targets", ["engines"], ["build_targets"]),
        ("exporter.training", ["sentence-transformers/all-MiniLM-L6-v2"], ["train"]),
    ],
)
def test_code_runs(
    package: str,
    folders: list[str],
    with_code: list[str],
    engines: Mapping[str, Path],
    ranking_engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = {"engines": engines, "reranker-engines": ranking_engines}
    for folder in folders:
        source = sources.get(folder, tiny_models)
        shutil.copytree(source["bert"], tmp_path / folder)
    for name in ("train.jsonl", "dev.jsonl"):
        write(label_rows(engines["bert"]), tmp_path / name)
    (tmp_path / "dev.csv").write_text("sentence,sentiment\nfine,positive\n")
    monkeypatch.chdir(tmp_path)
    # The table of exit 0 is large.
    monkeypatch.setattr("fpabee.exporter.training.bag_of_ngrams._MOST_EPOCHS", 2)
    run = []
    for name, text in _docstrings(f"fpabee.{package}"):
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(inspect.cleandoc(code), f"<example of {name or package}>", "exec"), {})
            run.append(name)
    assert run == with_code


@pytest.mark.parametrize(
    ("package", "with_sessions"),
    [("runtime", ["ExitRule", "Tally.drift", "simulate"]), ("calibration", ["Bound"])],
)
def test_sessions_print_what_they_say(package: str, with_sessions: list[str]) -> None:
    run = []
    for name, text in _docstrings(f"fpabee.{package}"):
        session = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
        if session.examples:
            assert doctest.DocTestRunner().run(session).failed == 0, name
            run.append(name)
    assert run == with_sessions
