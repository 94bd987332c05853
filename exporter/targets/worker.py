"""Slow and fragile libraries run in processes of their own, so that a crash is only an error."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

_SIGKILL = 9  # on Windows, the module `signal` does not have it
_ERROR = "[E] "


def run_worker(module: str, request: msgspec.Struct, **environment: str) -> str:
    """Run a module of this folder, which reads a request as JSON from its standard input.

    Returns:
        Why it failed; empty if it did not.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}"],
        input=msgspec.json.encode(request),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode == 0:
        return ""
    if done.returncode == -_SIGKILL:
        return "the system ended the process, as happens when memory runs out"
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    # What TensorRT says itself, the cause first; the exception says little.
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    ended = f"the process ended with code {done.returncode}"
    return "; ".join(errors) or (lines or [ended])[-1]
