"""The model card says what was promised and measured, and how to run the file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from huggingface_hub import ModelCard

from fpabee.exporter.single_file import pack
from fpabee.runtime import Certificate, Confidence, ProblemType, Promise, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder

from ...conftest import change_point
from ...doubles.hub import Hub
from ...programs import python
from ...runtime.running import line_with
from .conftest import FP32

CERTIFICATE = Certificate(
    confidence=95.0,
    promises=(
        Promise(of="changed_answers", at_most=1.0, rows=1199),
        Promise(of="missed", at_most=2.0, label="music", rows=150),
    ),
)

METADATA = {
    "library_name": "onnx",
    "pipeline_tag": "text-classification",
    "tags": ["early-exit", "fpabee", "onnx"],
}


def examples_of(packed: Path) -> list[str]:
    """The Python in the card of a packed folder: an example, the check, and that for OpenVINO."""
    card = (packed / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture
def folder(engine_copy: Callable[..., Path], set_points: Callable[..., None]) -> Path:
    """An engines folder as a conversion leaves it, with figures that are made up."""
    folder = engine_copy(exit_0=True)
    rule = Confidence(threshold=0.6, exit_0_threshold=0.9)
    set_points(folder, FP32, "changed_answers", changed_answers=rule)
    change_point(
        folder,
        "changed_answers",
        metric="agreement",
        score=0.9966,
        mean_depth=1.25,
        measured_speedup={"1": 1.81, "32": 1.8},
        versions={"onnxruntime": "1.32.0", "fpabee": "1.0.0"},
        hardware="some processor, 2 threads",
        certificate=CERTIFICATE,
    )
    return folder


def test_the_card_says_what_was_promised_and_measured(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "packed")
    text = (tmp_path / "packed" / "README.md").read_text()
    card: Any = ModelCard(text)
    assert card.data.to_dict() == METADATA
    for facts in (
        ("1 % changed answers (tested on 1,199", "2 % missed of 'music' (tested on 150", "95 %"),
        ("agreement", "100 texts", "5-fold cross-fitting", "0.9966", "0.34%"),
        ("1.25 of 3",),
        ("1.81 for single texts", "1.80 for files"),
        ("some processor, 2 threads", "onnxruntime 1.32.0", "fpabee 1.0.0"),
    ):
        assert line_with(text, *facts)


def test_the_card_names_the_classifier_if_the_hub_has_it(folder: Path, tmp_path: Path) -> None:
    EnginesFolder.read(folder).with_manifest(base_model="some_one/tiny: a").write()
    pack(folder, tmp_path / "packed", for_transformers_js=True)
    card: Any = ModelCard.load(tmp_path / "packed" / "README.md")
    assert card.data.to_dict() == METADATA | {
        "tags": [*METADATA["tags"], "transformers.js"],
        "base_model": "some_one/tiny: a",
        "base_model_relation": "quantized",
    }


@pytest.mark.parametrize("for_transformers_js", [False, True])
def test_the_python_of_the_card_runs_what_is_on_the_hub(
    folder: Path, hub: Hub, tmp_path: Path, for_transformers_js: bool
) -> None:
    packed = pack(folder, tmp_path / "packed", for_transformers_js=for_transformers_js)
    hub.add("OWNER/NAME", tmp_path / "packed")
    code, check, _ = examples_of(tmp_path / "packed")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    labels = "|".join(read_manifest(folder).task.labels)
    answer = python(code, env=environment).stdout
    assert re.fullmatch(rf"({labels}) from exit [0-3]\n", answer)
    assert python(check, env=environment).stdout.startswith("right here")
    assert packed.file.relative_to(tmp_path / "packed").as_posix() in code


def test_texts_that_check_a_file_need_padding_and_notice_another_answer(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, tmp_path / "packed", FP32)
    record = tmp_path / "packed" / "fpabee.json"
    content = msgspec.json.decode(record.read_bytes())
    kept = content["reference"]
    masks = kept["inputs"]["attention_mask"]
    assert len(masks) == len(kept["texts"]) == len(kept["exits"]) == 4
    assert len({sum(mask) for mask in masks}) > 1
    assert len({*kept["exits"]}) > 1, "otherwise most heads would not be checked"
    session = onnxruntime.InferenceSession(tmp_path / "packed" / "model.onnx")
    for name, ids in kept["inputs"].items():
        kept["inputs"][name] = np.array(ids)
    logits, exits = session.run(None, kept["inputs"])
    assert np.abs(logits - kept["logits"]).max() < 1e-5
    assert exits.tolist() == kept["exits"]
    _, check, _ = examples_of(tmp_path / "packed")
    check = check.replace('snapshot_download("OWNER/NAME")', repr(str(tmp_path / "packed")))
    content["reference"]["inputs"] = {k: v.tolist() for k, v in kept["inputs"].items()}
    for change, says in ((0.0, "right here"), (0.1, "WRONG HERE")):
        kept["logits"][0][0] += change
        record.write_bytes(msgspec.json.encode(content))
        assert python(check).stdout.startswith(says)


def test_triton_can_batch_the_graph_and_complete_its_configuration(
    folder: Path, tmp_path: Path
) -> None:
    """Its backend asks for a first dimension that varies, in all inputs and outputs."""
    graph = onnx.load(pack(folder, tmp_path / "packed").file).graph
    for value in (*graph.input, *graph.output):
        assert not value.type.tensor_type.shape.dim[0].HasField("dim_value"), value.name
    config = Path(__file__).parents[3] / "docs" / "examples" / "triton" / "onnxruntime.pbtxt"
    assert not re.search(r"^(input|output)", config.read_text(), re.MULTILINE)


def test_a_point_that_was_refused_promises_nothing(folder: Path, tmp_path: Path) -> None:
    change_point(folder, "changed_answers", certificate=None, goal=None)
    assert pack(folder, tmp_path / "one", FP32).guarantee == ""
    assert "- Guarantee: none. " in (tmp_path / "one" / "README.md").read_text()


def test_the_example_gives_all_labels_above_their_thresholds(
    engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = engine_copy(exit_0=True)
    task = msgspec.structs.replace(
        read_manifest(folder).task,
        problem_type=ProblemType.MULTI_LABEL,
        label_thresholds=(0.0, 0.0, 1.0, 1.0),
    )
    EnginesFolder.read(folder).with_manifest(task=task).write()
    pack(folder, tmp_path / "one", FP32)
    example, *_ = examples_of(tmp_path / "one")
    assert "np.flatnonzero(probabilities > [0.0, 0.0, 1.0, 1.0])" in example
    place = f"Path({str(tmp_path / 'one')!r})"
    example = example.replace('Path(snapshot_download("OWNER/NAME"))', place)
    labels = read_manifest(folder).task.labels
    assert python(example).stdout.startswith(str(list(labels[:2])))
