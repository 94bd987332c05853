"""Feeds a reader changed files, and judges what it does with them.

The reader must read a file or refuse it with an error of ours, in bounded time and memory.
Everything else is a find: another exception, a panic or a crash of a library, a file that takes
too long or too much memory. The first file of each kind of find is kept. Only for Linux.
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

import fpabee
from fpabee.runtime.errors import FpabeeError

from ..child_process import MIB, Child, Report, limit_memory, memory_of
from .targets import Target, every_target

# Accepted files that are changed further, and the largest of them.
_MOST_GROWN = 500
_LARGEST_GROWN = MIB // 16
# Larger inputs are not tried: any reader takes as much memory as it reads.
_LARGEST = 64 * MIB
# An input that exceeds its limits by this factor is stopped, so that it does no harm.
_HARD = 4
_PACKAGE = str(Path(fpabee.__file__).parent)


class Judge:
    """Reads one input after another, and checks errors, time and memory.

    Args:
        target: what reads the inputs.
        seconds: processor time that an input may take.
        mebibytes: memory that an input may take.

    Attributes:
        inputs: how many inputs were read.
        accepted: how many of them were read without an error.
    """

    def __init__(self, target: Target, seconds: float = 5.0, mebibytes: float = 256.0) -> None:
        self.inputs = 0
        self.accepted = 0
        self._target = target
        self._limits = (seconds, mebibytes)
        # What this imports and caches is not counted against the first input.
        target.path.write_bytes(target.seed)
        target.read()

    def __call__(self, data: bytes) -> list[str]:
        """Read an input; returns what is wrong with how it was read."""
        self._target.path.write_bytes(data)
        self.inputs += 1
        found = []
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory becomes what is in use
        before = memory_of("VmRSS")
        started = time.process_time()
        try:
            self._target.read()
            self.accepted += 1
        except FpabeeError:
            pass
        # A panic of a library in Rust is no Exception.
        except BaseException as error:  # noqa: BLE001
            found.append(_described(error))
        taken = memory_of("VmHWM") - before
        values = time.process_time() - started, taken / MIB
        for value, limit, unit in zip(values, self._limits, ("s", "MiB"), strict=True):
            if value > limit:
                found.append(f"more than {limit:g} {unit}")
        return found


def fuzz(name: str, place: Path, keep: Path, seconds: float, **folders: Path) -> dict[str, Path]:
    """Fuzz a target in a process of its own, which a crash ends.

    Args:
        name: of the target.
        place: an empty folder.
        keep: folder for the inputs that are finds; those of earlier runs are read first.
        seconds: for how long.
        **folders: the engines folder and the model folder of `every_target`.

    Returns:
        By what was found the file that gave it.
    """
    paths = {"place": place, "keep": keep, **folders}
    absolute = {key: str(path.absolute()) for key, path in paths.items()}
    ended = Child(_fuzz_here, name=name, seconds=seconds, **absolute).wait(seconds + 120)
    path, *reports = ended.reports
    finds = {found: Path(file) for found, file in reports}
    if ended.failure:
        finds[ended.failure] = _kept(keep, Path(path))
    return finds


def _fuzz_here(
    report: Report, name: str, place: str, keep: str, seconds: float, **folders: str
) -> None:
    """Fuzz a target in this process; reports the file that it reads, and then each find."""
    logging.disable()
    warnings.simplefilter("ignore")
    random = Random()
    ends = time.monotonic() + seconds
    target = every_target(Path(place), **{key: Path(path) for key, path in folders.items()})[name]
    report(str(target.path))
    judge = Judge(target)
    limit_memory(_HARD * 256)
    seen: set[str] = set()
    earlier = [path.read_bytes() for path in sorted(Path(keep).glob(f"*{target.path.name}"))]
    waiting = [target.seed, *earlier]
    grown = [target.seed]
    while waiting or time.monotonic() < ends:
        start = target.seed if random.random() < 0.5 else random.choice(grown)
        data = waiting.pop() if waiting else _changed(target, start, random)
        accepted = judge.accepted
        faulthandler.dump_traceback_later(_HARD * 5, exit=True)
        for found in set(judge(data)) - seen:
            seen.add(found)
            report((found, str(_kept(Path(keep), target.path))))
        if judge.accepted > accepted and len(data) <= _LARGEST_GROWN:
            grown[_MOST_GROWN - 1 :] = [data]
            random.shuffle(grown)
    faulthandler.cancel_dump_traceback_later()


def _changed(target: Target, start: bytes, random: Random) -> bytes:
    """A changed input that is not too large."""
    while True:
        with suppress(MemoryError):
            data = target.mutate(start, random)
            if len(data) <= _LARGEST:
                return data


def _kept(keep: Path, path: Path) -> Path:
    """Keep a copy of an input."""
    data = path.read_bytes()
    keep.mkdir(parents=True, exist_ok=True)
    copy = keep / f"{hashlib.sha256(data).hexdigest()[:8]}-{path.name}"
    copy.write_bytes(data)
    return copy


def _described(error: BaseException) -> str:
    """The error and the last of our lines that it passed: what makes two finds the same."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{where}"
