"""The example for Spark, on two cores: the answers of the engine, one session in each process."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import venv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

from fpabee.runtime import Confidence, Engine
from fpabee.runtime.encoding import Text

from ...child_process import MIB
from ...closeness import exits_may_differ, labels_may_differ
from ...conftest import WORDS
from ...programs import program
from .conftest import FP32, PackCopy

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
# PySpark 4.3 warns of newer releases of pandas.
PACKAGES = ("pyspark", "pandas<3", "pyarrow", "onnxruntime", "tokenizers")
ROWS = 10_000
FILES = 8
BATCH = 250

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def submit(shared_root: Path) -> Callable[..., None]:
    """Runs a script in Spark, with the environment that `FPABEE_SPARK` names or one that it makes.

    It needs Java 17 or newer.
    """
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    folder = Path(os.environ.get("FPABEE_SPARK", shared_root / "spark"))
    if not (folder / "bin" / "spark-submit").is_file():
        venv.create(folder, with_pip=True)
        install = [str(folder / "bin" / "pip"), "install", "--quiet", *PACKAGES]
        if subprocess.run(install, check=False).returncode:
            pytest.skip("pip cannot install PySpark")
    environment = os.environ | {"PYSPARK_PYTHON": str(folder / "bin" / "python")}
    # A task for each file, and small batches, so that each process has many of both.
    settings = {
        "spark.sql.files.maxPartitionBytes": 100_000,
        "spark.sql.execution.arrow.maxRecordsPerBatch": BATCH,
    }
    options = ["--master", "local[2]"]
    for name, value in settings.items():
        options += ["--conf", f"{name}={value}"]

    def run(script: Path, *arguments: object) -> None:
        submit = str(folder / "bin" / "spark-submit")
        program(submit, *options, script, *arguments, env=environment)

    return run


def test_answers_are_those_of_the_engine_from_one_session_in_each_process(
    pack_copy: PackCopy, submit: Callable[..., None], tmp_path: Path
) -> None:
    engines = pack_copy(rule=Confidence(threshold=0.6, exit_0_threshold=0.9)).engines
    words = random.Random(3)
    texts: list[Text] = [" ".join(words.choices(WORDS, k=words.randrange(60))) for _ in range(ROWS)]
    table = pa.table({"number": range(ROWS), "text": texts})
    (tmp_path / "texts").mkdir()
    for n in range(FILES):
        part = table.slice(n * ROWS // FILES, ROWS // FILES)
        parquet.write_table(part, tmp_path / "texts" / f"{n}.parquet")

    submit(
        EXAMPLES / "spark_classify.py", tmp_path / "packed", tmp_path / "texts", tmp_path / "out"
    )
    answers = dataset.dataset(tmp_path / "out", format="parquet").to_table().sort_by("number")
    assert answers.select(["number", "text"]).equals(table)
    with Engine.load(engines, FP32, "fast") as engine:
        expected = engine.predict(texts)
        trace = engine.trace(texts)
        task = engine.manifest.task
        rule = engine.rule
    near = exits_may_differ(trace.logits, rule, task, trace.first_exit)
    near |= labels_may_differ(trace.logits, task).any(axis=0)
    assert near.mean() < 0.1
    exits = np.array([answer.exit for answer in expected])
    labels = np.array([answer.labels[0] for answer in expected])
    np.testing.assert_array_equal(answers["exit"].to_numpy()[~near], exits[~near])
    np.testing.assert_array_equal(np.array(answers["label"].to_pylist())[~near], labels[~near])
    assert len(set(exits)) > 2

    script = Path(__file__).with_name("spark_workers.py")
    submit(script, EXAMPLES, tmp_path / "packed", tmp_path / "texts", tmp_path / "workers")
    batches = dataset.dataset(tmp_path / "workers", format="parquet").to_table().to_pylist()
    assert len(batches) == ROWS // BATCH
    assert {batch["sessions"] for batch in batches} == {1}
    memory = defaultdict[int, list[int]](list)
    for batch in batches:
        memory[batch["process"]].append(batch["memory"])
    assert len(memory) == 2
    for sizes in memory.values():
        assert max(sizes) < sizes[len(sizes) // 4] + 4 * MIB
