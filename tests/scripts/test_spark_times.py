"""The times of the example for Spark, which a double of `spark-submit` stands in for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import spark_times
from pyarrow import dataset

from ..programs import invoke, printed

# Like the example, but all texts stop at exit 2 with exits, and at exit 1 of the plain graph.
DOUBLE = f"""#!{sys.executable}
import sys
from pathlib import Path
import pyarrow as pa
from pyarrow import dataset, parquet
master, example, folder, texts, output = sys.argv[2:]
assert master in ("local[1]", "local[2]") and Path(example).is_file()
assert Path(folder, "model.onnx").is_file()
rows = dataset.dataset(texts, format="parquet").to_table()
Path(output).mkdir()
exit = 2 if "exits" in folder else 1
parquet.write_table(rows.append_column("exit", pa.array([exit] * len(rows))), output + "/0.parquet")
"""


def test_the_table_has_both_numbers_of_processes(
    engines: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    submit = tmp_path / "bin" / "spark-submit"
    submit.write_text(DOUBLE)
    submit.chmod(0o755)
    texts = tmp_path / "texts.txt"
    texts.write_text("turn on the light\nplay music\n")
    options = ["--input", texts, "--spark", tmp_path, "--rows", 21, "--rounds", 2]
    output = printed(spark_times.main, engines["bert"], *options)
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in lines] == ["processes", "---", "1", "2"]
    assert "21 texts, whose mean depth is 2.00 of 3 layers; onnxruntime-fp32" in output

    submit.write_text(f"#!{sys.executable}\nraise SystemExit('no Java here')\n")
    result = invoke(spark_times.main, engines["bert"], *options)
    assert result.exit_code == 1
    assert "no Java here" in result.output


def test_all_texts_are_written_to_several_files(tmp_path: Path) -> None:
    texts = [str(number) for number in range(21)]
    spark_times.write_texts(tmp_path / "texts", texts)
    assert len([*(tmp_path / "texts").iterdir()]) == spark_times.FILES
    table = dataset.dataset(tmp_path / "texts", format="parquet").to_table()
    assert sorted(table["text"].to_pylist(), key=int) == texts
