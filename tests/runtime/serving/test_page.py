"""The page of the server in a real browser: Chromium, driven by Playwright.

Both are in an environment in the user's cache directory, which is made when it is first needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fpabee.runtime import Engine
from fpabee.runtime.backends.compiled_cache import folder as cache_folder

from .test_serve import ask, served

pytestmark = pytest.mark.slow

WAIT = 120
HTML = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"
# Reads what to do from standard input; prints what the page shows after each text.
DRIVER = """
import json, sys
from playwright.sync_api import sync_playwright
asked = json.load(sys.stdin)
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=asked["browser"])
    page = browser.new_page(viewport={"width": asked["width"], "height": 720})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(asked["url"])
    if asked["stop"]:
        page.route("**/classify", lambda route: route.abort())
    shown = []
    for number, text in enumerate(asked["texts"]):
        page.get_by_label("Text").fill(text)
        page.get_by_role("button", name="Classify").click()
        page.locator("button:enabled").wait_for()
        table = page.get_by_role("table", name="Probability of each label")
        rows = table.get_by_role("row").all() if table.is_visible() else []
        shown.append({
            "answer": page.get_by_role("status").inner_text() if rows else "",
            "name": page.get_by_role("heading").inner_text(),
            "stopped": page.locator("#ladder .answered").all_inner_texts(),
            "error": page.get_by_role("alert").inner_text(),
            "rows": [row.get_by_role("cell").all_inner_texts() for row in rows],
            "bold": [r.get_by_role("cell").first.inner_text() for r in rows
                     if r.get_attribute("class") == "predicted"],
            "images": page.locator("img").count(),
            "title": page.title(),
            "too_wide": page.evaluate(
                "document.documentElement.scrollWidth > document.documentElement.clientWidth"),
        })
        page.screenshot(path=asked["pictures"] + f"-{number}.png", full_page=True)
    print(json.dumps({"shown": shown, "complaints": complaints}))
    browser.close()
"""

Browse = Callable[..., dict[str, Any]]


def _chromium(home: Path) -> tuple[Path, str]:
    """A browser, and where its libraries are: the system's, or Debian's packages unpacked."""
    for name in ("chromium-headless-shell", "chromium", "google-chrome"):
        if found := shutil.which(name):
            return Path(found), ""
    root = home / "debian"
    if not root.exists():
        install = ["apt-get", "install", "--simulate", "--no-install-recommends"]
        plan = _output([*install, "chromium-headless-shell"], home)
        names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
        _output(["apt-get", "download", *names], home)
        for package in home.glob("*.deb"):
            _output(["dpkg", "--extract", str(package), str(root)], home)
            package.unlink()
    (binary,) = root.glob("usr/lib/chromium/chromium-headless-shell")
    folders = {str(library.parent) for library in root.glob("usr/lib/*-linux-gnu/**/*.so*")}
    return binary, ":".join(folders)


def _output(command: list[str], folder: Path) -> str:
    return subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def browser() -> tuple[Path, Path, str]:
    """A Python with Playwright, a browser, and where its libraries are."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = cache_folder().parent / f"browser-python{version}"
    home.mkdir(parents=True, exist_ok=True)
    python = home / "venv" / "bin" / "python"
    with FileLock(f"{home}.lock"):
        try:
            if not (home / "complete").exists():
                _output([sys.executable, "-m", "venv", "--clear", "venv"], home)
                _output([str(python), "-m", "pip", "install", "--quiet", "playwright>=1.50"], home)
            chromium, libraries = _chromium(home)
            (home / "complete").touch()
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"no browser could be installed here: {str(why).strip().splitlines()[-1]}")
    return python, chromium, libraries


@pytest.fixture
def browse(browser: tuple[Path, Path, str], tmp_path: Path) -> Browse:
    """Types texts into the page of a server; returns what it shows."""
    python, chromium, libraries = browser

    def browse(port: int, *texts: str, width: int = 1280, stop: bool = False) -> dict[str, Any]:
        pictures = os.environ.get("FPABEE_PICTURES", str(tmp_path)) + f"/page-{width}"
        url = f"http://127.0.0.1:{port}/"
        asked = {"url": url, "texts": texts, "width": width, "stop": stop, "pictures": pictures}
        done = subprocess.run(
            [str(python), "-c", DRIVER],
            input=json.dumps(asked | {"browser": str(chromium)}),
            env={**os.environ, "LD_LIBRARY_PATH": libraries} if libraries else None,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    return browse


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_person_sees_the_answer_and_its_depth(
    engines: Mapping[str, Path], browse: Browse, family: str, width: int
) -> None:
    texts = ["play some music", HTML, "rain " * 200]
    with Engine.load(engines[family]) as engine:
        expected = [engine.predict([text])[0] for text in texts]
        labels = engine.labels
    with served(engines[family]) as (_, port):
        found = browse(port, *texts, width=width)
    assert found["complaints"] == []
    for answer, shown in zip(expected, found["shown"], strict=True):
        depth = f"answered at exit {answer.exit}, after {answer.layer} of 3 layers."
        names = ", ".join(answer.labels) or "no label"
        assert shown["answer"].startswith(f"{names}: {depth}")
        assert re.search(r"It took \d+\.\d ms\.", shown["answer"])
        assert shown["name"] == engines[family].name
        assert shown["stopped"] == [f"exit {answer.exit}, layer {answer.layer}"]
        assert ("too long" in shown["answer"]) == answer.truncated
        assert [row[0] for row in shown["rows"]] == [name for name, _ in answer.top(labels)]
        scores = [float(row[-1]) for row in shown["rows"]]
        assert scores == [pytest.approx(p, abs=1e-4) for _, p in answer.top(labels)]
        assert sorted(shown["bold"]) == sorted(answer.labels)
        assert (shown["error"], shown["images"], shown["title"]) == ("", 0, "fpabee")
        assert not shown["too_wide"]
    assert [answer.truncated for answer in expected] == [False, False, True]


def test_an_error_is_a_sentence_and_goes_away(engines: Mapping[str, Path], browse: Browse) -> None:
    with served(engines["bert"]) as (_, port):
        (bad, good) = browse(port, "rain " * 220_000, "rain")["shown"]
        assert bad["error"] == (
            "The text was not classified: the body has more than 1048576 bytes."
        )
        assert (bad["answer"], bad["rows"]) == ("", [])
        assert good["error"] == ""
        assert "answered at exit" in good["answer"]
        (lost,) = browse(port, "rain", stop=True)["shown"]
        assert lost["error"] == "The text was not classified: the server does not answer."


def test_labels_with_html_are_shown_as_text(
    engine_copy: Callable[..., Path], browse: Browse
) -> None:
    folder = engine_copy("bert")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["task"]["labels"][0] = HTML
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with served(folder) as (_, port):
        assert HTML in ask(port, "/info")[1]["labels"]
        (shown,) = browse(port, "rain")["shown"]
    assert HTML in [row[0] for row in shown["rows"]]
    assert (shown["images"], shown["title"]) == (0, "fpabee")
