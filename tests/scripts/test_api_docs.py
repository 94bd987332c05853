"""The pages of the public interface: complete, the same every time, and of no machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fpabee

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "api_docs.py"
PACKAGES = ("runtime", "calibration", "exporter")


def files_in(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the script writes, by path."""
    spec = importlib.util.spec_from_file_location("api_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("api") / "pages"
    script.write_pages(folder)
    return files_in(folder)


def test_pages_are_those_of_the_public_packages(pages: dict[str, str]) -> None:
    packages = {f"fpabee/{package}.html" for package in PACKAGES}
    assert set(pages) == {"index.html", "search.js", "fpabee.html"} | packages
    for path in packages:
        assert f"fpabee {fpabee.__version__}" in pages[path]
        assert path.removeprefix("fpabee/") in pages["fpabee.html"]
    assert "fpabee.html" in pages["index.html"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str, pages: dict[str, str]) -> None:
    page = pages[f"fpabee/{package}.html"]
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))

    assert list(sections) == importlib.import_module(f"fpabee.{package}").__all__
    for name, section in sections.items():
        own = section.split('class="classattr"')[0]
        text = re.search(r'<div class="docstring">(.*?)</div>', own, re.DOTALL)
        assert text is not None, name
        assert len(re.sub(r"<[^>]+>|\s", "", text[1])) > 10, name


def test_attributes_members_and_examples_are_shown(pages: dict[str, str]) -> None:
    runtime = pages["fpabee/runtime.html"]
    for member, text in {
        "Prediction.truncated": "Whether the text had more tokens",
        "Target.tolerance": "Largest difference in logits",  # of a msgspec.Struct
        "Measure.JSKD": "Entropy of the mean distribution",
        "Engine.labels": "Label names in the order of the logits",
    }.items():
        after = runtime.split(f'<div id="{member}"')[1]
        assert text in after.split("</section>")[0].split('<div id="')[0], member
    assert "NDArray" in runtime
    assert re.search(r'class="pdoc-code codehilite".*Engine', runtime, re.DOTALL)
    # Code in the text of a page would show its marks.
    assert not [path for path, page in pages.items() if "```" in page and path != "search.js"]


def test_pages_are_of_no_machine(pages: dict[str, str]) -> None:
    for path, page in pages.items():
        assert not re.search(r"\b0x[0-9a-f]{6,}", page), path
        assert not re.search(r"&lt;(?:function|lambda|object|module|class)|PosixPath", page), path
        for place in (str(ROOT), str(Path.home()), sys.prefix):
            assert place not in page, path


def test_another_run_writes_the_same_bytes(pages: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "-o", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "again" / "index.html")
    assert files_in(tmp_path / "again") == pages
