"""The report: its curves, what its page says, and that it fetches nothing."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from fpabee.calibration import Bound, Calibration, Goal, write_report
from fpabee.calibration.evidence import TextEvidence
from fpabee.calibration.report import plots
from fpabee.calibration.report.curves import curves
from fpabee.calibration.report.words import _lost_in_words, promise_in_words
from fpabee.calibration.scoring import Scorer
from fpabee.calibration.settings import StopScores
from fpabee.runtime import RULES

from .conftest import make_rows

Make = Callable[..., Calibration]
GOALS = {"close": Goal(max_drop=1.0)}
VOID = {"meta", "img", "br"}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made, but not drawn, which takes seconds."""
    monkeypatch.setattr(plots, "_svg", lambda figure: b"<svg/>")


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and text; every tag must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def pictures(self) -> list[bytes]:
        found = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', self.source)
        return [base64.b64decode(content) for content in found]


def report(result: Calibration, folder: Path) -> Page:
    write_report(result, folder / "report.html")
    return Page(folder / "report.html")


@pytest.mark.parametrize(("tested", "metric"), [(False, "accuracy"), (True, "macro_f1")])
def test_a_curve_goes_from_deep_to_shallow_and_is_judged_on_the_test_rows(
    calibrated: Make, test_file: Path, metric: str, tested: bool
) -> None:
    test = test_file if tested else None
    result = calibrated(count=80, metric=metric, test=test, goals=GOALS, rules=tuple(RULES))
    rows = result.test if result.test is not None else result.rows
    assert tested is (result.test is not None)
    curve_of = curves(result)
    assert {*curve_of} == {*RULES}
    scorer = Scorer(rows, metric)
    stop = StopScores(rows)
    for name, settings in curve_of.items():
        depths = [depth for depth, _ in settings]
        assert tested or depths == sorted(depths, reverse=True)
        lists = [tried.settings for tried in result.search.tried]
        every = np.vstack([stop.exits(each) for each in lists if each[0].name == name])
        pairs = [(exits.mean(), 100 * (scorer.full_depth - scorer.score(exits))) for exits in every]
        for setting in settings:
            assert np.abs(np.array(pairs) - setting).max(axis=1).min() < 1e-9


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({}, ["4, one for each text", "150 labelled rows"]),
        ({"with_test": True}, ["judged by: test.jsonl", " on test.jsonl"]),
        ({"family": "mpnet"}, ["5, any number for each text"]),
        ({"metric": "agreement"}, ["150 unlabelled rows", "by definition"]),
    ],
    ids=str,
)
def test_the_page_says_what_the_calibration_says(
    calibrated: Make, test_file: Path, tmp_path: Path, case: dict[str, Any], words: list[str]
) -> None:
    test = test_file if case.pop("with_test", False) else None
    result = calibrated(**case, test=test)
    page = report(result, tmp_path / "new")
    for word in words:
        assert word in page.text
    for point in result.points:
        assert point.name in page.text
        assert promise_in_words(point, result) in page.text
        assert f"{point.chosen_on.mean_depth:.2f}" in page.text
    assert len(page.pictures) == 2


def test_the_page_names_the_classifier_that_decisions_are_compared_with(
    calibrated: Make, tmp_path: Path
) -> None:
    result = calibrated(metric="agreement")
    rows = dataclasses.replace(result.rows, reference=result.rows.logits[-1])
    page = report(dataclasses.replace(result, rows=rows), tmp_path)
    assert "answer is that of the classifier that was converted" in page.text
    assert "by definition" not in page.text


def test_a_drop_that_no_row_can_judge_is_not_called_zero(calibrated: Make) -> None:
    """The parts of the rows may confirm nothing where all of them confirm a setting."""
    result = calibrated(goals={"guaranteed": Bound(drop=0.3)})
    (point,) = result.points
    rows = sum(point.held_out.exits)
    nowhere = (*(0 for _ in point.held_out.exits[1:]), rows)
    held_out = dataclasses.replace(point.held_out, exits=nowhere)
    assert "its drop on other rows is not known" not in promise_in_words(point, result)
    point = dataclasses.replace(point, held_out=held_out)
    assert "its drop on other rows is not known" in promise_in_words(point, result)


def test_names_may_hold_anything_and_guarantees_and_warnings_are_said(
    calibrated: Make, tmp_path: Path
) -> None:
    name = "$x_{<b>&天気<script>" + "y" * 60
    result = calibrated(goals={name: Bound(drop=0.3)})
    result = dataclasses.replace(result, warnings=("the rows are odd",))
    page = report(result, tmp_path)
    assert name in page.text
    assert "a drop of at most 30 points, with 95 % confidence" in page.text
    assert "tested on 149 of 150 texts (all of them would allow no more changes); " in page.text
    assert "Warning : the rows are odd." in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    without_pictures = re.sub(r'src="data:[^"]*"', "", page.source)
    assert re.findall(r"src=|url\(|@import|https?://", without_pictures) == []


def test_pictures_are_the_same_bytes_and_nothing_global_is_touched(
    calibrated: Make, tmp_path: Path
) -> None:
    before = dict(mpl.rcParams)
    backend = mpl.get_backend()
    result = calibrated("mpnet", metric="agreement")
    first = report(result, tmp_path).pictures
    again = report(result, tmp_path).pictures
    assert (dict(mpl.rcParams), mpl.get_backend()) == (before, backend)
    assert first == again
    for picture in first:
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drop": -0.001}, "^0.00 points lost"),
        ({"drop": -0.01}, "^0.01 points gained"),
        ({"interval": (0.2, 1.1)}, r"\(95 %: 0.20 to 1.10 lost\)$"),
        ({"interval": (-0.2, 1.1)}, r"\(95 %: 0.20 gained to 1.10 lost\)$"),
    ],
)
def test_a_loss_that_rounds_to_nothing_is_no_gain_and_an_interval_says_so_once(
    change: dict[str, Any], said: str
) -> None:
    scorer = Scorer(make_rows(), "accuracy")
    found = TextEvidence(scorer, "abc").outcome(np.full(600, 6))
    assert re.search(said, _lost_in_words(dataclasses.replace(found, **change), None))
