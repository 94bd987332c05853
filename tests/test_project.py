"""The shape of the project: links, public names, imports, and the source distribution."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
import re
import shutil
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import sizes

from fpabee.runtime import machine

from .commands.test_command import COMMANDS
from .programs import program, python

ROOT = Path(__file__).parents[1]
PACKAGES = ("exporter", "runtime", "calibration")

_FLAG = re.compile(
    r"(?<![\w-])--[a-z]|\bfpabee[ -](build|calibrate|export|inspect|pack|run|serve|train)\b"
)


@pytest.mark.parametrize("package", PACKAGES)
def test_links_resolve_to_the_packages(package: str) -> None:
    link = ROOT / "src" / "fpabee" / package

    assert link.is_symlink()
    assert link.resolve() == ROOT / package
    assert (link / "__init__.py").is_file()


def test_the_release_check_installs_extras_that_exist() -> None:
    """Installers only warn of unknown extras."""
    script = (ROOT / "scripts" / "check_release").read_text(encoding="utf-8")
    lists = re.findall(
        r"(?:every|jetson)=(\S+)|\$place/env\" \"\$python\" (\S*,\S*)|for extra in (.*);", script
    )
    names = {name for each in lists for name in re.split("[, ]", "".join(each))}

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"parquet", "tensorrt-rtx-cu13"} < names
    assert names <= set(re.findall(r"^([\w-]+) = \[", text, re.M))

    (jetson,) = re.findall(r"^jetson=(.*)$", script, re.M)
    for path in ("docs/gpus.md", "scripts/Dockerfile.l4t"):
        assert f"[{jetson}]" in (ROOT / path).read_text(encoding="utf-8"), path


def test_the_hint_of_a_feature_installs_its_packages() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = dict(re.findall(r"^([\w-]+) = \[(.*?)\]$", text, re.M | re.S))

    def packages(names: str) -> set[str]:
        """What extras install, by the names of the modules."""
        entries = re.findall('"(.*?)"', "".join(extras[name] for name in names.split(",")))
        inner = [each for entry in entries for each in re.findall(r"fpabee\[(.*)\]", entry)]
        here = {re.split(r"[^\w-]", entry)[0].replace("-", "_") for entry in entries}
        return here.union(*map(packages, inner))

    hints = [(needs, hint.strip("[]")) for needs, hint in machine._FEATURES.values() if "[" in hint]
    assert "cpu,graphs" in {hint for _, hint in hints}
    for needs, hint in hints:
        assert set(needs.split()) <= packages(hint), hint


def test_public_names_change_on_purpose() -> None:
    """`public_names.txt` has them, with their parameters, and the commands with their options.

    Within 1.x, names are added to it. Whoever renames or removes one breaks other programs.
    """
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = [importlib.import_module(name) for name in re.findall("::: (.*)", api)]
    names = [line for module in modules for line in _public_names(module)]
    for name, module in COMMANDS.items():
        params = importlib.import_module(module).main.params
        options = {opt for each in params for opt in (*each.opts, *each.secondary_opts)}
        names.append(f"fpabee {name}: {', '.join(sorted(options))}")

    listed = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8")
    assert sorted(names) == sorted(listed.splitlines())  # a patched name moves to the end


def _public_names(module: types.ModuleType) -> Iterator[str]:
    """Each name with its parameters, which are also the fields of records, or with its members."""
    for name in module.__all__:
        value = getattr(module, name)
        # In Python 3.10, `dict[str, Any]` is an instance of `type`, too.
        inside = vars(value) if isinstance(value, type) and not get_args(value) else {}
        members = [*getattr(value, "__members__", ())]
        fields = members or _parameters(value)
        yield f"{module.__name__}.{name}: {', '.join(fields)}"
        for member in (each for each in inside if not each.startswith("_")):
            if member not in fields:
                function = getattr(inside[member], "__func__", inside[member])
                parameters = ", ".join(_parameters(function))
                yield f"{module.__name__}.{name}.{member}: {parameters}"


def _parameters(value: Any) -> list[str]:
    is_class = isinstance(value, type) and not get_args(value)
    known = is_class or inspect.isfunction(value)
    return [*inspect.signature(value).parameters] if known else []


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

    assert private == {
        "Calibration: Search",  # which only `write_report` reads
    }


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
            dumps = ("json.dumps(", "msgspec.json.encode(")
            is_json = bool(node.args) and ast.unparse(node.args[0]).startswith(dumps)
            prints = called in ("print", "click.echo", "click.secho", "Console")
            assert is_json or not prints, f"{path}, line {node.lineno}: {called}"


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, fpabee.runtime, fpabee.calibration, fpabee.exporter\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'pyarrow', 'matplotlib',\n"
        "         'jinja2', 'click', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )

    python(code)


def test_the_log_of_a_failed_test_has_no_tracing(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch sets the level of this logger itself."""
    tracing = logging.getLogger("torch.__trace")
    tracing.setLevel(logging.DEBUG)
    tracing.debug("a line for each step of an export")
    tracing.warning("what a user would see")
    assert caplog.messages == ["what a user would see"]


def test_libraries_do_not_mention_options_or_commands() -> None:
    """A hint names parameters, which commands print as options."""
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and _FLAG.search(str(node.value))
    }
    assert found == set()


def test_comments_and_docstrings_are_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text(
        '"""A module."""\n\n# A comment.\nTEXT = """\n\n"""  # three lines\n\n'
        'def function() -> int:\n    """Return\n    one."""\n\n    return 1\n'
    )
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    assert sizes.code_lines(".") == 5


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
    python(code, cwd=place)
    (made,) = (place / "dist").iterdir()
    return made


def test_the_sdist_holds_what_the_readme_names(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"}
    packaged = (
        *("py.typed", "calibration/report/page.html", "exporter/training/model_card.md"),
        *("runtime/backends/gather.cu", "runtime/backends/gather.ptx"),
    )
    assert listed | {f"src/fpabee/{name}" for name in packaged} <= names
    for folder in ("scripts", "tests"):
        kept = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {str(path) for path in kept if path.suffix != ".pyc"} <= names
    for package in PACKAGES:
        modules = (ROOT / package).rglob("*.py")
        assert {f"src/fpabee/{path.relative_to(ROOT)}" for path in modules} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_sdist_can_be_installed(sdist: Path, tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    program(sys.executable, "-m", "pip", "install", *options, tmp_path, sdist)
    code = "import fpabee.runtime, fpabee.calibration, fpabee.exporter; print(fpabee.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = python(code, env=environment)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    ptx = "runtime/backends/gather.ptx"
    assert (tmp_path / "fpabee" / ptx).read_bytes() == (ROOT / ptx).read_bytes()
