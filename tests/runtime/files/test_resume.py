"""`--resume`: runs that are killed, interrupted or out of space, and the same bytes afterwards."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from pyarrow import parquet

from fpabee.runtime import InputError
from fpabee.runtime.core import Core
from fpabee.runtime.files.destination import Partial

from ...doubles.calls import before
from ..running import Result, Run, check_refused, write_lines

ROWS = 400
RULE = ("--rule", "entropy threshold=0.9", "--scores", "--quiet")
WORDS = ["the", "a", "film", "rain", "sun", "lights", "alarm", "off", "good", "bad", "not", "it"]

# Small blocks of several windows each, so that a run stops within a block and a window.
SMALL = {
    "fpabee.runtime.files.run.BLOCK_ROWS": 64,
    "fpabee.runtime.core._WINDOW_BYTES": 1,
    "fpabee.runtime.backends.host._GROUP_TOKENS": 64,
}
START = f"""
import os, random, resource, signal
from fpabee.commands.run import main
from fpabee.runtime.files.destination import Partial
from unittest.mock import patch
for name, value in {SMALL}.items():
    patch(name, value).start()
write = Partial.write
def stop(self, record):
    STOP
    write(self, record)
Partial.write = stop
main()
"""
# At the 150th row, which is within the third block.
STOPS = {
    "killed within a line": """if self.rows == 150:
        self._stream.write(b'{"index": 150, "lab')
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)""",
    # The system's own limit: a write that ends within a line, as on a full disk.
    "no space": "resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))",
}


def fail_at(patch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
    """Let the writing of results fail at a row."""

    def stop(partial: Partial, _: object) -> None:
        if partial.rows == rows:
            raise error

    before(patch, Partial, "write", stop)


@dataclass
class Classify:
    """Classifies `source` into `output`, in this process or in another one."""

    run: Run
    engines: Path
    source: Path
    output: Path
    patch: pytest.MonkeyPatch
    rule: Sequence[str] = RULE

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.output.parent.iterdir())

    def arguments(self, *options: object) -> list[str]:
        given = (self.engines, self.source, "--output", self.output)
        return [str(argument) for argument in (*given, *self.rule, *options)]

    def __call__(self, *options: object) -> Result:
        return self.run(*self.arguments(*options))

    def unbroken(self) -> bytes:
        """What a run writes that nothing stops."""
        output = self.output
        self.output = self.output.with_name(f"unbroken.{self.output.name}")
        assert self().code == 0
        content = self.output.read_bytes()
        self.output.unlink()
        self.output = output
        return content

    def process(self, stop: str, *options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", START.replace("STOP", stop), *self.arguments(*options)]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)

    def fail_at(self, rows: int, error: BaseException) -> Result:
        """A run in which writing fails at a row."""
        with self.patch.context() as patch:
            fail_at(patch, rows, error)
            return self()

    def interrupt(self, rows: int = 100) -> None:
        stopped = self.fail_at(rows, KeyboardInterrupt())
        said = stopped.err.strip()  # older versions of rich end a progress bar with an empty line
        assert (stopped.code, said.count("\n")) == (130, 0)
        assert said.startswith(f"interrupted: {rows} finished rows are in {self.partial}")
        assert "--resume" in stopped.err


@pytest.fixture
def classify(run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Classify:
    chosen = random.Random(5)
    texts = (" ".join(chosen.choices(WORDS, k=chosen.randint(1, 12))) for _ in range(ROWS))
    rows = ({"text": text, "id": number} for number, text in enumerate(texts))
    source = write_lines(tmp_path / "in.jsonl", *rows)
    return Classify(run, bert, source, tmp_path / "out.jsonl", monkeypatch)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no limits")
@pytest.mark.parametrize("how", STOPS)
def test_a_resumed_run_gives_the_same_bytes(classify: Classify, small: None, how: str) -> None:
    expected = classify.unbroken()
    stopped = classify.process(STOPS[how])
    err = stopped.stderr
    assert not classify.output.exists()
    done = whole_lines(classify.partial)
    if how == "no space":
        assert stopped.returncode == 1
        assert err.startswith(f"error: cannot write {classify.output}: File too large")
        assert "--resume" in err
        assert 64 < done < ROWS
        assert not classify.partial.read_bytes().endswith(b"\n")
    else:
        assert (stopped.returncode, done) == (-signal.SIGKILL, 150)
    # No finished row is lost, now or later.
    completed = b"".join(classify.partial.read_bytes().splitlines(keepends=True)[:done])
    assert expected.startswith(completed)
    assert classify("--resume") == Result(0, "", "")
    assert classify.output.read_bytes() == expected
    assert classify.files == ["in.jsonl", "out.jsonl"]


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments(
    classify: Classify, small: None, pytestconfig: pytest.Config
) -> None:
    expected = classify.unbroken()
    killed = 0
    ends = time.monotonic() + pytestconfig.getoption("--seconds")
    # Nothing handles this signal, so that it ends the process like `kill -9`.
    dies = "self.rows % 50 or signal.setitimer(signal.ITIMER_REAL, random.expovariate(10))"
    while time.monotonic() < ends or not killed:
        while (ended := classify.process(dies, "--resume")).returncode:
            assert (ended.returncode, ended.stderr) == (-signal.SIGALRM, "")
            killed += 1
        assert classify.output.read_bytes() == expected
        assert classify.files == ["in.jsonl", "out.jsonl"]
        classify.output.unlink()


def test_a_table_is_resumed_with_rows_that_stopped_at_exit_0(
    classify: Classify, small: None, exit_0_engines: Mapping[str, Path]
) -> None:
    classify.output = classify.output.with_name("out.parquet")
    classify.engines = exit_0_engines["bert"]
    classify.rule = ("--rule", "entropy threshold=0.9 exit_0_threshold=0.6", *RULE[2:])
    expected = classify.unbroken()
    classify.interrupt(150)
    assert whole_lines(classify.partial) == 150
    assert 10 < classify.partial.read_bytes().count(b'"exit": 0,') < 140
    assert classify("--resume") == Result(0, "", "")
    assert classify.output.read_bytes() == expected
    assert parquet.read_table(classify.output).num_rows == ROWS


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_is_left_if_no_row_is_done(classify: Classify) -> None:
    check_refused(classify.fail_at(0, NO_SPACE), "No space left on device")
    assert classify.files == ["in.jsonl"]


def test_a_disk_that_is_full_when_the_table_is_made(classify: Classify) -> None:
    classify.output = classify.output.with_name("out.csv")
    classify.output.write_text("old")

    def full(partial: Path, target: Path, **_: object) -> None:
        target.write_text("half")
        raise NO_SPACE

    with classify.patch.context() as patch:
        patch.setattr("fpabee.runtime.files.jobs.convert", full)
        check_refused(classify(), "No space left on device", f"{ROWS} finished rows are in")
    assert classify.output.read_text() == "old"
    assert classify.files == ["in.jsonl", "out.csv", "out.csv.partial", "out.csv.partial.run"]

    classify.patch.setattr(Core, "stream", Mock(side_effect=AssertionError("all rows are done")))
    assert classify("--resume").code == 0
    assert whole_lines(classify.output) == ROWS + 1


def test_the_summary_is_that_of_all_rows(
    classify: Classify, exit_0_engines: Mapping[str, Path]
) -> None:
    classify.engines = exit_0_engines["bert"]
    labels = ["music", "weather", "alarm", "travel"]
    lines = [
        json.dumps({"text": f"rain {n} the" * (n % 9), "label": labels[n % 4]}) for n in range(60)
    ]
    lines[7] = lines[50] = "{"
    classify.source.write_text("\n".join(lines) + "\n")
    classify.rule = ("--metrics", "--on-error", "skip")
    classify.rule += ("--rule", "pabee patience=1 exit_0_threshold=0.6")

    def told(err: str) -> list[str]:
        """Everything but times and the rows of the earlier run."""
        return [line for line in err.splitlines() if "rows/s" not in line and "earlier" not in line]

    unbroken = classify()
    classify.interrupt(33)
    resumed = classify("--resume")
    assert told(resumed.err) == told(unbroken.err)
    assert "2 rows could not be used" in resumed.err
    assert "33 rows were done by an earlier run" in resumed.err
    classify.interrupt(33)
    content = json.loads(classify("--resume", "--json").err)
    assert content["rows_per_second"] * content["seconds"] == pytest.approx(
        60 - 33 - 1, rel=1e-3
    ), "answered by this run"
    ran = sum(part["layer"] * part["rows"] for part in content["exits"])
    assert content["exits"][0]["layer"] == 0
    assert 0 < content["exits"][0]["rows"] < 58
    assert content["mean_depth"] == pytest.approx(ran / 58), "of the rows that could be read"


def test_a_resume_with_other_settings_is_refused(
    classify: Classify, engines: Mapping[str, Path]
) -> None:
    classify.interrupt()
    before = classify.partial.read_bytes()
    for options, says in (
        (["--rule", "entropy threshold=0.8"], "threshold"),
        (["--with-text"], "with_text was false and is true"),
        (["--max-length", "9"], "max_length was null and is 9"),
        (["--threads", "1"], "threads was null and is 1"),
        (["--column", "text=id"], "text_column was"),
        (["--input-format", "txt"], "input_format was"),
        (["--metrics"], "metrics was"),
    ):
        check_refused(classify(*options, "--resume"), "is from another run", says)
    check_refused(classify(), "holds 100 rows of a run that did not finish", "--resume")
    classify.engines = engines["albert"]
    check_refused(classify("--resume"), "engines was")
    assert classify.partial.read_bytes() == before
    classify.partial.unlink()
    assert classify("--resume").code == 0, "with nothing to resume it starts"
    assert whole_lines(classify.output) == ROWS


def test_a_resume_on_a_changed_input_is_refused(classify: Classify) -> None:
    classify.interrupt()
    source = classify.source
    times = classify.source.stat()
    content = source.read_bytes()
    source.write_bytes(content[:-20] + content[-20:].replace(b"9", b"8"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.stat().st_size == times.st_size
    check_refused(classify("--resume"), f"the SHA-256 of {source} was")
    classify.source = source.rename(source.with_name("other.jsonl"))
    check_refused(classify("--resume"), f'inputs was ["{source}"] and is ["{classify.source}"]')


def test_a_damaged_partial_is_refused(classify: Classify) -> None:
    classify.interrupt()
    record = classify.partial.with_name("out.jsonl.partial.run")
    rows = classify.partial.read_bytes()
    settings = record.read_text()
    for old, new, says in (
        (b"{", b"[" * 10**5 + b"\n{", "line 1 is damaged"),
        (b'x": 7', b'x": 8', "line 8 is damaged"),
        (b'"exit"', b'"exits"', "line 1 is damaged"),
    ):
        classify.partial.write_bytes(rows.replace(old, new, 1))
        record.write_text(settings)
        check_refused(classify("--resume"), says, "start again")
    classify.partial.write_bytes(rows)
    for content in ("{", "[]", None):
        record.write_text(content) if content else record.unlink()
        check_refused(classify("--resume"), "out.jsonl.partial.run", "start again")


def test_a_run_that_stopped_at_a_bad_row_can_skip_it(classify: Classify) -> None:
    classify.patch.setattr("fpabee.runtime.files.run.BLOCK_ROWS", 2)
    classify.source.write_text('{"text": "a"}\n{"text": "b"}\n{\n{"text": "c"}\n')
    check_refused(classify(), "line 3 is not a JSON object", "2 finished rows are in")
    gc.disable()  # which would close what the error's frames keep
    try:
        check_refused(classify("--resume"), "line 3 is not a JSON object")
        kept = [item for item in gc.get_objects() if type(item) is io.BufferedReader]
    finally:
        gc.enable()
    ours = (str(classify.source), str(classify.partial))
    assert not [stream for stream in kept if stream.name in ours and not stream.closed]
    assert classify("--resume", "--on-error", "skip").code == 0
    resumed = classify.output.read_bytes()
    classify("--on-error", "skip")
    assert classify.output.read_bytes() == resumed


def test_two_runs_cannot_write_the_same_file(classify: Classify) -> None:
    other = Partial(classify.output, {}, resume=False)
    try:
        for options in ([], ["--resume"]):
            check_refused(classify(*options), "is being written by another run")
    finally:
        other.close(keep=False)
    assert classify().code == 0


def test_a_run_that_is_refused_leaves_the_rows_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the other one has made the file between two steps of this one."""
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _: False)
        first = Partial(output, {}, resume=False)
        with pytest.raises(InputError, match="is being written by another run"):
            Partial(output, {}, resume=False)
    first.write({"index": 0, "exit": 1})
    first.finish(None)
    assert output.read_text() == '{"index": 0, "exit": 1}\n'


