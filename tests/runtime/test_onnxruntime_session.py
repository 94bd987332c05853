"""ONNX Runtime is set up once a process, whoever comes first, and must be installed once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from fpabee.runtime import MissingExtraError
from fpabee.runtime.backends import onnxruntime_session

LOAD = """
import logging, sys
from fpabee.runtime import Engine
logging.basicConfig(level=logging.WARNING, format="%(message)s")
with Engine.load(sys.argv[1]) as engine:
    print(engine.predict(["turn on the light"])[0].labels)
with Engine.load(sys.argv[1]) as engine:
    engine.predict(["turn on the light"])
"""


def _run(code: str, folder: Path) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    return done.stdout, done.stderr


def test_first_engine_sets_up_silently(engines: Mapping[str, Path]) -> None:
    _, log = _run(LOAD, engines["bert"])

    assert log == ""


THEIR_POOL = """
import onnxruntime as ort, sys, glob
ort.set_global_thread_pool_sizes(1, 1)
"""

THEIR_SESSION = """
import onnxruntime as ort, sys, glob
path = glob.glob(sys.argv[1] + '/onnx/fp32/*.onnx')[0]
theirs = ort.InferenceSession(path)
"""

AND_LATER = """
another = ort.InferenceSession(path)
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (THEIR_POOL, "", "it is used"),
        (THEIR_SESSION, AND_LATER, "a thread pool of its own, without spinning"),
    ],
)
def test_an_application_that_came_first_is_respected_and_told_once(
    engines: Mapping[str, Path], before: str, after: str, said: str
) -> None:
    alone, _ = _run(LOAD, engines["bert"])

    answer, log = _run(before + LOAD + after, engines["bert"])

    assert answer == alone
    assert log.count(said) == 1


def test_an_older_onnxruntime_that_refuses_gets_pools_without_spinning(
    engines: Mapping[str, Path],
) -> None:
    refusing = (
        "import onnxruntime as ort\n"
        "def refuse(*sizes): raise RuntimeError('environment exists')\n"
        "ort.set_global_thread_pool_sizes = refuse\n"
    )
    alone, _ = _run(LOAD, engines["bert"])

    answer, log = _run(refusing + LOAD, engines["bert"])

    assert answer == alone
    assert log.count("a thread pool of its own, without spinning") == 1


@pytest.mark.parametrize(
    ("installed", "hint"),
    [
        ((), r"pip install 'fpabee\[cpu\]'"),
        (("onnxruntime", "onnxruntime-gpu"), "pip uninstall"),
    ],
)
def test_none_or_two_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], hint: str
) -> None:
    def distribution(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return name

    monkeypatch.setattr(metadata, "distribution", distribution)

    with pytest.raises(MissingExtraError, match=hint):
        onnxruntime_session.check_installed()
