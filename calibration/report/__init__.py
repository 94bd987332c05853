"""The report of a calibration: one HTML page, and all of it as PNG, CSV and JSON beside it.

Needs the extra `plot`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.errors import ArtifactError
from ...runtime.optional_packages import require
from ...runtime.progress import Progress
from ..result import Calibration
from .data import Record, gather, summary, tables

PAGE_NAME = "report.html"
"""The page; all it shows is in the file itself."""

_SEPARATOR = "|"


def write_report(
    result: Calibration,
    folder: str | Path,
    *,
    texts: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a calibration into a folder.

    `report.html` holds all that it shows; the figures stand beside it as PNG, the tables as CSV,
    and everything as `report.json`. Files of an earlier report are replaced; others are left
    alone. The page is written last.

    Args:
        result: the calibration.
        folder: where to write; it is made if it is not there.
        texts: whether the page shows texts of the rows, and the files hold them.
        progress: called with (what, done, total).

    Returns:
        The path of the page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        ArtifactError: the folder cannot be written, or the engines folder is damaged.
    """
    require("plot")
    from .html import render
    from .plots import draw

    told = progress or (lambda what, done, total: None)
    report = gather(result, texts, told)
    content = tables(report)
    told("report: draw", 0, 1)
    pictures = draw(report)
    page = render(report, content, pictures)
    files: dict[str, bytes | None] = {"report.json": _json({"summary": summary(report), **content})}
    for name, records in content.items():
        files[f"{name}.csv"] = _csv(records) if records else None
    for name, picture in pictures.items():
        files[f"{name}.png"] = None if picture is None else picture.png
    files[PAGE_NAME] = page.encode()
    _write(Path(folder), files)
    told("report: draw", 1, 1)
    return Path(folder) / PAGE_NAME


def check_place(folder: Path) -> None:
    """Check before a calibration that a report can have its folder.

    Raises:
        ArtifactError: the folder, or one that it would stand in, is a file.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArtifactError(
            f"cannot write the report into {folder}: {there} is a file",
            "give --report another folder",
        )


def _write(folder: Path, files: dict[str, bytes | None]) -> None:
    """Write files; those without content are not of this report, and an old one goes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            # Before it is written, too: a link would lead to a file that is not ours.
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the report into {folder}: {error.strerror}",
            "the operating points are in the manifest; give --report another folder",
        ) from error


def _csv(records: Sequence[Record]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows([_cell(value) for value in record.values()] for record in records)
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    """A value of a table as CSV has it: nothing for none, names joined, six digits."""
    if isinstance(value, tuple):
        return _SEPARATOR.join(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"