def test_what_cannot_be_resumed(classify: Classify) -> None:
    arguments = (classify.engines, "-", "--output", classify.output, "--resume")
    check_refused(classify.run(*arguments, stdin=b"a\n"), "can be read only once")
    assert classify.files == ["in.jsonl"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_settings_of_a_run_that_begins_at_the_end_of_another_stay(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    first = Partial(output, {"run": 1}, resume=False)
    first.write({"index": 0, "exit": 1})
    replace = Path.replace
    others: list[Partial] = []

    def then_another(path: Path, target: Path) -> Path:
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved = replace(path, target)
        others.append(Partial(output, {"run": 2}, resume=False))
        return moved

    monkeypatch.setattr(Path, "replace", then_another)
    settings = tmp_path / "out.jsonl.partial.run"
    if fails:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            first.finish(None)
        assert json.loads(settings.read_text()) == {"run": 1}
        first.leave()
        return
    first.finish(None)
    assert json.loads(settings.read_text()) == {"run": 2}
    others[0].close(keep=False)


def test_a_table_that_cannot_be_written_leaves_the_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, writing them again would lose them."""
    partial = Partial(tmp_path / "out.csv", {"run": 1}, resume=False)
    partial.write({"index": 0, "exit": 1})
    monkeypatch.setattr(Partial, "_write_settings", Mock(side_effect=AssertionError))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        partial.finish(Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    partial.leave()
    assert json.loads((tmp_path / "out.csv.partial.run").read_text()) == {"run": 1}
