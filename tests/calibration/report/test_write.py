"""The files of a report: what they hold, and what they must not."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from fpabee.calibration import Bound, Calibration, write_report
from fpabee.calibration.descriptions import promise_in_words
from fpabee.calibration.outcome import exits_of
from fpabee.calibration.report import plots

Make = Callable[..., Calibration]

TABLES = ["points", "contenders", "fronts", "depths", "exits", "reliability", "rows"]
PARTS = {"points", "speedup", "depths", "exits", "rows"}
ODD = ("<script>alert(1)</script> & 'x'", "مرحبا بالعالم", "x" * 5000, "", "one\ntwo", "$a_b$")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn, which takes seconds."""
    monkeypatch.setattr(plots, "_svg", lambda figure: b"<svg/>")


class Page(HTMLParser):
    """What a page holds: tags with their attributes, ids, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_texts(result: Calibration, texts: tuple[str, ...]) -> Calibration:
    rows = [
        dataclasses.replace(row, text=texts[number % len(texts)], text_pair="the pair")
        for number, row in enumerate(result.texts)
    ]
    return dataclasses.replace(result, texts=rows)


def test_tables_say_what_the_calibration_says(calibrated: Make, tmp_path: Path) -> None:
    result = calibrated(compare=True)
    page = write_report(result, tmp_path / "a" / "report")
    assert page == tmp_path / "a" / "report" / "report.html"
    files = {f"{name}.csv" for name in TABLES} | {"report.html", "report.json"}
    assert {path.name for path in page.parent.iterdir()} == files
    content = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert set(content) == {"summary", *TABLES}
    assert content["summary"]["rows"] == 150
    assert content["summary"]["full_depth_score"] == result.full_depth_score
    for name in TABLES:
        rows = table(page.parent, name)
        assert [list(row) for row in rows[:1]] == [list(content[name][0])]
        assert len(rows) == len(content[name])
    for point, row, stored in zip(
        result.points, table(page.parent, "points"), content["points"], strict=True
    ):
        held = point.held_out
        assert (row["name"], row["wish"], row["kind"]) == (point.name, str(point.goal), point.kind)
        assert json.loads(row["settings"])["name"] == point.rule.name
        assert stored["drop"] == held.drop
        assert float(row["drop"]) == pytest.approx(held.drop, rel=1e-5)
        assert float(row["optimism"]) == pytest.approx(point.optimism, rel=1e-5)
        assert float(row["measured_speedup_batch_32"]) == point.measured["32"]
        counts = [r["rows"] for r in table(page.parent, "depths") if r["point"] == point.name]
        assert tuple(map(int, counts)) == point.chosen_on.exits
        assert row["promise"] == promise_in_words(point, result)
    for one, stored in zip(result.comparisons, content["contenders"], strict=True):
        depth = exits_of(one.rule, result.rows).mean()
        assert stored["chosen_on_mean_depth"] == one.chosen_on.mean_depth == pytest.approx(depth)
    first = table(page.parent, "rows")[0]
    assert first["text"] == result.texts[0].text
    assert first["labels"] == "|".join(result.texts[0].labels or ())
    assert int(first["exit_fast"]) in (1, 2, 3)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({}, ["single-label, 4 labels", "150 labelled rows", "ECE"]),
        ({"with_test": True}, ["judged by: test.jsonl", "on test.jsonl: "]),
        ({"family": "mpnet"}, ["multi-label, 5 labels", "over all labels together"]),
        ({"family": "mpnet", "metric": "micro_f1"}, ["0.01 of the score"]),
        ({"unlabelled": True}, ["150 unlabelled rows", "Labels are needed"]),
        ({"family": "mpnet", "unlabelled": True}, ["by definition"]),
    ],
    ids=str,
)
def test_every_section_is_there(
    calibrated: Make, test_file: Path, tmp_path: Path, case: dict[str, Any], words: list[str]
) -> None:
    test = test_file if case.pop("with_test", False) else None
    result = calibrated(**case, test=test)
    page = Page(write_report(result, tmp_path).read_text(encoding="utf-8"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert ids == PARTS
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in PARTS}
    for word in (*words, *(point.name for point in result.points)):
        assert word in page.text
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == (2 if case.get("unlabelled") else 3)


@pytest.mark.usefixtures("undrawn")
def test_the_page_fetches_nothing_and_escapes_texts(at_exit_1: Make, tmp_path: Path) -> None:
    result = with_texts(at_exit_1(), ODD)
    text = write_report(result, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "style", "onerror", "action"):
            value = attributes.get(name)
            allowed = {"img": "data:image/svg+xml;base64,", "a": "#"}
            assert value is None or value.startswith(allowed[tag]), (tag, name)
    assert re.findall(r"url\(|@import|https?://", text) == []
    assert "<script>alert(1)</script> & 'x'" in page.text
    assert "(5,000 characters)" in page.text
    assert "x" * 500 not in text
    assert "the pair" in page.text
    assert "(empty)" in page.text
    # In the files texts are whole.
    assert {row["text"] for row in table(tmp_path, "rows")} == set(ODD)


def test_names_may_hold_anything_and_guarantees_and_warnings_are_said(
    calibrated: Make, tmp_path: Path
) -> None:
    name = "$x_{<b>&天気" + "y" * 60
    result = calibrated(bound=Bound(0.3, 0.95), name=name, compare=True)
    result = dataclasses.replace(result, warnings=("the rows are odd",))
    page = Page(write_report(result, tmp_path).read_text(encoding="utf-8"))
    assert name in page.text
    assert "drop at most 30 points with 95 % confidence" in page.text
    assert "at most 30 points lost on new rows, with 95 % confidence, tested on 120" in page.text
    assert "Warning : the rows are odd." in page.text
    (row,) = table(tmp_path, "points")
    assert row["certificate"].endswith("95 % confidence, tested on 120 rows")


@pytest.mark.usefixtures("undrawn")
def test_no_texts_are_left_out_everywhere(calibrated: Make, tmp_path: Path) -> None:
    result = with_texts(calibrated(), ("hushhush",))
    page = write_report(result, tmp_path, texts=False)
    assert "without the texts" in page.read_text(encoding="utf-8")
    for path in tmp_path.iterdir():
        assert b"hushhush" not in path.read_bytes()
        assert b"the pair" not in path.read_bytes()
    assert "text" not in table(tmp_path, "rows")[0]
    # An index of rows is still of use.
    assert table(tmp_path, "rows")[7]["line"] == "8"


@pytest.mark.usefixtures("undrawn")
def test_rows_shown_are_limited_and_counted(at_exit_1: Make, tmp_path: Path) -> None:
    result = at_exit_1(count=400)
    text = write_report(result, tmp_path).read_text(encoding="utf-8")
    changed = [int(n) for n in re.findall(r": (\d+) of 400 answers changed", text)]
    rows, last = table(tmp_path, "rows"), "answer_exit_3"
    for point, count in zip(result.points, changed, strict=True):
        early = [row[f"answer_exit_{row['exit_' + point.name]}"] for row in rows]
        assert count == sum(row[last] != answer for row, answer in zip(rows, early, strict=True))
    assert max(changed) > 40
    tables = re.findall(r'<table class="rows">.*?</table>', text, re.DOTALL)
    assert max(shown.count("<tr>") for shown in tables) == 40 + 1


@pytest.mark.usefixtures("undrawn")
def test_old_files_of_ours_are_replaced_and_others_left(calibrated: Make, tmp_path: Path) -> None:
    for name in ("reliability.csv", "points.csv", "mine.txt"):
        (tmp_path / name).write_text("of old")
    (tmp_path / "exits.csv").symlink_to("mine.txt")
    write_report(calibrated(unlabelled=True), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "of old"
    assert "of old" not in (tmp_path / "points.csv").read_text()
    assert not list(tmp_path.glob("reliability.*"))


def test_figures_are_the_same_bytes_and_nothing_global_is_touched(
    calibrated: Make, tmp_path: Path
) -> None:
    before, backend = dict(mpl.rcParams), mpl.get_backend()
    result = calibrated("mpnet", unlabelled=True)
    first, again = (write_report(result, tmp_path / name).parent for name in "ab")
    assert (dict(mpl.rcParams), mpl.get_backend()) == (before, backend)
    images = [
        re.findall(r'src="(data:[^"]*)"', (at / "report.html").read_text()) for at in (first, again)
    ]
    assert len(images[0]) == 2
    assert images[0] == images[1]
