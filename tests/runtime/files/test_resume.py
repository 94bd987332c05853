"""`--resume`: processes that are killed, interrupted or out of space, and the same bytes after."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from fpabee.runtime import Engine, Prediction
from fpabee.runtime.files import destination as outputs
from fpabee.runtime.files.partial import Partial

from ..running import Run, check_refused, write_lines

ROWS = 400
RULE = ["--rule", "entropy", "--threshold", "0.9", "--all-scores", "--quiet"]

# Small blocks of several windows each, so that a run stops within a block and a window.
SMALL = """
import os, resource, signal, sys
import fpabee.runtime.backends.onnxruntime as backend
import fpabee.runtime.engine as engine
import fpabee.runtime.files.job as run
from fpabee.runtime.files.partial import Partial
run.BLOCK_ROWS, engine._WINDOW_BYTES, backend._GROUP_TOKENS = 64, 1, 64
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
START = "from fpabee.runtime.cli.run import main; main()"
# At the 150th row: within the third block.
STOPS = {
    "killed": """
write = Partial.write
def stop(self, record):
    write(self, record)
    if self.rows == 150:
        os.kill(os.getpid(), signal.SIGKILL)
Partial.write = stop
""",
    "killed within a line": """
write = Partial.write
def stop(self, record):
    if self.rows == 150:
        self._stream.write(b'{"index": 150, "lab')
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, record)
Partial.write = stop
""",
    "Ctrl-C": """
write = Partial.write
def stop(self, record):
    write(self, record)
    if self.rows == 150:
        os.kill(os.getpid(), signal.SIGINT)
Partial.write = stop
""",
    # The system's own limit: a write that ends within a line, as on a full disk.
    "no space": "resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    chosen = random.Random(5)
    words = (
        "the",
        "a",
        "film",
        "rain",
        "sun",
        "lights",
        "alarm",
        "off",
        "good",
        "bad",
        "not",
        "it",
    )
    return write_lines(
        tmp_path / "in.jsonl",
        *(
            {"text": " ".join(chosen.choices(words, k=chosen.randint(1, 12))), "id": number}
            for number in range(ROWS)
        ),
    )


def process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SMALL + code + START, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpabee.runtime.files.job.BLOCK_ROWS", 64)
    monkeypatch.setattr("fpabee.runtime.engine._WINDOW_BYTES", 1)
    monkeypatch.setattr("fpabee.runtime.backends.onnxruntime._GROUP_TOKENS", 64)


@pytest.mark.parametrize("how", STOPS)
def test_a_resumed_run_gives_the_same_bytes(
    run: Run, small: None, bert: Path, source: Path, tmp_path: Path, how: str
) -> None:
    unbroken, output = tmp_path / "unbroken.jsonl", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    assert run(bert, "--input", source, "--output", unbroken, *RULE).code == 0
    expected = unbroken.read_bytes()

    stopped = process(STOPS[how], bert, "--input", source, "--output", output, *RULE)
    assert not output.exists()
    done = whole_lines(partial)
    if how == "no space":
        assert stopped.returncode == 1
        assert stopped.stderr.startswith("error: cannot write ")
        assert "File too large; " in stopped.stderr
        assert 64 < done < ROWS
        assert not partial.read_bytes().endswith(b"\n")
    else:
        code = 130 if how == "Ctrl-C" else -signal.SIGKILL
        assert (stopped.returncode, done) == (code, 150)
    if how == "Ctrl-C":
        assert stopped.stderr == (
            f"interrupted: 150 finished rows are in {partial} -> use --resume to continue\n"
        )
    # No finished row is lost, now or later.
    completed = b"".join(partial.read_bytes().splitlines(keepends=True)[:done])
    assert expected.startswith(completed)

    resumed = process("", bert, "--input", source, "--output", output, *RULE, "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert output.read_bytes() == expected
    assert files(tmp_path) == ["in.jsonl", "out.jsonl", "unbroken.jsonl"]


def test_a_resumed_run_puts_the_same_rows_together(
    run: Run, bert: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.runtime.files.job.BLOCK_ROWS", 64)
    calls: list[list[Any]] = []
    stream = Engine.stream

    def noted(self: Engine, texts: list[Any], **options: Any) -> Iterator[Prediction]:
        calls.append(texts)
        return stream(self, texts, **options)

    monkeypatch.setattr(Engine, "stream", noted)
    run(bert, "--input", source, *RULE)
    unbroken, calls = calls, []
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, *arguments, rows=150)
    assert calls == unbroken[:3]
    calls = []
    assert run(*arguments, "--resume").code == 0
    # The third block as a whole, though 22 of its rows stand already; the first two not.
    assert calls == unbroken[2:]


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.jsonl.gz"])
def test_other_formats_resume_too(
    run: Run, small: None, bert: Path, source: Path, tmp_path: Path, name: str
) -> None:
    unbroken, output = tmp_path / f"unbroken.{name}", tmp_path / name
    run(bert, "--input", source, "--output", unbroken, *RULE)
    stopped = process(STOPS["killed"], bert, "--input", source, "--output", output, *RULE)
    assert stopped.returncode == -signal.SIGKILL
    assert whole_lines(tmp_path / f"{name}.partial") == 150
    assert run(bert, "--input", source, "--output", output, *RULE, "--resume").code == 0
    assert output.read_bytes() == unbroken.read_bytes()
    if name == "out.parquet":
        assert parquet.read_table(output).num_rows == ROWS


def test_killed_from_outside_again_and_again(
    run: Run, small: None, bert: Path, source: Path, tmp_path: Path
) -> None:
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    slow = """
import time
write = Partial.write
def slowly(self, record):
    time.sleep(0.005)
    write(self, record)
Partial.write = slowly
"""
    arguments = [bert, "--input", source, "--output", output, *RULE, "--resume"]
    before = 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-c", SMALL + slow + START, *map(str, arguments)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
            deadline = time.monotonic() + 60
            while not partial.exists() or whole_lines(partial) < before + 40:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            child.send_signal(number)
        now = whole_lines(partial)
        assert now >= before + 40
        before = now
    assert not output.exists()
    assert run(*arguments).code == 0
    unbroken = tmp_path / "unbroken.jsonl"
    run(bert, "--input", source, "--output", unbroken, *RULE)
    assert output.read_bytes() == unbroken.read_bytes()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
    """Let writing fail at a row, once."""
    write = Partial.write

    def stop(self: Partial, record: dict[str, Any]) -> None:
        if self.rows == rows:
            monkeypatch.setattr(Partial, "write", write)
            raise error
        write(self, record)

    monkeypatch.setattr(Partial, "write", stop)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(
    run: Run, bert: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    interrupt_at(monkeypatch, 100, NO_SPACE)
    refused = run(bert, "--input", source, "--output", output, *RULE)
    check_refused(
        refused,
        "No space left on device",
        "100 finished rows are in",
        "--resume",
    )
    assert run(bert, "--input", source, "--output", output, *RULE, "--resume").code == 0
    assert output.read_text() == run(bert, "--input", source, *RULE).out


def test_a_disk_that_is_full_when_the_table_is_made(
    run: Run, bert: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("old")

    def full(partial: Path, target: Path, *_: object) -> None:
        target.write_text("half")
        raise NO_SPACE

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "convert", full)
        refused = run(bert, "--input", source, "--output", output, *RULE)
    check_refused(refused, "No space left on device", f"{ROWS} finished rows are in")
    assert output.read_text() == "old"
    assert files(tmp_path) == ["in.jsonl", "out.csv", "out.csv.partial", "out.csv.partial.run"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("all rows are done")

    monkeypatch.setattr("fpabee.runtime.engine.Engine.stream", refuse)
    assert run(bert, "--input", source, "--output", output, *RULE, "--resume").code == 0
    assert whole_lines(output) == ROWS + 1


def test_no_space_for_the_first_row_leaves_nothing(
    run: Run, bert: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 0, NO_SPACE)
    refused = run(bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    check_refused(refused, "No space left on device", "free some space")
    assert files(tmp_path) == ["in.jsonl"]


def test_the_summary_is_that_of_all_rows(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["music", "weather", "alarm", "travel"]
    lines = [
        json.dumps({"text": f"rain {n} the" * (n % 9), "label": labels[n % 4]}) for n in range(60)
    ]
    lines[7] = lines[50] = "{"
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    options = ["--input", source, "--metrics", "--on-error", "skip", "--rule", "pabee"]
    options += ["--patience", "1", "--output", tmp_path / "out.jsonl"]

    def told(err: str) -> list[str]:
        """All but times and what says that the run was resumed."""
        return [line for line in err.splitlines() if "rows/s" not in line and "earlier" not in line]

    unbroken = run(bert, *options)
    interrupt_at(monkeypatch, 33, KeyboardInterrupt())
    stopped = run(bert, *options)
    assert stopped.code == 130
    resumed = run(bert, *options, "--resume")
    assert told(resumed.err) == told(unbroken.err)
    assert "2 rows could not be read" in resumed.err
    assert "32 rows were done by an earlier run" in resumed.err


def write_partial(
    run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: object, rows: int = 100
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, rows, KeyboardInterrupt())
        assert run(*arguments).code == 130


def test_rows_that_are_done_are_not_thrown_away(
    run: Run, bert: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, *arguments)
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    refused = run(*arguments)
    check_refused(refused, "holds 100 rows of a run that did not finish", "--resume")
    assert partial.read_bytes() == before
    partial.unlink()
    assert run(*arguments).code == 0


def test_resume_with_nothing_to_resume_starts(run: Run, bert: Path, source: Path) -> None:
    output = source.with_name("out.jsonl")
    assert run(bert, "--input", source, "--output", output, *RULE, "--resume").code == 0
    assert whole_lines(output) == ROWS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--threshold", "0.8"], "threshold"),
        (["--with-text"], "with_text was false and is true"),
        (["--max-length", "9"], "max_length was null and is 9"),
        (["--threads", "1"], "threads was null and is 1"),
        (["--text-column", "id"], "text_column was"),
        (["--input-format", "txt"], "input_format was"),
        (["--metrics"], "metrics was"),
    ],
)
def test_a_resume_with_other_settings_is_refused(
    run: Run,
    bert: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    says: str,
) -> None:
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, *arguments)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    refused = run(*arguments, *options, "--resume")
    check_refused(refused, "is from another run", says, "to start again")
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def _append(source: Path) -> None:
    with source.open("a") as stream:
        stream.write('{"text": "one more"}\n')


def _same_size(source: Path) -> None:
    content = source.read_bytes()
    source.write_bytes(content[:-20] + content[-20:].replace(b"9", b"8"))


@pytest.mark.parametrize("change", [_append, _same_size])
def test_a_resume_on_a_changed_input_is_refused(
    run: Run,
    bert: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, *arguments)
    times = source.stat()
    change(source)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    check_refused(run(*arguments, "--resume"), f"{source} has changed")
    other = tmp_path / "other.jsonl"
    other.write_bytes(source.read_bytes())
    arguments = (bert, "--input", other, *arguments[3:])
    check_refused(run(*arguments, "--resume"), f"{other} was not its input")


def test_a_resume_with_another_model_is_refused(
    run: Run,
    engines: Mapping[str, Path],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, engines["bert"], *arguments)
    check_refused(run(engines["albert"], *arguments, "--resume"), "engines was")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda partial, run: run.unlink(), "out.jsonl.partial.run"),
        (lambda partial, run: run.write_text("{"), "out.jsonl.partial.run"),
        (lambda partial, run: run.write_text("[]"), "is from another run"),
        (
            lambda partial, run: partial.write_bytes(b"\0" * 50 + b"\n" + partial.read_bytes()),
            "line 1 is damaged",
        ),
        (
            lambda partial, run: partial.write_bytes(
                partial.read_bytes().replace(b'x": 7', b'x": 8')
            ),
            "line 8 is damaged",
        ),
        (
            lambda partial, run: partial.write_bytes(b"[" * 10**5 + b"\n" + partial.read_bytes()),
            "line 1 is damaged",
        ),
        (
            lambda partial, run: partial.write_bytes(
                partial.read_bytes().replace(b'"label": "', b'"label": "x', 1)
            ),
            "row 0 of the earlier run is not from these inputs",
        ),
        (
            lambda partial, run: partial.write_bytes(
                partial.read_bytes().replace(b'"exit": ', b'"exit": -', 1)
            ),
            "row 0 of the earlier run is not from these inputs",
        ),
        (
            lambda partial, run: partial.write_bytes(
                partial.read_bytes().replace(b'"label"', b'"lable"', 1)
            ),
            "row 0 of the earlier run is not from these inputs",
        ),
    ],
)
def test_a_damaged_partial_is_refused(
    run: Run,
    bert: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path, Path], object],
    says: str,
) -> None:
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    write_partial(run, monkeypatch, *arguments)
    partial = tmp_path / "out.jsonl.partial"
    damage(partial, tmp_path / "out.jsonl.partial.run")
    check_refused(run(*arguments, "--resume"), says, "start again")


