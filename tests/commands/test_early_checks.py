"""What is wrong with a command line is known before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from importlib import import_module
module, *arguments = sys.argv[1:]
try:
    import_module(f"fpabee.commands.{module}").main(arguments)
finally:
    print(*{"torch", "transformers"} & {*sys.modules})
"""
TOKENIZER = Path(__file__).parents[1] / "golden" / "pabee_bert" / "tokenizer.json"
STEPS = "engines.partial/conversion-0123456789abcdef"
# A command line, and a fact of its error. There are a model, rows, and engines with `rows.csv`.
MISTAKES = {
    "convert none rows.csv -o new": "model folder none does not exist",
    "convert model none.csv -o new": "none.csv does not exist",
    "convert engines/rows.csv engines/rows.csv -o new": "rows.csv is not a folder",
    "convert model rows.csv -o engines": "already holds an engines folder",
    "convert model engines/rows.csv -o engines --force": "engines/rows.csv is inside",
    "convert engines/model rows.csv -o engines --force": "engines/model is inside",
    f"convert model {STEPS}/rows.csv -o engines --force": "rows.csv is inside",
    "convert model rows.csv -o new --single-file full": "full exists already",
    "convert model rows.csv -o new --single-file new/one": "one is inside",
    "convert model rows.csv -o new --threads 99999": "1024",
    "convert model rows.csv -o out": "it holds conversion",
    "convert model rows.csv --missed 1": "--threshold",
    "convert models/modle rows.csv -o new": "models/modle is not a folder here",
    "export models/modle -o new": "models/modle is not a folder here",
    "train --backbone a/b --train rows.csv --dev rows.csv -o new": "a/b is not a folder here",
    "export none -o new": "model folder none does not exist",
    "export model -o engines": "already holds an engines folder",
    "export model -o engines --force --texts engines/rows.csv": "engines/rows.csv is inside",
    "export engines/model -o engines --force": "engines/model is inside",
    "export model -o new --texts none.csv": "none.csv does not exist",
    "export model --int8": "--texts",
    "export model -o new --int8 --texts rows.csv": "at least 32 different texts",
    "export engines": "engines is an engines folder",
    "convert engines rows.csv -o new": "engines is an engines folder",
    "convert tokens rows.csv -o new": "BertForTokenClassification",
    "convert multi rows.csv -o new": "fpabee-export",
    "calibrate tokens --data rows.csv": "fpabee-convert",
    "build none openvino-fp32": "none does not exist",
    "build engines openvino-fp32 --texts none.csv": "none.csv does not exist",
    "build engines openvino-fp8": "no target 'openvino-fp8'",
    "train --backbone none --train rows.csv --dev rows.csv -o new": "none does not exist",
    "train --backbone model --train rows.csv --dev none.csv -o new": "none.csv does not exist",
    "train --backbone b --train rows.csv --dev rows.csv -o model": "already holds a model",
    "train --backbone model --train rows.csv --dev rows.csv -o model --force": "model is inside",
    "train --backbone b/c --train rows.csv --dev rows.csv -o model --force": "did not train",
    "convert model rows.csv -o out2 --single-file out2.partial": "out2.partial is inside",
    "train --backbone model --train rows.csv --dev rows.csv -o new --lr 0": "--lr",
    "convert model rows.csv -o foreign --force": "also holds onnx/notes.txt",
    "export model -o foreign --force": "also holds onnx/notes.txt",
    "convert trained rows.csv -o new --column text=body": 'no column "body"',
    "convert trained rows.csv -o new --train-texts a.jsonl": 'no string field "text"',
    "convert trained texts.csv -o new --group-column talk": 'has a field "talk"',
    "convert trained texts.csv -o new --max-length 100": "64 positions",
    "convert trained texts.csv -o new --max-length 3": "--max-length of at least 4",
    "convert trained texts.csv -o new --missed 1 --threshold x=0.7": "no label 'x'",
    "convert reranker rows.csv -o new": 'no column "query"',
    "export exits -o new --exits 1,9": "a model with 4 exits",
    "export exits -o new --exits 3,2": "--exits as ascending numbers",
    "export exits -o new --max-length 100": "64 positions",
    "train --backbone trained --train rows.csv --dev rows.csv -o new --exits 9": "of 4 layers",
    "train --backbone b --train rows.csv --dev rows.csv -o new --column label=c": 'column "c"',
    "train --backbone b --train a.jsonl --dev a.jsonl -o new --column text=body": "has no label",
    "pack engines -o full": "full exists already",
    "pack none -o new": "none does not exist",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, rows and engines, as far as they are looked at."""
    for folder in ("model", "engines/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for folder, name in (("tokens", "BertForTokenClassification"), ("multi", "BertMultiExit")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        (tmp_path / folder / "model.safetensors").touch()
    for folder in ("", "engines", STEPS, "full"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "rows.csv").write_text("text,label\nrain,a\n")
    config = {"num_hidden_layers": 4, "max_position_embeddings": 64}
    for name, labels in (("trained", ("no", "yes")), ("reranker", ("score",)), ("exits", ("a",))):
        (tmp_path / name).mkdir(exist_ok=True)
        own = config | {"id2label": dict(enumerate(labels))}
        (tmp_path / name / "config.json").write_text(json.dumps(own))
    shutil.copy(TOKENIZER, tmp_path / "trained")
    texts = "".join(f"rain {number}\n" for number in range(100))
    (tmp_path / "texts.csv").write_text(f"text\n{texts}")
    (tmp_path / "a.jsonl").write_text('{"body": "rain"}\n')
    (tmp_path / "foreign" / "onnx").mkdir(parents=True)
    (tmp_path / "foreign" / "onnx" / "notes.txt").touch()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "conversion").touch()
    manifest = '{"schema_version": "1.0", "fpabee_version": "1.0.0"}'
    for folder in ("engines", "foreign"):
        (tmp_path / folder / "manifest.json").write_text(manifest)
    return tmp_path


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_found_without_pytorch(line: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *shlex.split(line)],
        cwd=place, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2), done.stderr
    assert MISTAKES[line] in done.stderr
    assert done.stdout.strip() == "", "these were imported"
    assert sorted(place.rglob("*")) == before
