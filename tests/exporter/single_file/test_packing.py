"""A packed folder, used as any other program would, gives the answers of the engine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_state
from tokenizers import Tokenizer
from transformers import AutoConfig

from fpabee.commands.pack import main
from fpabee.exporter import export
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.single_file import graph, pack, packing
from fpabee.exporter.single_file.rules import OUTPUTS
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    CheckError,
    Confidence,
    Engine,
    Entropy,
    ExitRule,
    FPabee,
    InputError,
    Pabee,
    Pcee,
    ProblemType,
    RuleError,
    read_manifest,
)
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.artifact.reference import write_reference
from fpabee.runtime.backends.onnxruntime import session_options
from fpabee.runtime.check import BATCH_LIMIT, EXPORT_LIMIT, REQUIREMENTS, logit_differences
from fpabee.runtime.encoding import Text

from ...closeness import assert_close, assert_exported, exits_may_differ
from ...conftest import add_quick_pass, correct_reference, make_model
from ...programs import invoke, printed, python
from .conftest import FP32, INT8, PAIRS, RULES, SINGLE, PackCopy
from .consumer import Answers, Consumer

FEW = ["bert", "albert", "mpnet"]
TARGETS = [
    pytest.param(
        family, target, marks=[] if (family, target) in product(FEW, [FP32]) else pytest.mark.slow
    )
    for family, target in product(_FAMILIES, (FP32, INT8))
]


def renew_hash_of_tokenizer(folder: Path) -> None:
    manifest = read_manifest(folder)
    sha256 = sha256_of(folder / "tokenizer" / "tokenizer.json")
    spec = msgspec.structs.replace(manifest.tokenizer, sha256=sha256)
    EnginesFolder(folder, manifest).with_manifest(tokenizer=spec).write()


def assert_equal(engine: Engine, given: list[Text], found: Answers, least_exits: int = 2) -> None:
    """The logits and exits are those of the engine, but for scores next to a threshold.

    In int8, few rows have an activation that is rounded to another whole number.
    """
    trace = engine.trace(given)
    task = engine.manifest.task
    expected = np.array([answer.exit for answer in engine.predict(given)])
    logits, exits = found
    same = trace.logits[exits - trace.first_exit, np.arange(len(given))]
    is_int8 = engine.target.endswith("int8")
    assert_close(logits, same, REQUIREMENTS["int8"].tie if is_int8 else EXPORT_LIMIT)
    ties = exits_may_differ(trace.logits, engine.rule, task, trace.first_exit)
    ties |= logit_differences(logits, same) > BATCH_LIMIT
    assert ties.mean() <= 0.1
    np.testing.assert_array_equal(exits[~ties], expected[~ties])
    assert len(set(exits)) >= least_exits


@pytest.mark.parametrize(("family", "target"), TARGETS)
def test_answers_are_those_of_the_engine_in_every_batch(
    family: str, target: str, pack_copy: PackCopy
) -> None:
    is_int8 = target == INT8
    made = pack_copy(family, target=target, for_transformers_js=is_int8)
    assert made.packed.file.name == ("model_quantized.onnx" if is_int8 else "model.onnx")
    consumer = made.consumer
    with Engine.load(made.engines, target, "fast") as engine:
        for texts in (SINGLE, PAIRS):
            alone = consumer.in_batches(consumer.onnxruntime, texts, 1)
            assert_equal(engine, texts, alone)
            for size, padding in ((2, 5), (7, 0), (32, 1), (64, 0)):
                answers = consumer.in_batches(consumer.onnxruntime, texts, size, padding)
                assert_equal(engine, texts, answers)
                if target == FP32:
                    same = answers[1] == alone[1]
                    assert_close(answers[0][same], alone[0][same])
        if target == FP32:
            pytest.importorskip("openvino")
            run = consumer.openvino()
            for texts, size in ((SINGLE, 32), (PAIRS, 7)):
                assert_equal(engine, texts, consumer.in_batches(run, texts, size, padding=1))


@pytest.mark.parametrize(
    "family", ["albert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bert", "mpnet"))]
)
def test_heads_that_attend_give_the_answers_of_the_engine(
    family: str, attending_engines: Mapping[str, Path], pack_copy: PackCopy, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    folder = Path(shutil.copytree(attending_engines[family], tmp_path / "engines"))
    consumer = pack_copy(rule=Pabee(patience=1)).consumer
    with Engine.load(folder, FP32, "fast") as engine:
        for run in (consumer.onnxruntime, consumer.openvino()):
            for size in (1, 7):
                assert_equal(engine, SINGLE, consumer.in_batches(run, SINGLE, size))


def test_rows_that_have_stopped_leave(pack_copy: PackCopy) -> None:
    consumer = pack_copy().consumer
    model = onnx.load(consumer.model)
    of_exits = {number: f"after_exit_{number:02d}/hidden_states" for number in (1, 2)}
    for name in of_exits.values():
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    _, exits, *states = session.run(None, consumer.inputs(SINGLE[:64]))
    assert set(exits) == {0, 1, 2, 3}
    assert [len(each) for each in states] == [(exits >= number).sum() for number in of_exits]


@pytest.mark.parametrize("family", FEW)
def test_openvino_finds_the_buckets_of_exit_0(family: str, pack_copy: PackCopy) -> None:
    """Its int64 is not exact: labels may hide a wrong bucket, logits of exit 0 do not."""
    pytest.importorskip("openvino")
    made = pack_copy(family, Budget(exit=0))
    consumer = made.consumer
    with Engine.load(made.engines, FP32, "fast") as engine:
        for given in (SINGLE, PAIRS):
            expected = engine.trace(given).logits[0]
            for run in (consumer.onnxruntime, consumer.openvino()):
                logits, exits = consumer.in_batches(run, given, 8)
                assert_exported(logits, expected)
                assert not exits.any()


UNREADABLE: list[tuple[str, Any, int]] = [
    *[("attention_mask", slice(None), 0), ("attention_mask", 0, 0)],  # nothing; padding on the left
    *[("input_ids", 1, 10_000), ("input_ids", 1, -1), ("input_ids", 1, -10_000)],
    *[("token_type_ids", 1, 9), ("token_type_ids", 1, -1)],
]


@pytest.mark.parametrize("exit_number", [0, 2])
@pytest.mark.parametrize("family", FEW)
def test_what_the_model_cannot_read_has_no_answer(
    family: str, exit_number: int, pack_copy: PackCopy
) -> None:
    """It is an error of the runtime, or NaN, and does not change the rows beside it."""
    pytest.importorskip("openvino")
    refusals = (
        *(onnxruntime_state.Fail, onnxruntime_state.InvalidArgument),
        *(onnxruntime_state.RuntimeException, RuntimeError),
    )
    consumer = pack_copy(family, Budget(exit=exit_number)).consumer
    right = consumer.inputs(["turn on", "rain " * 9, "the sun"])
    others = [0, 2]
    for run in (consumer.onnxruntime, consumer.openvino()):
        expected, _ = run(right)
        for name, place, value in UNREADABLE:
            if name in right:
                changed = right[name].copy()
                changed[1, place] = value
                with contextlib.suppress(*refusals):
                    logits, exits = run(right | {name: changed})
                    assert np.isnan(logits[1]).all()
                    assert_exported(logits[others], expected[others])
                    assert (exits == exit_number).all()
        too_long = consumer.tokenizer.model_max_length + 1
        batches = [
            {name: array[:, :0] for name, array in right.items()},
            {name: np.resize(array[:1], (3, too_long)) for name, array in right.items()},
        ]
        for inputs in batches:
            with contextlib.suppress(*refusals):
                logits, _ = run(inputs)
                assert np.isnan(logits).all()
        logits, exits = run({name: array[:0] for name, array in right.items()})
        assert logits.shape == (0, expected.shape[1])
        assert exits.shape == (0,)


def test_the_folder_is_that_of_a_plain_classifier(pack_copy: PackCopy) -> None:
    made = pack_copy()
    config = AutoConfig.from_pretrained(made.folder)
    assert config.architectures == ["BertForSequenceClassification"]
    assert [*config.id2label.values()] == [*read_manifest(made.engines).task.labels]
    assert not hasattr(config, "fpabee")
    settings = json.loads((made.folder / "fpabee.json").read_text())
    assert ExitRule.from_dict(settings["rule"]) == RULES["bert"]
    assert settings["layers"] == settings["exits"] == [0, 1, 2, 3]
    assert "Layers per text: 1.00 of 3" in made.card
    model = onnx.load(made.packed.file)
    assert (model.ir_version, [each.version for each in model.opset_import]) == (10, [20])
    assert [each.name for each in model.graph.output] == ["logits", "exit"]
    assert {each.name for each in model.graph.initializer if each.name.startswith("fpabee.")} == {
        *("fpabee.thresholds", "fpabee.exit_0_uncertainty", "fpabee.min_exit", "fpabee.max_exit")
    }
    inner = [each for node in model.graph.node for part in node.attribute for each in part.g.node]
    assert inner
    assert not any(each.op_type == "If" for each in inner), "the chain is flat"


def test_texts_of_a_folder_are_no_markup_in_the_card(
    engine_copy: Callable[..., Path], tmp_path: Path, set_points: Callable[..., None]
) -> None:
    folder = engine_copy(exit_0=True)
    name = "[fast](https://x.y)\n# <b>"
    set_points(folder, FP32, name, **{name: RULES["bert"]})
    pack(folder, tmp_path / "packed", FP32)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert r"Operating point \[fast\](https:\//x.y)\\n# &lt;b&gt; of" in card
    assert "model.onnx stops each text" in card


def test_a_shared_block_is_stored_once(pack_copy: PackCopy) -> None:
    made = pack_copy("albert")
    graphs = read_manifest(made.engines).graphs
    sizes = {name: (made.engines / each.file).stat().st_size for name, each in graphs.items()}
    exit_0 = (made.engines / "exit_0.npz").stat().st_size
    # Stored in each branch, it would be there twice more.
    most = sum(sizes.values()) + exit_0 + sizes["block_01"]
    assert made.packed.file.stat().st_size < most + 60_000, "the nodes have less"


def test_weights_that_do_not_fit_lie_beside_the_graph(
    pack_copy: PackCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_MOST_BYTES", 1)
    made = pack_copy(for_transformers_js=True)
    files = sorted((made.folder / "onnx").iterdir())
    assert [path.name for path in files] == ["model.onnx", "model.onnx_data"]
    assert made.packed.file == files[0]
    config = json.loads((made.folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    consumer = made.consumer
    with Engine.load(made.engines, FP32, "fast") as engine:
        assert_equal(engine, SINGLE[:40], consumer.in_batches(consumer.onnxruntime, SINGLE[:40], 8))


def test_one_segment_has_nothing_to_decide(tmp_path: Path) -> None:
    export(make_model("bert", tmp_path / "model", layers=1), tmp_path / "engines")
    pack(tmp_path / "engines", tmp_path / "packed", FP32)
    consumer = Consumer(tmp_path / "packed")
    _, exits = consumer.onnxruntime(consumer.inputs(SINGLE[:4]))
    assert (exits == 1).all()


@pytest.mark.slow
def test_many_layers_load(tmp_path: Path, pack_copy: PackCopy) -> None:
    """Nested branches would take twice as long for each layer."""
    pytest.importorskip("openvino")
    export(make_model("bert", tmp_path / "model", layers=24), tmp_path / "engines")
    made = pack_copy(rule=FPabee(threshold=0.9))
    consumer = made.consumer
    with Engine.load(made.engines, FP32, "fast") as engine:
        for run in (consumer.onnxruntime, consumer.openvino()):
            assert_equal(engine, SINGLE, consumer.in_batches(run, SINGLE, 16))


def test_a_kind_without_outputs_in_a_graph_is_refused_before_any_work(
    engines: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(OUTPUTS, ProblemType.SINGLE_LABEL)
    monkeypatch.setattr(packing, "_contents", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="classifiers cannot be packed"):
        pack(engines["bert"], tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_what_cannot_be_packed_is_refused(
    engine_copy: Callable[..., Path], tmp_path: Path, set_points: Callable[..., None]
) -> None:
    folder = engine_copy(exit_0=True)
    set_points(folder, FP32, fast=RULES["bert"])
    manifest = read_manifest(folder)
    bf16 = msgspec.structs.replace(manifest.targets[FP32], precision="bf16", graph_precision="fp32")
    EnginesFolder(folder, manifest).with_target("openvino-bf16", bf16).write()
    with pytest.raises(
        BackendError, match=r"openvino-bf16 .* choose a `target` from onnxruntime-f"
    ):
        pack(folder, tmp_path / "packed", "openvino-bf16")
    gpu = msgspec.structs.replace(manifest.targets[FP32], device="cuda")
    EnginesFolder(folder, manifest).with_target("onnxruntime-fp32-cuda", gpu).write()
    with pytest.raises(BackendError, match=r"onnxruntime-fp32-cuda .* cannot be packed"):
        pack(folder, tmp_path / "packed", "onnxruntime-fp32-cuda")
    with pytest.raises(RuleError, match="no operating point 'none'; it has: fast"):
        pack(folder, tmp_path / "packed", FP32, "none")
    with pytest.raises(BackendError, match="has no target 'none'; it has onnxruntime-fp32"):
        pack(folder, tmp_path / "packed", "none")
    with pytest.raises(InputError, match="must not change"):
        pack(folder, folder / "onnx" / "packed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ArtifactError, match="full exists already -> give another folder"):
        pack(folder, tmp_path / "full")
    with pytest.raises(ArtifactError, match="does not exist"):
        pack(tmp_path / "none", tmp_path / "packed")
    manifest = read_manifest(folder)
    files = {name: value for name, value in manifest.files.items() if name != "classifier.json"}
    EnginesFolder(folder, manifest).with_manifest(files=files).write()
    with pytest.raises(
        ArtifactError, match=r"no classifier\.json.* -> export or convert the model again"
    ):
        pack(folder, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "full"]


def test_a_graph_that_differs_is_not_written(
    pack_copy: PackCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = graph.single_graph

    def change_logits(factor: float) -> None:
        """Of exit 2."""

        def wrong(*arguments: Any) -> ir.Model:
            model = right(*arguments)
            values = [
                value
                for part in model.graphs()
                for value in part.initializers.values()
                if "exit_02/segment_02/head.classifier." in str(value.name)
            ]
            assert len(values) == 2, "weight and bias"
            for value in values:
                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor))
            return model

        monkeypatch.setattr(packing, "single_graph", wrong)

    change_logits(1.01)
    with pytest.raises(CheckError, match=r"logits differ by 1\.0e-02 of their size"):
        pack_copy(rule=Budget(exit=2))
    change_logits(np.nan)
    with pytest.raises(CheckError, match="logits differ by nan"):
        pack_copy(rule=Budget(exit=2))
    other = Pcee(threshold=0.5)  # whose entropy is normalised
    monkeypatch.setattr(packing, "single_graph", lambda p, m, _, *rest: right(p, m, other, *rest))
    with pytest.raises(CheckError, match=r"[1-9]\d* exits differ"):
        pack_copy(rule=Entropy(threshold=0.5))
    assert not (tmp_path / "packed").exists()
    # Logits of up to 5 change by more than the limit, but not by more than this share of them.
    change_logits(1 + EXPORT_LIMIT / 2)
    made = pack_copy(rule=Budget(exit=2))
    assert made.packed.max_logit_difference < EXPORT_LIMIT


def test_exit_0_is_left_out_where_pairs_cannot_be_told_apart(
    engine_copy: Callable[..., Path], tmp_path: Path, set_points: Callable[..., None]
) -> None:
    folder = engine_copy("mpnet", exit_0=True)
    set_points(folder, FP32, "fast", fast=FPabee(threshold=0.9, exit_0_threshold=0.9))
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    for piece in [each for each in content["post_processor"]["pair"] if "SpecialToken" in each][1:]:
        content["post_processor"]["pair"].remove(piece)
    path.write_text(json.dumps(content))
    renew_hash_of_tokenizer(folder)
    said = printed(main, folder, "-o", tmp_path / "packed", "--quiet")
    assert "without exit 0" in said
    assert "nothing is promised" in said
    assert "fpabee-calibrate" not in said, "that would not help"
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "Nothing is promised" in card, "the point was measured with exit 0"
    consumer = Consumer(tmp_path / "packed")
    _, exits = consumer.onnxruntime(consumer.inputs(SINGLE))
    assert exits.min() >= 2, "F-PABEE has no neighbour before exit 2"


def test_a_text_with_separators_in_its_midst_is_not_compared(
    engine_copy: Callable[..., Path], pack_copy: PackCopy
) -> None:
    """Exit 0 of the graph takes it for a pair."""
    folder = engine_copy("mpnet", exit_0=True)
    known = ["rain</s></s>the sun", "the film"]
    with Engine.load(folder) as engine:
        write_reference(folder, known, engine.trace(known).logits)
    correct_reference(folder)
    assert pack_copy(rule=Budget(exit=0)).packed.rows == 1


def test_what_was_not_calibrated_is_said_with_the_command_that_does_it(
    engines: Mapping[str, Path], tmp_path: Path
) -> None:
    said = printed(main, engines["bert"], "-o", tmp_path / "packed")
    assert f"fpabee-calibrate {engines['bert']} --target {FP32} --data DATA" in said
    assert f"hf upload OWNER/NAME {tmp_path / 'packed'}\n" in said


def test_the_tokenizer_cuts_texts_at_the_limit_and_does_not_pad(
    engine_copy: Callable[..., Path], pack_copy: PackCopy
) -> None:
    folder = engine_copy("mpnet", exit_0=True)
    path = str(folder / "tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=9)
    tokenizer.save(path)
    renew_hash_of_tokenizer(folder)
    made = pack_copy("mpnet")
    tokenizer = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    most = read_manifest(folder).tokenizer.max_length
    assert [len(tokenizer.encode(text)) for text in ("rain", "rain " * most)] == [3, most]


def test_the_command_says_what_it_packed(pack_copy: PackCopy, tmp_path: Path) -> None:
    made = pack_copy()
    folder = made.engines
    manifest = read_manifest(folder)
    bf16 = msgspec.structs.replace(manifest.targets[FP32], precision="bf16", graph_precision="fp32")
    changed = EnginesFolder(folder, manifest).with_target("openvino-bf16", bf16)
    changed.with_manifest(default_target="openvino-bf16").write()
    output = tmp_path / "again"
    arguments = [folder, "-o", output, "--operating-point", "fast"]
    arguments += ["--layout", "transformers.js"]
    content = json.loads(printed(main, *arguments, "--json"))
    assert content["file"] == str(output / "onnx" / "model.onnx")
    assert content["rows"] == made.packed.rows
    assert content["target"] == FP32, "the default target computes in bf16"
    again = Path(content["file"]).read_bytes()
    assert again == made.packed.file.read_bytes(), "always the same bytes"
    result = invoke(main, *arguments, "--quiet")
    assert result.exit_code == 1
    assert str(output) in result.stderr
    assert "--output" in result.stderr


def test_the_examples_of_the_page_run(pack_copy: PackCopy, tmp_path: Path) -> None:
    """In a process of their own, since they know nothing of fpabee."""
    pack_copy(rule=Confidence(threshold=0.1))
    (tmp_path / "classifier").symlink_to(tmp_path / "packed")
    page = Path(__file__).parents[3] / "docs" / "embed-without-python.md"
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        result = python(code, cwd=tmp_path)
        assert not result.stderr, "runtimes do not warn"
        assert "fpabee.thresholds" in code or re.fullmatch(r"(\d from exit 1\n){2}", result.stdout)
    model = onnx.load(tmp_path / "packed" / "model.onnx")
    (changed,) = (each for each in model.graph.initializer if each.name == "fpabee.thresholds")
    np.testing.assert_allclose(onnx.numpy_helper.to_array(changed), [0.81] * 3)


def test_a_point_with_a_quick_pass_is_packed_without_it(
    engine_copy: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = engine_copy("bert")
    add_quick_pass(folder, Confidence(threshold=(0.9, 0.8, 0.7, 0.0)), alone=Budget(exit=2))
    with caplog.at_level("WARNING", "fpabee.exporter"):
        packed = pack(folder, tmp_path / "packed")
    assert (packed.operating_point, packed.rule) == ("alone", Budget(exit=2))
    assert "quick runs in two targets, which one file cannot; alone is packed" in caplog.text
    other = engine_copy("bert", "other")
    add_quick_pass(other, Confidence(threshold=(0.9, 0.8, 0.7, 0.0)))
    with pytest.raises(RuleError, match="has no point that does without the quick pass"):
        pack(other, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
