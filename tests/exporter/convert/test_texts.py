"""Distinct texts, and what each of them is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fpabee.calibration import Bound
from fpabee.exporter.convert import ConvertOptions
from fpabee.exporter.convert.classification import Classification
from fpabee.exporter.convert.texts import split
from fpabee.exporter.convert.workflow import _too_few
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import Row

from ...programs import write_lines

ROWS = [Row(f"text {number}", fields={"dialogue": number // 5}) for number in range(4000)]


def test_every_distinct_text_is_in_one_part_and_keeps_it() -> None:
    texts = split([*ROWS, *ROWS[:7], ROWS[3], Row("text 9", "and a pair")])
    parts = texts.train, texts.choose, texts.calibrate, texts.report
    every = np.concatenate(parts)
    assert sorted(every) == list(range(4001))
    assert texts.weights[[0, 3, 7]].tolist() == [2, 3, 1]
    shares = np.array(texts.sizes) / len(every)
    np.testing.assert_allclose(shares, [0.4, 0.1, 0.4, 0.1], atol=0.03)
    assert texts.taught.tolist() == [*texts.train, *texts.choose]
    assert texts.share_that_certifies == 0.4
    assert split(ROWS[:500], train_units=ROWS[500:]).share_that_certifies == 0.9
    others = split(ROWS[2000:])
    certified = {texts.units[number].text for number in texts.calibrate}
    assert {others.units[number].text for number in others.calibrate} <= certified


def test_groups_stay_together_and_one_text_of_each_calibrates() -> None:
    texts = split([*ROWS, Row("on its own")], "dialogue")
    seen: dict[int, set[str]] = {}
    for name in ("train", "choose", "calibrate", "report"):
        for number in getattr(texts, name):
            seen.setdefault(texts.units[number].fields.get("dialogue", -1), set()).add(name)
    assert all(len(names) == 1 for names in seen.values())
    groups = [texts.units[number].fields.get("dialogue") for number in texts.calibrate]
    assert len(set(groups)) == len(groups) > 250
    assert texts.sizes[0] > 1200


def test_pairs_are_grouped_by_a_text_that_they_share(tmp_path: Path) -> None:
    rows = [{"text": f"premise {n // 4}", "text_pair": f"claim {n}"} for n in range(4000)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    pairs = Classification(path, ConvertOptions(group_column="text"))
    premises = [pairs.texts.units[number].text for number in pairs.texts.calibrate]
    assert len(premises) == len(set(premises)) > 300
    assert "one text of each new group" in pairs.warnings[0]
    pairs.bound = Bound(changed_answers=0.001)
    with pytest.raises(InputError, match=r"2,995 are the least; about [23]\d,\d00 distinct texts"):
        _too_few(pairs)  # of four texts, one may certify


def test_train_texts_train_and_choose_and_nothing_else() -> None:
    others = [Row(f"text {number}") for number in range(3500, 6000)]
    texts = split([*ROWS, ROWS[3]], None, [*others, *others[-5:]])
    train, choose, calibrate, report = texts.sizes
    assert texts.own == ROWS
    assert texts.removed == 500
    assert train + choose == 2000
    assert set(texts.taught) == set(range(4000, 6000))
    assert {texts.units[number].text for number in texts.taught} == {
        row.text for row in others[500:]
    }
    assert calibrate + report == 4000
    np.testing.assert_allclose(choose / 2000, 0.2, atol=0.03)
    np.testing.assert_allclose(report / 4000, 0.1, atol=0.03)


def test_train_texts_of_a_group_that_certifies_are_left_out() -> None:
    others = [Row(f"other {n}", fields={"dialogue": n}) for n in range(700, 900)]
    texts = split(ROWS, "dialogue", others)
    assert texts.removed == 100
    assert {texts.units[number].fields["dialogue"] for number in texts.taught} == {*range(800, 900)}


@pytest.mark.parametrize("nothing", [None, ""])  # as JSON and as CSV say it
def test_a_row_without_a_group_is_one_of_its_own(nothing: str | None) -> None:
    rows = [Row(row.text, fields={"dialogue": nothing}) for row in ROWS[1:]]
    texts = split([ROWS[0], *rows], "dialogue")
    assert texts.sizes[2] > 1500


@pytest.mark.parametrize(
    ("rows", "group", "train_rows", "message"),
    [
        ([Row("same")] * 30, None, None, "all 30 texts are equal"),
        ([*ROWS[:50], *[Row(" ")] * 50], None, None, "50 of 100 texts are empty .* `text_column`"),
        (ROWS[:4], None, None, "4 distinct texts are too few"),
        (
            ROWS,
            "speaker",
            None,
            'no row of the texts has a field "speaker" -> correct `group_column`',
        ),
        ([], None, None, "there are no texts"),
        (ROWS, None, [], "there are no train texts"),
        (ROWS, None, [Row("same")] * 30, "all 30 train texts are equal"),
        (ROWS, None, [*ROWS[:50], *[Row("")] * 50], "50 of 100 train texts are empty"),
        (ROWS, None, ROWS[7:100], "93 of 93 distinct train texts are among .* `train_texts`"),
        (ROWS, None, [*ROWS, Row("new")], "4,000 of 4,001 .* 1 are left; expected at least 100"),
    ],
)
def test_texts_that_cannot_be_split_or_teach_nothing_are_refused(
    rows: list[Row], group: str | None, train_rows: list[Row] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        split(rows, group, train_rows)


def test_a_group_is_the_same_as_a_number_and_as_text() -> None:
    rows = [Row(f"own {n}", fields={"id": n % 40}) for n in range(200)]
    others = [Row(f"other {n}", fields={"id": str(n % 80)}) for n in range(400)]
    assert split(rows, "id", others).removed == 200
