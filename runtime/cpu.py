"""What the operating system says about the processor."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


@lru_cache(1)
def cpu_info() -> dict[str, str]:
    """What Linux reports about the first core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines()[:40] if file.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def multiplies_int8() -> bool:
    """Whether products of int8 are exact. Where this cannot be found out, it is assumed.

    Without VNNI instructions, x86 adds two products of unsigned and signed int8 in 16 bits. Large
    sums are cut off, so a model would give other answers than on the machine that verified it.
    """
    flags = cpu_info().get("flags", "").split()
    return platform.machine() not in ("x86_64", "AMD64") or not flags or not _VNNI.isdisjoint(flags)
