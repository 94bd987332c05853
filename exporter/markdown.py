"""Texts of others in a model card."""

from __future__ import annotations

import html
import re
from string import Formatter
from typing import Any

from ..runtime.errors import printable

# What begins code, emphasis, a link, a cell or a line through the text, and an address.
_SPECIAL = re.compile(r"[\\`*_\[\]|~]|(?<=:)/")


def in_markdown(text: str) -> str:
    """A text in one line that Markdown shows as it is: without markup, HTML or links."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


class MarkdownFormatter(Formatter):
    """Formats a template whose fields are texts, see `in_markdown`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """One field."""
        return in_markdown(str(super().format_field(value, format_spec)))
