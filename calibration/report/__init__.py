"""The report of a calibration: one HTML page, without scripts, which fetches nothing.

It shows the operating points, score against depth, and where rows stop. It needs the extra `plot`.
"""

from __future__ import annotations

import base64
from pathlib import Path

from ...runtime.artifact.folder import read_manifest
from ...runtime.errors import ArtifactError
from ...runtime.machine import require
from ...runtime.rules.words import rule_in_words
from ..result import Calibration
from .words import exit_0_in_words, passes_in_words, promise_in_words


def write_report(result: Calibration, path: str | Path) -> None:
    """Write the report of a calibration.

    Args:
        result: the calibration.
        path: the page to write; its folder is made if it does not exist.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        ArtifactError: the page cannot be written, or the engines folder is damaged.
    """
    require("plot")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from .plots import draw

    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        rule=rule_in_words,
        exit_0=exit_0_in_words,
        passes=passes_in_words,
        promise=promise_in_words,
    )
    manifest = read_manifest(result.folder)
    page = environment.get_template("page.html").render(
        result=result,
        manifest=manifest,
        target=manifest.targets[result.target],
        pictures={
            name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
            for name, svg in draw(result).items()
        },
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"cannot write the report {path}: {error.strerror}",
            "the operating points are in the manifest; give another file as `report`",
        ) from error
