"""The report of a calibration: one HTML page, with its tables as CSV and JSON files beside it.

The page has four parts: score against speed-up, where rows stop, how far each exit can be trusted,
and the rows whose answer changed. It needs the extra `plot`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.artifact.folder import check_outside
from ...runtime.errors import ArtifactError, Remedy
from ...runtime.optional_packages import require
from ...runtime.progress import Progress, silent
from ..result import Calibration
from .data import Record, gather, summary, tables

PAGE_NAME = "report.html"
"""The name of the page, which is self-contained."""

_SEPARATOR = "|"


def write_report(
    result: Calibration,
    folder: str | Path,
    *,
    texts: bool = True,
    progress: Progress = silent,
) -> Path:
    """Write the report of a calibration into a folder.

    Files of an earlier report are replaced, and other files are left alone. The page is written
    last.

    Args:
        result: the calibration.
        folder: where to write; it is created if it does not exist.
        texts: whether the page and the files contain the texts of the rows.
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

    report = gather(result, texts, progress)
    content = tables(report)
    progress("report: draw", 0, 1)
    page = render(report, draw(report))
    files = {"report.json": _json({"summary": summary(report), **content})}
    files |= {f"{name}.csv": _csv(records) for name, records in content.items()}
    _write(Path(folder), files | {PAGE_NAME: page.encode()})
    progress("report: draw", 1, 1)
    return Path(folder) / PAGE_NAME


def check_place(folder: Path) -> None:
    """Check before a calibration that its report can be written into a folder.

    Raises:
        ArtifactError: the folder, or one of its parents, is a file.
        InputError: the folder is, or is inside, an engines folder or a model_dir.
    """
    check_outside(folder / PAGE_NAME)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ArtifactError(
            f"cannot write the report into {folder}: {existing} is a file",
            Remedy("give another folder as {report}"),
        )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files; an empty one removes the file of an earlier report instead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            # A link would lead to a file that does not belong to the report.
            (folder / name).unlink(missing_ok=True)
            if content:
                (folder / name).write_bytes(content)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the report into {folder}: {error.strerror}",
            Remedy("the operating points are in the manifest; give another folder as {report}"),
        ) from error


def _csv(records: Sequence[Record]) -> bytes:
    if not records:
        return b""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows([_cell(value) for value in record.values()] for record in records)
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return _SEPARATOR.join(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"
