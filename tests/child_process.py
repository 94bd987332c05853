"""Runs a function in a process of its own, under limits, and says how that process ended.

The function takes a callback as its first argument. What it passes to the callback reaches the
parent as JSON.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = Callable[[Any], None]

MIB = 2**20
_ROOT = Path(__file__).parents[1]
# Lines of standard error that tell why a process died.
_TELLING = ("Error", "Fatal", "Timeout", "panicked", "overflow", "memory allocation")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        reports: what the function reported, in order.
        failure: why the process failed; empty if the function returned.
    """

    reports: list[Any]
    failure: str


class Child:
    """A process that runs a function; it starts at once.

    Args:
        function: a function of a module; its first parameter is the `Report`.
        **arguments: its other arguments; they must be representable in JSON.
    """

    def __init__(self, function: Callable[..., None], **arguments: Any) -> None:
        name = f"{function.__module__}:{function.__qualname__}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.child_process", name, json.dumps(arguments)],
            cwd=_ROOT,
            # glibc gives freed buffers back at once; otherwise gaps fill the heap of each thread.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, seconds: float) -> Ended:
        """Wait for the end of the process, and kill it if that takes too long."""
        failure = ""
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate()
            failure = f"did not end within {seconds:g} s"
        if self._process.returncode and not failure:
            telling = [line for line in err.splitlines() if any(word in line for word in _TELLING)]
            failure = " ".join([f"exit code {self._process.returncode}:", *telling[-2:]])
        return Ended([json.loads(line) for line in out.splitlines()], failure)


def forked(function: Callable[[Report], object], seconds: int) -> Ended:
    """Run a function in a fork of this process, which is killed if that takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)  # ends the process even where it waits in a library
        code = 1
        try:
            with os.fdopen(writing, "w", buffering=1) as reports:
                function(lambda report: print(json.dumps(report), file=reports))
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as reports:
        out = reports.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    failure = f"did not end within {seconds} s" if code == -signal.SIGALRM else f"exit code {code}"
    return Ended([json.loads(line) for line in out.splitlines()], failure if code else "")


def limit_memory(more: float) -> None:
    """Let this process take so many MiB more than it has now; an allocation beyond that fails."""
    most = memory_of("VmData") + round(more * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def memory_of(name: str, process: int | str = "self") -> int:
    """Bytes that Linux's `/proc/PROCESS/status` gives under a name."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _main(name: str, arguments: str) -> None:
    faulthandler.enable()
    # Whatever else is printed must not mix with the reports.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, function = name.split(":")
    run = getattr(importlib.import_module(module), function)
    run(lambda report: print(json.dumps(report), file=reports), **json.loads(arguments))


if __name__ == "__main__":
    _main(*sys.argv[1:])
