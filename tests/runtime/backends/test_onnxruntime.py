"""ONNX Runtime: one session holds all segments, and other sessions of the process are as before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from fpabee.runtime import ArtifactError, Engine
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends import onnxruntime
from fpabee.runtime.backends.base import is_out_of_memory
from fpabee.runtime.backends.one_graph import one_graph

OURS = """
for threads in (1, 2):
    with Engine.load(sys.argv[1], threads=threads) as engine:
        print(engine.predict(["turn on the light"])[0].labels)
"""
THEIRS = """
session = ort.InferenceSession(path)
kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
feed = {}
for each in session.get_inputs():
    shape = [1 if isinstance(size, str) else size for size in each.shape]
    feed[each.name] = np.ones(shape, kinds[each.type])
print(session.run(["logits"], feed))
"""
THEIR_POOL = "ort.set_global_thread_pool_sizes(1, 1)\n"


def answers(code: str, folder: Path) -> tuple[list[str], str]:
    """The lines that code prints in a process of its own, and what it logs."""
    imports = "import glob, logging, sys, numpy as np, onnxruntime as ort\n"
    imports += "from fpabee.runtime import Engine\n"
    imports += "logging.basicConfig(level=logging.WARNING, format='%(message)s')\n"
    imports += "path = glob.glob(sys.argv[1] + '/onnx/fp32/*_01.onnx')[0]\n"
    command = [sys.executable, "-c", imports + code, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


def test_other_sessions_of_the_process_run_as_without_fpabee(engines: Mapping[str, Path]) -> None:
    """Before and after engines, and between them."""
    theirs, log = answers(THEIRS, engines["bert"])
    found, log_of_both = answers(OURS + THEIRS + OURS + THEIRS, engines["bert"])
    assert log == log_of_both == ""
    ours = found[:2]
    assert found == [*ours, *theirs, *ours, *theirs]
    assert answers(THEIRS + OURS + THEIRS, engines["bert"]) == ([*theirs, *ours, *theirs], "")


@pytest.mark.skipif(
    not hasattr(ort, "set_global_thread_pool_sizes"), reason="this version has no global pool"
)
def test_the_global_pool_of_the_process_is_used(engines: Mapping[str, Path]) -> None:
    found, log = answers(THEIR_POOL + OURS, engines["bert"])
    assert found == answers(OURS, engines["bert"])[0]
    assert log.count("so `threads` has no effect") == 2, "one session for each engine"


def test_each_engine_has_its_own_number_of_threads(engines: Mapping[str, Path]) -> None:
    for threads in (1, 3):
        with Engine.load(engines["bert"], threads=threads) as engine:
            sessions = {id(engine.core.backend.graph(name)) for name in engine.core.backend.graphs}
            assert len(sessions) == 1, "one pool and one arena"
            options = engine.core.backend.graph("segment_01").get_session_options()
            assert options.intra_op_num_threads == threads


def write_graph(path: Path, number: int) -> None:
    """A graph that adds weights to `x`; every third one has another input and another output."""
    more, of = (", float[n] z", ", float[n] w") if number % 3 == 2 else ("", "")
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        graph (float[n] x{more}) => (float[n] y{of})
        {{ y = Add(x, weights) {"w = Sub(z, one)" if more else ""} }}"""
    )
    weights = np.full(300, number, np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    proto.doc_string = "." * number  # weights begin at any byte
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    check_graph(path)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_a_run_chooses_one_of_several_graphs(count: int, tmp_path: Path) -> None:
    files = {f"graph {number}": tmp_path / f"{number % 2}/{number}.onnx" for number in range(count)}
    for number, path in enumerate(files.values()):
        write_graph(path, number)
    elsewhere = tmp_path / "blobs" / "0"  # as in the cache of Hugging Face's hub
    elsewhere.parent.mkdir()
    files["graph 0"].rename(elsewhere)
    files["graph 0"].symlink_to(elsewhere)
    joined = one_graph(files)
    assert len(joined.model) < 700 * count, "the weights stay in their files"
    options = onnxruntime.session_options(1)
    where = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(where, str(joined.folder))
    session = onnxruntime.cpu_session(joined.model, options)
    feed = {name: np.arange(300, dtype=np.float32) for name in "xz"}
    inputs = {each.name for each in session.get_inputs()}
    for number, graph in enumerate(files):
        choice = {name: np.array(value) for name, value in joined.choices[graph].items()}
        given = {**feed, **choice}
        outputs = {"y": feed["x"] + number} | ({"w": feed["z"] - 1} if number % 3 == 2 else {})
        names = [joined.outputs[name] for name in outputs]
        found = session.run(names, {name: given[name] for name in inputs})
        for value, expected in zip(found, outputs.values(), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_graphs_that_cannot_run_together_are_refused(
    engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / "0" / f"{name}.onnx" for name in "ab"}
    for path in files.values():
        write_graph(path, 0)
    proto = onnx.load(files["b"])
    proto.ir_version += 1
    onnx.save(proto, files["b"])
    with pytest.raises(ValueError, match="different versions"):
        one_graph(files)
    files["b"].write_bytes(2 * files["a"].read_bytes())
    with pytest.raises(ValueError, match="too many values"):
        one_graph(files)
    monkeypatch.setattr(onnxruntime, "one_graph", lambda _: one_graph(files))
    with (
        pytest.raises(
            ArtifactError, match=r"cannot run together.*export or convert the model again"
        ),
        Engine.load(engines["bert"]) as engine,
    ):
        engine.warm_up()


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
