"""What `scripts/quickstart` runs, with commands that only print how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.runtime import read_rows

ROOT = Path(__file__).parents[2]
EXPORT_FP16 = "fpabee-export --from demo/engines --fp16"


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script where every command only prints how it was called, or does what is given."""
    if os.name == "nt":
        pytest.skip("quickstart is a shell script")
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/quickstart", "scripts/_env", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / ".venv" / ".installed")

    def run(**bodies: str) -> subprocess.CompletedProcess[str]:
        for name in ("python", "fpabee-train", "fpabee-export", "fpabee-run", "fpabee-calibrate"):
            body = bodies.get(name.removeprefix("fpabee-"), "")
            (commands / name).write_text(f'#!/bin/sh\necho "$(basename "$0") $*"\n{body}\n')
            (commands / name).chmod(0o755)
        return subprocess.run(
            [tmp_path / "scripts" / "quickstart"],
            env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("has_rtx", [True, False])
def test_fp16_is_exported_where_rtx_can_be_installed(
    has_rtx: bool, quickstart: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    lacks_rtx = 'case "$*" in *tensorrt_rtx*) exit 1;; esac'
    done = quickstart(python="" if has_rtx else lacks_rtx)
    assert done.returncode == 0, done.stderr
    assert (EXPORT_FP16 in done.stdout.splitlines()) == has_rtx
    assert ("skipped: TensorRT for RTX is not installed" in done.stderr) != has_rtx
    run = "fpabee-run demo/engines scripts/demo_data/test.jsonl.gz --metrics --output demo/test"
    assert done.stdout.splitlines()[-2:] == [f"{run}_full.jsonl --full-depth", f"{run}.jsonl"]


def test_the_demo_data_are_as_documented() -> None:
    folder, seen = ROOT / "scripts" / "demo_data", Counter[str]()
    for name, count in {"train": 4000, "dev": 800, "test": 800}.items():
        rows = list(read_rows(folder / f"{name}.jsonl.gz"))
        assert len(rows) == count
        assert set(Counter(row.labels for row in rows).values()) == {count // 16}
        seen.update(row.text.casefold() for row in rows)
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert len(texts) == 20
    seen.update(text.casefold() for text in texts)
    assert set(seen.values()) == {1}, "no request occurs twice"
