"""The commands, examples and file names in the README and the documentation are real."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import demo
import pytest
import sizes
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fpabee.commands import points
from fpabee.runtime import Engine, RuleError

from .calibration.conftest import label_rows, write
from .commands.test_command import COMMANDS as MODULES
from .runtime.running import execute

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {f"fpabee-{name}": module for name, module in MODULES.items()}


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _options_of(command: str) -> set[str]:
    params = _command(command).params
    return {option for param in params for option in (*param.opts, *param.secondary_opts)}


def _options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_options_in_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [part.strip() for line in text.splitlines() for part in line.split(" | ")]
    spans = re.findall(r"`(fpabee-[^`\n]+)`", text)
    for command in [*(line for line in lines if line.startswith("fpabee-")), *spans]:
        words = shlex.split(command, comments=True)
        if words[0] in COMMANDS:
            known = {"--help", *_options_of(words[0])}
            assert _options(words[1:]) <= known, command


def test_options_in_prose_exist() -> None:
    known = {option for name in COMMANDS for option in _options_of(name)}
    scripts = {"--help", "--all", "--depth", "--json", "--strict"}
    ours = known | scripts | {"--system-site-packages", "--no-deps"}
    for page in PAGES:
        for span in re.findall(r"`(--[a-z][^`]*)`", page.read_text(encoding="utf-8")):
            assert _options(span.split()) <= ours, f"{page.name}: {span}"


def test_every_command_has_an_example() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"\n    {name} " not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "exporter|runtime|calibration|scripts|src|tests|docs"
    names = re.findall(rf"[`( ](?:\./)?((?:{folders})/[\w./-]*)", text)
    assert [name for name in names if not (ROOT / name.rstrip(".")).exists()] == []


def test_readme_and_documentation_are_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 95
    assert sizes.words(ROOT / "README.md") <= 680
    assert 5_000 < sizes.words(ROOT / "docs") <= 13_500


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split()[-1]
    assert f"\n    {command} " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_to_files(page: Path) -> None:
    """The strict build checks those of the site, and their anchors."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text)
    files = [file for pair in links for file in pair if file and "://" not in file]
    assert [file for file in files if not (page.parent / file).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/convert.md", "docs/calibrate.md"])
def test_tables_of_operating_points_have_the_heads_that_are_printed(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    is_agreement = page != "docs/calibrate.md"
    points.show_heads_of_texts(("answers", "changed") if is_agreement else ("points", "lost"))
    assert capsys.readouterr().out in (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_a_ranking_has_the_heads_that_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points.show_heads_of_queries(documents=50, top=3)
    assert capsys.readouterr().out in (ROOT / "docs" / "rerank.md").read_text(encoding="utf-8")


def test_the_home_page_shows_what_the_quickstart_compares() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (width,) = map(len, re.findall(r"^fpabee, changed-1 in [\w-]+", text, re.M))
    assert "\n".join(demo.heads(800, width)) in text
    assert re.search(r"^PyTorch \(transformers\.pipeline\)  ", text, re.M)


SHOWN = {
    "docs/run.md": ["fpabee-run engines/ texts.txt", "fpabee-run engines/ test.jsonl --metrics"],
    "docs/embed-without-python.md": ["fpabee-pack engines/ -o classifier/"],
    "docs/export.md": ["fpabee-inspect engines/ --check"],
}
"""Commands that need only what the demo makes, and whose output stands below them."""


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in SHOWN for command in SHOWN[page]]
)
def test_commands_print_what_stands_below_them(
    page: str,
    command: str,
    demo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = rf"^    ({re.escape(command)}[^\n]*)\n\n```\n(.*?)```"
    ((line, shown),) = re.findall(pattern, text, re.M | re.DOTALL)
    monkeypatch.chdir(demo_folder)
    name, *arguments = shlex.split(line)
    done = execute(_command(name), capfd, arguments)
    assert done.code == 0, done.err
    printed = " ".join((done.out + done.err).split())
    labels = _labels(shown)
    assert labels
    assert [label for label in labels if label not in printed] == []


def _labels(shown: str) -> list[str]:
    """Names of fields, and the first words of lines that begin with two words."""
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    words = [match[0] for line in lines if (match := re.match(r"[A-Za-z]+ [A-Za-z]+\b", line))]
    return words + re.findall(r'"\w+":', shown)


def test_the_server_answers_what_its_page_shows(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    ((place, body, shown),) = re.findall(
        r"^\$ curl -s localhost:8000(\S+) .*?-d '(.*?)'\n```\n\n```\n(.*?)```",
        text,
        re.M | re.DOTALL,
    )
    answers = []

    def ask(app: Starlette, *_: object) -> None:
        client = TestClient(app, "http://localhost")
        headers = {"Content-Type": "application/json"}
        answers.append(client.post(place, content=body, headers=headers).text)

    monkeypatch.setattr("fpabee.runtime.serving.server.serve", ask)
    done = execute(_command("fpabee-serve"), capfd, [demo_folder / "engines"])
    assert done.code == 0, done.err
    (answer,) = answers
    labels = _labels(shown)
    assert labels
    assert [label for label in labels if label not in answer] == []


@pytest.fixture
def demo_folder(exit_0_engines: Mapping[str, Path], tmp_path: Path) -> Path:
    """What examples name, made of a tiny model."""
    rows = label_rows(exit_0_engines["bert"], 40)
    (tmp_path / "engines").symlink_to(exit_0_engines["bert"])
    (tmp_path / "texts.txt").write_text("turn on the light\n")
    write(rows, tmp_path / "test.jsonl")
    return tmp_path


def test_the_readme_links_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [_id(page) for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"]({page})" not in text] == []


def test_the_example_of_rerankers_runs(
    ranking_engines: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs/rerank.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "engines").symlink_to(ranking_engines["bert"])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "rerank.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("page", ["README.md", "docs/embed.md"])
def test_python_examples_run(
    page: str, engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert code
    (tmp_path / "engines").symlink_to(engines["bert"])
    (tmp_path / "texts.txt").write_text("turn on the light\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile("\n".join(code), page, "exec"), names)
    if "classify" in names:
        assert names["classify"]("the film", 5.0) in names["engine"].labels
        assert names["drift"]() is None
        with pytest.raises(RuleError, match="fast"):  # this folder has not been calibrated
            names["on_battery"]()
    names["engine"].close()


def test_the_example_for_triton_and_its_configuration_name_the_same_tensors() -> None:
    folder = ROOT / "docs" / "examples" / "triton"
    config = (folder / "config.pbtxt").read_text(encoding="utf-8")
    code = (folder / "1" / "model.py").read_text(encoding="utf-8")
    compile(code, "model.py", "exec")
    for kind, call in (("input", "get_input_tensor_by_name(request, "), ("output", "Tensor(")):
        names = re.findall(rf'^{kind} {{ name: "(\w+)" data_type: TYPE_\w+ dims: ', config, re.M)
        assert names
        assert names == re.findall(rf'{re.escape(call)}"(\w+)"', code)


@pytest.mark.parametrize(("kind", "device"), [("CPU", 0), ("GPU", 1)])
def test_the_example_for_triton_loads_the_device_of_its_instance(
    kind: str,
    device: int,
    engines: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "engines").symlink_to(engines["bert"])
    load = Mock(return_value=Engine.load(engines["bert"]))
    monkeypatch.setattr(Engine, "load", load)
    name = "triton_python_backend_utils"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "triton" / "1" / "model.py"))
    model = example["TritonPythonModel"]()
    model.initialize(
        {
            "model_repository": str(tmp_path),
            "model_version": "1",
            "model_instance_kind": kind,
            "model_instance_device_id": "1",
        }
    )
    model.finalize()
    load.assert_called_once_with(tmp_path / "1" / "engines", device=device)


def test_citation_and_site_have_the_version_and_the_address_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.*)"', project, re.M)
    # Until there is an address, nothing links to one.
    address = re.findall(r'^Repository = "(.*)"', project, re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert re.findall(r"^repository-code: (.*)", citation, re.M) == address
    assert re.findall(r"^repo_url: (.*)", site, re.M) == address


# A part of an address that stands for another word, or a host that belongs to nobody.
PLACEHOLDER = re.compile(
    r"https?://(?:[^\s\"'()]*/)?(?:[A-Z_]{3,}\b|[<{]|your[-_]|todo\b)|https?://[\w.]*example\.\w+"
)


def test_no_address_is_a_placeholder() -> None:
    names = ("pyproject.toml", "CITATION.cff", "mkdocs.yml", "README.md", "CHANGELOG.md")
    folders = (".github", "docs", "runtime", "exporter", "calibration")
    files = [ROOT / name for name in (*names, "CONTRIBUTING.md", "MANIFEST.in")]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    kinds = {".md", ".yml", ".toml", ".cff", ".html", ".json", ".in"}
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in files
        if path.is_file() and path.suffix in kinds
    }
    assert len(texts) > 30
    wrong = {name: match[0] for name, text in texts.items() if (match := PLACEHOLDER.search(text))}
    assert wrong == {}


def _command(name: str) -> click.Command:
    main = importlib.import_module(COMMANDS[name]).main
    assert isinstance(main, click.Command)
    return main