def test_a_run_that_stopped_at_a_bad_row_can_go_on_by_skipping_it(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.runtime.files.job.BLOCK_ROWS", 2)
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b"}\n{\n{"text": "c"}\n')
    arguments = (bert, "--input", source, "--output", tmp_path / "out.jsonl", *RULE)
    check_refused(run(*arguments), "line 3 is not JSON", "2 finished rows are in")
    check_refused(run(*arguments, "--resume"), "line 3 is not JSON")
    assert run(*arguments, "--resume", "--on-error", "skip").code == 0
    unbroken = run(bert, "--input", source, *RULE, "--on-error", "skip").out
    assert (tmp_path / "out.jsonl").read_text() == unbroken


def test_two_runs_cannot_write_the_same_file(
    run: Run, bert: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    other = Partial(output, {}, resume=False)
    try:
        for option in ([], ["--resume"]):
            refused = run(bert, "--input", source, "--output", output, *RULE, *option)
            check_refused(refused, "is being written by another run")
    finally:
        other.close(keep=False)
    assert run(bert, "--input", source, "--output", output, *RULE).code == 0


def test_what_cannot_be_resumed(run: Run, bert: Path, source: Path, tmp_path: Path) -> None:
    result = run(bert, "--input", source, "--resume")
    assert (result.code, result.out) == (2, "")
    assert "--output" in result.err
    refused = run(
        bert, "--input", "-", "--output", tmp_path / "out.jsonl", "--resume", stdin=b"a\n"
    )
    check_refused(refused, "can be read only once")
    assert files(tmp_path) == ["in.jsonl"]
