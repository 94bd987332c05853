"""The errors of `scripts/verify_trt.py`, which needs a GPU for all else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_trt.py"


def test_a_target_that_has_no_plans_is_a_usage_error(engines: Mapping[str, Path]) -> None:
    command = [sys.executable, str(SCRIPT), str(engines["bert"]), "--target", "onnxruntime-fp32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "onnxruntime-fp32" in done.stderr
