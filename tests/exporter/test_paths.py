"""An output never takes an input with it, and what cannot be written is refused at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.exporter.paths import check_apart, check_new, check_output, resolved
from fpabee.runtime.errors import ArtifactError, InputError

# The output and an input, in a folder where `link` leads to `out`, and `out/away` to `elsewhere`.
TOGETHER = [
    ("out", "out"),
    ("out", "out/deep/texts.jsonl"),
    ("out", "elsewhere/../out/texts.jsonl"),
    ("link", "out/texts.jsonl"),
    ("out", "link/texts.jsonl"),
    ("out", "out/away/texts.jsonl"),  # the link would be lost
    ("out", "to_texts"),
]
APART = [("out", "elsewhere/texts.jsonl"), ("out", "out.jsonl"), ("out/deep", "out/texts.jsonl")]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of `TOGETHER` is the current one."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out/deep", "elsewhere"):
        Path(folder).mkdir(parents=True)
    for link, target in (("link", "out"), ("out/away", "../elsewhere"), ("to_texts", "out/texts")):
        Path(link).symlink_to(target)


@pytest.mark.parametrize(("output", "other"), TOGETHER)
def test_an_input_inside_of_the_output_is_refused(output: str, other: str, places: None) -> None:
    for source in (other, Path(other).absolute()):
        with pytest.raises(InputError, match="is inside of it"):
            check_apart(resolved(output), [None, source])


@pytest.mark.parametrize(("output", "other"), APART)
def test_an_input_elsewhere_is_none_of_its_business(output: str, other: str, places: None) -> None:
    check_apart(resolved(output), [other, None])


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "onnx/notes.txt",
        "onnx/fp32/model.onnx",
        "onnx/fp32/more/segment_01.onnx",
        "targets/int8/segment_01.onnx",
        "tokenizer/vocab.txt",
        "calibration/dev.jsonl",
        "calibration/.hidden",
        "empty/",
        "onnx/fp32/empty/",
        "targets/link",
    ],
)
def test_a_folder_with_files_of_somebody_else_is_not_replaced(
    foreign: str, engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = engine_copy()
    place = folder / foreign
    place.parent.mkdir(parents=True, exist_ok=True)
    if foreign == "targets/link":
        place.symlink_to(tmp_path)
    elif foreign.endswith("/"):
        place.mkdir()
    else:
        place.touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(ArtifactError, match=f"also holds {re.escape(foreign)}, which no export"):
        check_output(folder, force=True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_what_fpabee_wrote_and_what_a_killed_process_left_is_replaced(
    family: str, engine_copy: Callable[..., Path]
) -> None:
    folder = engine_copy(family, exit_0=family == "bert")
    for path in (
        ".manifest-k3x_9",
        "calibration/trace-onnxruntime-fp32-0123456789ab.npz",
        "calibration/.trace-onnxruntime-fp32-0123456789ab-k3x_9",
        "onnx/.fp16-0123abcd.unfinished/segment_01",
        "onnx/fp16/segment_01-0123abcd.onnx",
        "targets/tensorrt-fp16-sm86/head_02-0123abcd.plan",
        "targets/tensorrt-fp16-sm86/timing.cache",
        "targets/int8/.int8-0123abcd.unfinished/block_01-0123abcd.onnx",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    (folder / "targets" / "openvino-fp32").mkdir()
    check_output(folder, force=True)


def test_a_repository_on_the_hub_is_no_path(places: None) -> None:
    check_apart(resolved("owner"), ["owner/name"])


def test_a_name_is_too_long_before_anything_is_written(tmp_path: Path) -> None:
    """The folder has a longer name while it is written."""
    for check in (check_new, lambda target: check_output(target, force=True)):
        check(tmp_path / ("a" * 200))
        for name in ("a" * 250, "file/out"):
            (tmp_path / "file").touch()
            with pytest.raises(ArtifactError, match=r"File name too long|Not a directory"):
                check(tmp_path / name)
