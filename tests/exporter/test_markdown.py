"""Texts of others in Markdown."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from fpabee.exporter.markdown import MarkdownFormatter, in_markdown

TEXTS = (
    "book_restaurant, a_b_",
    "*b* `c` ~~d~~ \\_e | f",
    "<script>alert(1)</script> &amp; &#42;",
    "[here](https://example.com) ![x](y) <https://example.com>",
    "- 1. # > a",
)


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(f"Name: {in_markdown(text)}")
    (inline,) = (block for block in blocks if block.children)
    shown = inline.children or []
    assert {part.type for part in shown} <= {"text", "text_special"}
    assert "".join(part.content for part in shown) == f"Name: {text}"


def test_a_text_stays_in_its_line_and_is_no_address() -> None:
    found = MarkdownFormatter().format("- {name}: {number:.1f}", name="a\n# b", number=-0.25)
    assert found == "- a\\\\n# b: -0.2"
    assert "://" not in in_markdown("https://example.com")
