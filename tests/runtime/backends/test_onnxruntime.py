"""ONNX Runtime is set up once in each process, and must be installed exactly once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from fpabee.runtime.backends import onnxruntime
from fpabee.runtime.backends.base import is_out_of_memory

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


THEIR_POOL = """
import onnxruntime as ort
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
# As an older ONNX Runtime does where there is a session already.
REFUSES = """
import onnxruntime as ort
def refuse(*sizes): raise RuntimeError('environment exists')
ort.set_global_thread_pool_sizes = refuse
"""


def test_an_application_that_came_first_is_respected_and_told_once(
    engines: Mapping[str, Path],
) -> None:
    alone, log = _run(LOAD, engines["bert"])
    assert log == "", "the first engine sets up silently"
    for code, said in (
        (THEIR_POOL + LOAD, "it is used"),
        (THEIR_SESSION + LOAD + AND_LATER, "its own thread pool, without spinning"),
        (REFUSES + LOAD, "its own thread pool, without spinning"),
    ):
        answer, log = _run(code, engines["bert"])
        assert answer == alone
        assert log.count(said) == 1


def run_of_shape(shape: Sequence[int], indices: int) -> Exception:
    """The error of ONNX Runtime for a tensor of a shape, and an index into a table of ten."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        graph (int64[10] table, int64[1] index, int64[1] shape) => (int64[1] found, float[n] large)
        { found = Gather(table, index)  large = ConstantOfShape(shape) }"""
    )
    session = onnxruntime.cpu_session(proto.SerializeToString())
    feed = {"table": np.arange(10), "index": np.array([indices]), "shape": np.array(shape)}
    with pytest.raises(onnxruntime.ort_errors()) as caught:
        session.run(None, feed)
    return caught.value


def test_lack_of_memory_is_distinguished_from_other_failures() -> None:
    assert is_out_of_memory(run_of_shape([2**46], 9))
    assert not is_out_of_memory(run_of_shape([1], 10))
