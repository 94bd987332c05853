"""Markdown pages, from the templates in `scripts/templates`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **content: Any) -> str:
    """A page.

    Args:
        template: the name of its file, without the ending.
        content: what the template names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # this is Markdown
    )
    return environment.get_template(f"{template}.md.jinja").render(content).rstrip() + "\n"
