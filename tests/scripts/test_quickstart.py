"""What `scripts/quickstart` runs, with commands that only say how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORT_FP16 = "fpabee-export demo/model --output demo/engines-fp16 --fp16 --jobs 2 --force"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it is a shell script")


@pytest.mark.parametrize("has_rtx", [True, False])
def test_fp16_is_exported_where_rtx_can_be_installed(has_rtx: bool, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/quickstart", "scripts/_env", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / ".venv" / ".installed")
    says = '#!/bin/sh\necho "$(basename "$0") $*"\n'
    lacks_rtx = "" if has_rtx else 'case "$*" in *tensorrt_rtx*) exit 1;; esac\n'
    for name in ("python", "fpabee-export", "fpabee-run", "fpabee-calibrate"):
        (commands / name).write_text(says + (lacks_rtx if name == "python" else ""))
        (commands / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    done = subprocess.run(
        [tmp_path / "scripts" / "quickstart"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (EXPORT_FP16 in done.stdout.splitlines()) == has_rtx
    assert ("skipped: TensorRT for RTX is not installed" in done.stderr) != has_rtx
