"""Ray: rows are those of `fpabee-run`."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime import Confidence, InputError
from fpabee.runtime.check import BATCH_LIMIT
from fpabee.runtime.ray import Classify, classify

from ..conftest import add_quick_pass
from ..test_docs import ROOT
from .running import Run
from .test_engine import TEXTS

WAIT = 120


def table(**columns: Any) -> Any:
    return pyarrow.table({"text": ["rain", "sun"], **columns})


def texts_of(rows: int) -> Any:
    """Rows with ids, a column that is kept, and texts that stop at several exits."""
    texts = [f"{TEXTS[n % len(TEXTS)]} {'rain ' * (n % 7)}" for n in range(rows)]
    return pyarrow.table({"id": range(rows), "text": texts, "note": [f"n{n}" for n in range(rows)]})


def answers_of_run(run: Run, engines: Path, folder: Path, rows: Any, *options: str) -> Any:
    """What `fpabee-run` writes for a table, without its index."""
    parquet.write_table(rows, folder / "in.parquet")
    written = str(folder / "out.parquet")
    done = run(engines, folder / "in.parquet", "--output", written, "--quiet", *options)
    assert done.code == 0, done.err
    return parquet.read_table(written).drop_columns("index")


def check_same(answered: Any, expected: Any) -> None:
    """Columns are equal, scores within what other batches change, with logits of up to 10."""
    assert answered.num_rows == expected.num_rows
    for name in expected.column_names:
        for one, other in zip(answered[name].to_pylist(), expected[name].to_pylist(), strict=True):
            is_number = name.startswith(("score", "probabilities"))
            assert one == (pytest.approx(other, abs=10 * BATCH_LIMIT / 2) if is_number else other)


@pytest.mark.parametrize(
    ("family", "options"),
    [("bert", {}), ("bert", {"probabilities": True}), ("mpnet", {})],
)
def test_rows_are_those_of_the_command(
    family: str, options: Any, engines: Mapping[str, Path], run: Run, tmp_path: Path
) -> None:
    rows = texts_of(50)
    rows = rows.append_column("text_pair", [["film", None] * 25])
    flags = ["--with-text", *(["--scores"] if options else [])]
    expected = answers_of_run(run, engines[family], tmp_path, rows, *flags)

    answered = Classify(engines[family], **options)(rows)

    assert answered.select(rows.column_names).equals(rows)
    assert {*answered.column_names} == {*expected.column_names, "id"}
    assert answered.select(expected.column_names).schema.types == expected.schema.types
    check_same(answered, expected)


@pytest.fixture
def two_passes(engine_copy: Callable[..., Path]) -> Path:
    """An engines folder whose texts run again where they are in doubt."""
    folder = engine_copy("bert")
    add_quick_pass(folder, Confidence(threshold=(0.9, 0.8, 0.75, 0.0)))
    return folder


def test_rows_in_doubt_have_the_answers_of_the_command(
    two_passes: Path, run: Run, tmp_path: Path
) -> None:
    rows = texts_of(50)
    rows = rows.append_column("text_pair", [["film", None] * 25])
    expected = answers_of_run(run, two_passes, tmp_path, rows)
    answered = Classify(two_passes)(rows)
    check_same(answered, expected)
    layers = dict(zip(answered["exit"].to_pylist(), answered["layer"].to_pylist(), strict=True))
    assert layers.items() >= {1: 1, 4: 3}.items()


def test_strings_of_every_kind_and_no_rows(bert: Path) -> None:
    actor = Classify(bert, text_column="body")
    strings = pyarrow.array(["rain", "sun"])
    (expected,) = {str(actor(pyarrow.table({"body": strings}))["label"].to_pylist())}
    for kind in (strings.dictionary_encode(), strings.cast("large_string")):
        assert str(actor(pyarrow.table({"body": kind}))["label"].to_pylist()) == expected
    empty = actor(pyarrow.table({"body": strings.slice(0, 0), "id": strings.slice(0, 0)}))
    assert empty.num_rows == 0
    assert empty.schema.field("score").type == pyarrow.float64()


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (pyarrow.table({"body": ["rain"]}), 'no column "text"; it has: body -> set `text_column`'),
        (pyarrow.table({"text": [1]}), 'row 0 of a batch has no string field "text"'),
        (pyarrow.table({"text": [["rain"]]}), 'row 0 of a batch has no string field "text"'),
        (table(text_pair=[1.5, 2.5]), "text_pair"),
        (table(label=["a", "b"]), 'a column "label".*rename'),
        (pyarrow.table({"text": ["rain", None]}), 'row 1 of a batch has no string field "text"'),
    ],
)
def test_bad_batches(batch: Any, says: str, bert: Path) -> None:
    with pytest.raises(InputError, match=says):
        Classify(bert)(batch)


def test_rows_without_a_text_may_be_skipped(bert: Path) -> None:
    not_unicode = pyarrow.array([b"\xff", b"sun", b""]).view("string")
    texts = pyarrow.chunked_array([pyarrow.array(["rain", None]), not_unicode])

    answered = Classify(bert, skip_errors=True)(pyarrow.table({"text": texts}))

    errors = answered["error"].to_pylist()
    labels = answered["label"].to_pylist()
    assert [error is None for error in errors] == [True, False, False, True, True]
    assert [label is not None for label in labels] == [True, False, False, True, True]
    assert "UTF-8" in errors[2]
    only = Classify(bert, skip_errors=True)(pyarrow.table({"text": pyarrow.nulls(2)}))
    assert only["exit"].null_count == 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine, with four logical CPUs."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # otherwise it writes a token to the home folder
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


# Ray 2.60 deprecates what its own modules use.
of_ray = pytest.mark.filterwarnings("ignore")


class Planned:
    """A dataset that keeps what its actors would get."""

    engines: Any = None

    def repartition(self, **_: Any) -> Planned:
        return self

    def map_batches(self, _: Any, **options: Any) -> Planned:
        self.engines = options["fn_constructor_kwargs"]["engines"]
        return self


@of_ray
def test_a_name_of_the_hub_is_no_path(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bert.parent)
    dataset: Any = Planned()
    classify(dataset, "owner/name")
    assert dataset.engines == "owner/name"
    classify(dataset, bert.name)
    assert dataset.engines == bert, "actors run in other folders"


@of_ray
@pytest.mark.slow
def test_a_parquet_dataset_on_ray(cluster: Any, bert: Path, run: Run, tmp_path: Path) -> None:
    rows = texts_of(3000)
    expected = answers_of_run(run, bert, tmp_path, rows)
    dataset = cluster.data.read_parquet(str(tmp_path / "in.parquet"))

    answers = classify(dataset, bert, actors=(1, 2), batch_size=500)
    answers.write_parquet(str(tmp_path / "answers"))
    assert len(list((tmp_path / "answers").iterdir())) > 1, "one block gives work to one actor"

    answered = parquet.read_table(tmp_path / "answers").sort_by("id")
    assert answered["id"].to_pylist() == list(range(3000))
    check_same(answered, expected)
    assert len(set(answered["exit"].to_pylist())) > 1


@of_ray
@pytest.mark.slow
def test_two_passes_on_ray(cluster: Any, two_passes: Path, run: Run, tmp_path: Path) -> None:
    rows = texts_of(1000)
    expected = answers_of_run(run, two_passes, tmp_path, rows)
    dataset = cluster.data.read_parquet(str(tmp_path / "in.parquet"))

    answers = classify(dataset, two_passes, actors=2, batch_size=100)
    answers.write_parquet(str(tmp_path / "answers"))

    answered = parquet.read_table(tmp_path / "answers").sort_by("id")
    check_same(answered, expected)
    assert {1, 4} <= {*answered["exit"].to_pylist()}


@pytest.mark.slow
def test_the_script_of_the_documentation(bert: Path, run: Run, tmp_path: Path) -> None:
    expected = answers_of_run(run, bert, tmp_path, texts_of(400))
    (tmp_path / "texts").mkdir()
    (tmp_path / "in.parquet").rename(tmp_path / "texts" / "in.parquet")
    (tmp_path / "engines").symlink_to(bert)
    page = (ROOT / "docs" / "ray.md").read_text("utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "Checkpoint" in c)
    start = "import ray\nray.init(num_cpus=4, include_dashboard=False)\n"
    for old, new in {
        "/shared": str(tmp_path),
        "16 * 2**20": "2**14",
        "import ray\n": start,
    }.items():
        assert old in code
        code = code.replace(old, new)
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # Ray's other processes would keep a pipe open.
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=environment, check=True, timeout=2 * WAIT, **quiet)
    answered = parquet.read_table(tmp_path / "answers").sort_by("id")
    assert answered["id"].to_pylist() == list(range(400))
    check_same(answered, expected)
