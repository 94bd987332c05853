"""Finds and runs the examples in the docstrings of a package's public interface."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator


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


def run_code(package: str) -> list[str]:
    """Run the blocks of code in the current folder; returns whose they are."""
    run = []
    for name, text in _docstrings(package):
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(inspect.cleandoc(code), f"<example of {name or package}>", "exec"), {})
            run.append(name)
    return run


def run_sessions(package: str) -> list[str]:
    """Run the interactive sessions, which say what they print; returns whose they are."""
    run = []
    for name, text in _docstrings(package):
        session = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
        if session.examples:
            assert doctest.DocTestRunner().run(session).failed == 0, name
            run.append(name)
    return run
