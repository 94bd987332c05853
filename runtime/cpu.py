"""What the operating system says about the processor."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(1)
def cpu_info() -> dict[str, str]:
    """What Linux reports about the first core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines()[:40] if file.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
