#!/usr/bin/env python
"""Write the public interface as HTML pages, from the docstrings.

What is public is what the three packages name in `__all__`. Needs `pip install 'fpabee[docs]'`,
and no network; open `build/api/index.html` afterwards.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import click
from pdoc import doc, doc_ast, render

import fpabee
from fpabee.runtime import FpabeeError

PACKAGES = ("fpabee.runtime", "fpabee.calibration", "fpabee.exporter")

# How Python prints types and values, and how one writes them.
_AS_WRITTEN = (
    (r"numpy\.ndarray\[.*?, numpy\.dtype\[(numpy\.\w+(?:\[[\w.]+\])?)\]\]", r"NDArray[\1]"),
    (r"(?:typing\.)?Annotated\[(.+?), msgspec\.Meta\(.*?\)\]", r"\1"),
    (r"<(\w+\.\w+): '\w+'>|<class '([\w.]+)'>", r"\1\2"),
    (r"\bnumpy\.", "np."),
    (r"\b(?:typing|pathlib|collections\.abc)\.", ""),
)


def write_pages(folder: Path) -> None:
    """Write a page for each package, one that leads to them, and a search index.

    Args:
        folder: where to write; it is made if it is not there.
    """
    render.configure(
        docformat="google", show_source=False, footer_text=f"fpabee {fpabee.__version__}"
    )
    packages = {name: _documented(name) for name in PACKAGES}
    front = doc.Module(fpabee)
    vars(front)["submodules"] = list(packages.values())
    modules = {front.modulename: front, **packages}
    files = {
        f"{name.replace('.', '/')}.html": render.html_module(module, modules)
        for name, module in modules.items()
    }
    files["index.html"] = render.html_index(modules)
    files["search.js"] = render.search_index(modules)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


def _documented(name: str) -> doc.Module:
    """A package as pdoc sees it, with types and values as one writes them."""
    package = importlib.import_module(name)
    # Some names are made when they are first asked for; pdoc looks at those that are there.
    vars(package).update({public: getattr(package, public) for public in package.__all__})
    module = doc.Module(package)
    for member in module.members.values():
        if isinstance(member, doc.Variable) and not member.docstring:
            member.docstring = _constant_docstring(member.name, member.default_value)
    for member in _all_members(module):
        if isinstance(member, doc.Variable):
            vars(member)["annotation_str"] = _as_written(member.annotation_str)
            vars(member)["default_value_str"] = _value(member)
        elif isinstance(member, doc.Function):
            vars(member)["signature"] = _readable(member.signature)
        elif isinstance(member, doc.Class):
            _hand_out_attributes(member)
    return module


def _all_members(namespace: doc.Module | doc.Class) -> Iterator[doc.Doc[object]]:
    for member in namespace.members.values():
        yield member
        if isinstance(member, doc.Class):
            yield from _all_members(member)


def _hand_out_attributes(described: doc.Class) -> None:
    """Move what a class says of its attributes to them, so that it is said where they stand."""
    section = re.search(r"^Attributes:\n((?: {4}.*\n?)+)\n?", described.docstring, re.MULTILINE)
    if section is None:
        return
    texts = dict(re.findall(r"^ {4}(\w+): ((?:.*\n?)(?: {5}.*\n?)*)", section[1], re.MULTILINE))
    if texts.keys() <= described.members.keys():
        for name, text in texts.items():
            sentence = re.sub(r"^[a-z]+(?=\W*\s|\W*$)", lambda word: word[0].capitalize(), text)
            described.members[name].docstring = inspect.cleandoc(sentence)
        vars(described)["docstring"] = described.docstring.replace(section[0], "")


def _constant_docstring(name: str, value: object) -> str:
    """The docstring of a constant, which stands below it in the module that defines it."""
    for path, module in sorted(sys.modules.items()):
        if path.startswith("fpabee.") and vars(module).get(name) is value:
            docstring = doc_ast.walk_tree(module).var_docstrings.get(name)
            if docstring:
                return docstring
    return ""


def _value(variable: doc.Variable) -> str:
    value = variable.default_value
    if isinstance(value, Enum) and value.name == variable.name:
        return repr(value.value)
    return _as_written(variable.default_value_str)


class _Written:
    """Prints as given, in place of an annotation or a default."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _readable(signature: inspect.Signature) -> inspect.Signature:
    empty = signature.empty
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.annotation is not empty:
            text = _as_written(inspect.formatannotation(parameter.annotation))
            parameter = parameter.replace(annotation=_Written(text))
        if parameter.default is not empty:
            parameter = parameter.replace(default=_Written(_as_written(repr(parameter.default))))
        parameters.append(parameter)
    returns = signature.return_annotation
    if returns is not empty:
        returns = _Written(_as_written(inspect.formatannotation(returns)))
    return signature.replace(parameters=parameters, return_annotation=returns)


def _as_written(text: str) -> str:
    for printed, written in _AS_WRITTEN:
        text = re.sub(printed, written, text)
    return text


@click.command()
@click.option(
    "-o",
    "--output",
    default="build/api",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write.",
)
def main(output: Path) -> None:
    """Write the pages of the public interface."""
    try:
        write_pages(output)
    except FpabeeError as error:
        sys.exit(f"error: {error}")
    click.echo(output / "index.html")


if __name__ == "__main__":
    main()
