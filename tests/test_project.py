"""The shape of the project: links, public names, and a README that cannot rot."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest

from fpabee.runtime import RuleError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("exporter", "runtime", "calibration")
COMMANDS = {
    "fpabee-train": "fpabee.exporter.cli.train",
    "fpabee-export": "fpabee.exporter.cli.export",
    "fpabee-run": "fpabee.runtime.cli.run",
    "fpabee-bench": "fpabee.exporter.cli.bench",
    "fpabee-calibrate": "fpabee.calibration.cli",
    "fpabee-inspect": "fpabee.runtime.cli.inspect",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_links_resolve_to_the_packages(package: str) -> None:
    link = ROOT / "src" / "fpabee" / package

    assert link.is_symlink()
    assert link.resolve() == ROOT / package
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_exist(package: str) -> None:
    module = importlib.import_module(f"fpabee.{package}")

    names = module.__all__
    # Constants first, then classes, then functions: the order that ruff keeps.
    assert len(names) == len(set(names))
    assert all(getattr(module, name) is not None for name in names)


def test_types_in_the_public_interface_are_public() -> None:
    """Who annotates what a public function takes and gives needs no private module."""
    modules = [importlib.import_module(f"fpabee.{package}") for package in PACKAGES]
    names = [(module, name) for module in modules for name in module.__all__]
    public = [getattr(module, name) for module, name in names]

    private = {
        f"{where}: {used.__name__}"
        for module, name in names
        for where, hints in _hints(name, getattr(module, name))
        for hint in hints.values()
        for used in _classes(hint)
        if used.__module__.startswith("fpabee.") and used not in public
    }

    assert private == {"Calibration: Selector"}  # which only `write_report` reads


def _hints(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Types by name: of a function, or of a class's attributes and of each of its methods."""
    if isinstance(value, type) or inspect.isfunction(value):
        yield name, get_type_hints(value)
    for attribute, member in vars(value).items() if isinstance(value, type) else ():
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if not attribute.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{attribute}", get_type_hints(function)


def _classes(hint: Any) -> Iterator[type]:
    for part in get_args(hint):
        yield from _classes(part)
    if isinstance(hint, type) and not get_args(hint):
        yield hint


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_people_see_is_escaped(package: str) -> None:
    """Only the console prints, and the one line of an error, except for JSON."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name in ("console.py", "errors.py") or not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            is_json = bool(node.args) and ast.unparse(node.args[0]).startswith("json.dumps(")
            prints = called in ("print", "click.echo", "click.secho", "Console")
            assert is_json or not prints, f"{path}, line {node.lineno}: {called}"


@pytest.mark.parametrize("package", ["fpabee.runtime", "fpabee.calibration", "fpabee.exporter"])
def test_importing_loads_no_heavy_library(package: str) -> None:
    code = (
        f"import sys, {package}\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'pyarrow', 'matplotlib',\n"
        "         'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_options_exist() -> None:
    """Every option of our commands in the README is one that the command has."""
    text = README.replace("\\\n", " ")
    seen = set()
    for line in text.splitlines():
        for part in line.strip().split("|"):
            words = shlex.split(part, comments=True) if re.match(r" *fpabee-\w", part) else []
            if not words or words[0] not in COMMANDS:
                continue
            command = importlib.import_module(COMMANDS[words[0]]).main
            assert isinstance(command, click.Command)
            known = {name for option in command.params for name in option.opts}
            used = {word for word in words[1:] if word.startswith("-") and word != "-"}
            assert used <= known, f"{words[0]} has no {sorted(used - known)}"
            seen.add(words[0])
    assert seen == set(COMMANDS)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    names = re.findall(
        r"`(?:\./)?((?:exporter|runtime|calibration|scripts|src|tests)/[\w./]*)", text
    )
    names += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)

    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_readme_has_no_relative_links() -> None:
    """It is also the description on PyPI, where they would lead nowhere."""
    assert re.findall(r"\]\((?!https?://)[^)]*\)|^\[[^\]]+\]:(?! https?://).*", README, re.M) == []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, of a copy of the project without its caches but one."""
    place = tmp_path_factory.mktemp("project")
    for name in (*PACKAGES, "src", "scripts", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, place)
    (place / "tests" / "__pycache__").mkdir()
    (place / "tests" / "__pycache__" / "conftest.pyc").touch()
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, check=True)
    (made,) = (place / "dist").iterdir()
    return made


def test_the_sdist_holds_what_the_readme_names(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"}
    assert listed | {"src/fpabee/py.typed", "src/fpabee/calibration/report/page.html"} <= names
    for folder in ("scripts", "tests"):
        kept = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {str(path) for path in kept if path.suffix != ".pyc"} <= names
    for package in PACKAGES:
        modules = (ROOT / package).rglob("*.py")
        assert {f"src/fpabee/{path.relative_to(ROOT)}" for path in modules} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_sdist_can_be_installed(sdist: Path, tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    install = [sys.executable, "-m", "pip", "install", *options, str(tmp_path), str(sdist)]
    subprocess.run(install, capture_output=True, check=True)
    code = "import fpabee.runtime, fpabee.calibration, fpabee.exporter; print(fpabee.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_readme_python_runs(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    (tmp_path / "engines").symlink_to(engines["bert"])
    (tmp_path / "texts.txt").write_text("turn on the light\n")
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["classify"]("the film", 5.0) in names["engine"].labels
    with pytest.raises(RuleError, match="no operating point 'fast'"):  # not calibrated
        names["on_battery"]()
    names["engine"].close()
