"""Judges what a reader does with a file: read, refused in our words, or a find."""

from __future__ import annotations

import hashlib
import resource
import time
import traceback
from pathlib import Path

import msgspec
from fuzz_targets import Target

import fpabee
from fpabee.runtime.errors import FpabeeError

MIB = 2**20
BROKEN = 3
"""Exit code of a worker that failed by itself, and not by an input."""
_PACKAGE = str(Path(fpabee.__file__).parent)


class Job(msgspec.Struct, kw_only=True):
    """What to do, and where.

    Attributes:
        engines: an engines folder.
        model_dir: the folder of a model, or none.
        target: name of the target.
        place: an empty folder.
        keep: folder for the inputs that are finds.
        report: file for the `Report`.
        seconds: processor time that one input may take, that of child processes included.
        mebibytes: memory that one input may take in a process.
    """

    engines: str
    model_dir: str | None
    target: str
    place: str
    keep: str
    report: str
    seconds: float
    mebibytes: float


class Find(msgspec.Struct):
    """What should not have happened.

    Attributes:
        what: the error, and where.
        file: an input that gave it.
        times: how many did.
    """

    what: str
    file: str
    times: int = 1


class Report(msgspec.Struct):
    """What became of the inputs.

    Attributes:
        path: where the input stands that is being read.
        inputs: how many were read.
        accepted: of them without an error.
        refused: with an error of ours.
        seconds: longest processor time of one.
        mebibytes: most memory that one took beside what was in use.
        finds: everything else.
    """

    path: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    mebibytes: float = 0.0
    finds: list[Find] = []

    def add(self, what: str, data: bytes, keep: Path) -> None:
        """Note a find; the first input of a kind is kept."""
        if known := self._known(what):
            known.times += 1
            return
        name = f"{hashlib.sha256(data).hexdigest()[:8]}-{Path(self.path).name}"
        keep.mkdir(parents=True, exist_ok=True)
        (keep / name).write_bytes(data)
        self.finds.append(Find(what, str(keep / name)))

    def join(self, other: Report) -> None:
        """Add what became of other inputs."""
        self.path = other.path
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.seconds = max(self.seconds, other.seconds)
        self.mebibytes = max(self.mebibytes, other.mebibytes)
        for find in other.finds:
            if known := self._known(find.what):
                known.times += find.times
            else:
                self.finds.append(find)

    def _known(self, what: str) -> Find | None:
        return next((find for find in self.finds if find.what == what), None)


class Judge:
    """Reads one input after another, and holds time, memory and errors against the bounds.

    Raises:
        FpabeeError: not even the first file to begin with can be read.
    """

    def __init__(self, job: Job, target: Target) -> None:
        self._job = job
        self._target = target
        self._file = Path(job.report)
        self.report = Report(str(target.path))
        # Once beforehand: what is imported then is to the account of no input.
        target.path.write_bytes(target.seeds[0])
        target.read()
        self._children = _peak_of_children()
        self._write()

    def __call__(self, data: bytes) -> None:
        """Read an input."""
        report, job = self.report, self._job
        self._target.path.write_bytes(data)
        report.inputs += 1
        children = _peak_of_children()
        before, started = _reset_peak(), _processor_time()
        what = ""
        try:
            self._target.read()
        except FpabeeError:
            report.refused += 1
        # A panic of a library in Rust is no Exception.
        except BaseException as error:  # noqa: BLE001
            what = _described(error)
        else:
            report.accepted += 1
        seconds = _processor_time() - started
        mebibytes = (memory_of("VmHWM") - before) / MIB
        # A child that took no more than another before it shows nothing.
        if _peak_of_children() > children:
            mebibytes = max(mebibytes, (_peak_of_children() - self._children) / MIB)
        report.seconds = max(report.seconds, seconds)
        report.mebibytes = max(report.mebibytes, mebibytes)
        for found in (
            what,
            f"more than {job.seconds:g} s" if seconds > job.seconds else "",
            f"more than {job.mebibytes:g} MiB" if mebibytes > job.mebibytes else "",
        ):
            if found:
                report.add(found, data, Path(job.keep))
        self._write()

    def _write(self) -> None:
        self._file.write_bytes(msgspec.json.encode(self.report))


def _described(error: BaseException) -> str:
    """The error and the line of ours that it passed last: what makes two finds one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{where}"


def memory_of(name: str) -> int:
    """Bytes, by their name in Linux's `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_of_children() -> int:
    """Bytes that the largest child had that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _reset_peak() -> int:
    """Make the peak of memory what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of("VmRSS")
