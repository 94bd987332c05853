"""Parquet is read in a child process: it may crash, and it ends when its caller does."""

from __future__ import annotations

import base64
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime.errors import InputError, MissingExtraError
from fpabee.runtime.files import Inputs, read_rows
from fpabee.runtime.files import parquet_process as module

from ..cli.test_run import COMMAND

# Two rows of two columns, with one byte changed: pyarrow 26.0.1 aborts.
ABORTS = base64.b85decode(
    b"P(e~L6#x|=6(B4X1Qh@k1{DSz00002000040RaF20AT?D003eY02Lq=AS@LG6#x|m6$Tst00062000C50RR91cmV"
    b"(a0C^Pz89X%r7zT4=Xk~3-"
    b"6$Ahk3?%{>1axJ1bR_^x8~^|S6$~W;7zJ!$Vr6V408AVJ000&Q85|ibCIB223>hT`02vqrbY*yS6#y0l7Dg6ECJ0"
    b"F!6#x|g6#@V}76cgv872S(0000c02~zz86^e)85jj@VPa)$6#y0l7Dg6ECQeBl6#x|g6#@V}76cha872S(0000Mi"
    b"~$w|CI}Xc0RSi<aA9(Bb!BudV{mXSVRCYBcOZ6Ua&u{KZXhx?E-)@J87v$C02}}S0M7sb08l|vF#"
)
# In place of the reader: what it does with its file.
READS = (
    "import sys; sys.path[:] = sys.argv[2:]\n"
    f"import {module.__name__} as module\n"
    "real = module.parquet_rows\n"
    "def reads(*given):\n"
    "    {what}\n"
    "    yield from real(*given)\n"
    "module.parquet_rows = reads\n"
    "module.main()"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(5000)]}), path)
    return path


def replace_reader(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(module, "_START", READS.format(what=what))


def test_a_file_on_which_pyarrow_aborts_is_refused(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(ABORTS)
    command = [*COMMAND, str(bert), str(path), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path} cannot be read as Parquet: ")
    assert done.stderr.endswith(" -> copy the file again\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "name", "hint"),
    [
        ("import os; os.abort()", "SIGABRT", "copy the file again"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "free some memory"),
        ("import os; os._exit(7)", "exit code 7", "copy the file again"),
    ],
)
def test_a_reader_that_crashes(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, name: str, hint: str
) -> None:
    replace_reader(monkeypatch, what)
    with pytest.raises(InputError, match=rf"as Parquet: the reader crashed \({name}\)") as caught:
        list(read_rows(path))
    assert hint in caught.value.hint
    replace_reader(
        monkeypatch, f"import itertools; yield from itertools.islice(real(*given), 70); {what}"
    )
    rows = read_rows(path)
    assert [next(rows).line for _ in range(64)] == list(range(1, 65)), "the rows before it"
    with pytest.raises(InputError, match=re.escape(name)):
        list(rows)


def test_a_defect_keeps_its_traceback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_reader(monkeypatch, "1 / 0")
    with pytest.raises(RuntimeError, match=r"in reads\n(.|\n)*ZeroDivisionError"):
        list(read_rows(path))


def test_what_a_library_prints_is_not_in_the_way(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    replace_reader(monkeypatch, "import os; os.write(1, b'out'); os.write(2, b'err')")
    assert len(list(read_rows(path))) == 5000
    assert capfd.readouterr() == ("", "")


def test_standard_input_is_left_to_the_caller(path: Path) -> None:
    code = (
        "import sys; from fpabee.runtime.files import Inputs\n"
        "print([row.text for row in Inputs([sys.argv[1], '-'])][4999:])"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, input=b"rain\nsun\n", capture_output=True, check=True)
    assert done.stdout == b"['text 4999', 'rain', 'sun']\n"


def test_the_child_imports_what_its_caller_would(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_rows(path))) == 5000, "not from the working folder"
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="Parquet needs pyarrow"):
        list(read_rows(path))


def test_a_process_that_cannot_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(path.with_name("nowhere")))
    with pytest.raises(InputError, match=r"cannot start .*nowhere.*No such file"):
        list(read_rows(path))


def test_the_child_ends_with_the_generator(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *given: object, **options: object) -> None:
            super().__init__(*given, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    rows = read_rows(path)
    assert next(rows).text == "text 0"
    assert started[0].poll() is None
    rows.close()  # type: ignore[attr-defined]
    assert started[0].returncode == -signal.SIGKILL
    assert len(list(read_rows(path))) == 5000
    assert len(started) == 2
    assert started[1].returncode is not None


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process as Linux can")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_child_ends_with_its_caller(path: Path, number: signal.Signals) -> None:
    """Also where it is in the middle of something that takes for ever."""
    waits = READS.format(what="import threading; threading.Event().wait()")
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        f"from {module.__package__} import parquet_process, read_rows\n"
        f"parquet_process._START = {waits!r}\n"
        "class Said(subprocess.Popen):\n"
        "    def __init__(self, *given, **options):\n"
        "        super().__init__(*given, **options)\n"
        "        print(self.pid, flush=True)\n"
        "subprocess.Popen = Said\n"
        "list(read_rows(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as caller:
        assert caller.stdout is not None
        child = os.pidfd_open(int(caller.stdout.readline()))
        try:
            os.killpg(caller.pid, number)
            assert caller.wait() == -number
            ended, _, _ = select.select([child], [], [], 60)
            assert ended
        finally:
            os.close(child)


def test_shares_are_of_what_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 160}), path)
    inputs = Inputs([path])
    assert [inputs.share for _ in inputs] == [0.0] * 64 + [0.4] * 64 + [0.8] * 32
    assert inputs.share == 1.0
