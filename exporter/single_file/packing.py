"""Pack an engines folder into one ONNX file, in a folder that other libraries read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import CLASSIFIER_NAME
from ...runtime.artifact.reference import read_reference
from ...runtime.errors import EXPORT_AGAIN, ArtifactError, BackendError
from ...runtime.exit_0 import ExitZero
from ...runtime.targets import rule_of, target_of
from ..onnx_file import graphs_of, load_graphs
from ..paths import check_new, resolved
from ..staging import staging
from ..targets.check import FP32_TARGET
from .check import check_single_graph
from .exit_0_nodes import ExitZeroNodes, PairMarks
from .graph import TYPES, single_graph
from .hub_files import Packed, load_tokenizer, write_files

# Protobuf refuses 2 GiB; the nodes need little of it.
_MOST_BYTES = 2**31 - 2**26


def pack(
    engines: str | Path,
    output: str | Path,
    target: str | None = None,
    operating_point: str | None = None,
    for_transformers_js: bool = False,
    progress: Progress = silent,
) -> Packed:
    """Write a model with its exits and a rule as one ONNX graph, in a folder of its own.

    Before the folder appears, the graph runs the reference texts with the rule and with two other
    thresholds: its logits must be those of the segments, and its exits those of `simulate`.

    Args:
        engines: an engines folder.
        output: the folder to write, which must not exist yet, or be empty.
        target: a target for CPUs in fp32 or int8, whose graphs are packed; default: the default
            target, or if that has another precision, `onnxruntime-fp32`.
        operating_point: one of the target's; default: its default point, or if it has none the
            default rule of the folder.
        for_transformers_js: whether the graph is `onnx/model.onnx`, or in int8
            `onnx/model_quantized.onnx`, instead of `model.onnx`.
        progress: called with (what, done, total).

    Returns:
        What was packed.

    Raises:
        ArtifactError: the engines folder is damaged, or the output folder exists.
        BackendError: the folder has no such target, or it does not run ONNX graphs in fp32 or int8.
        RuleError: the target has no such point, or its rule cannot be a graph.
        CheckError: the graph does not agree with the segments; nothing is written.

    Example:
        ```python
        from fpabee.exporter.single_file import pack

        packed = pack("engines/", "classifier/", target="onnxruntime-fp32")
        print(packed.file, packed.rule, packed.max_logit_difference)
        ```
    """
    place = resolved(output)
    check_new(place, [engines])
    source = EnginesFolder.read(engines)
    targets = source.manifest.targets
    packable = [
        name
        for name, each in targets.items()
        if each.precision in ("fp32", "int8") and not each.on_gpu
    ]
    default = source.manifest.default_target
    default = default if default in packable else FP32_TARGET
    name = target_of(source, target or default)
    if name not in packable:
        raise BackendError(
            f"target {name} does not run ONNX graphs in fp32 or int8, so they cannot be packed",
            f"choose a `target` from {', '.join(packable)}" if packable else EXPORT_AGAIN,
        )
    if CLASSIFIER_NAME not in source.manifest.files:
        raise ArtifactError(f"{engines} has no {CLASSIFIER_NAME}", EXPORT_AGAIN)
    point, rule = rule_of(source.manifest, name, operating_point)
    reference, _ = read_reference(source)
    graphs = graphs_of(source.manifest, targets[name])
    inside = None
    separators: tuple[str, ...] = ()
    no_exit_0 = ""
    exit_0 = ExitZero.load(source)
    if exit_0 is not None:
        has_types = any(value.name == TYPES for graph in graphs.values() for value in graph.inputs)
        marks = PairMarks.of(load_tokenizer(source), has_types)
        if marks is None:
            no_exit_0 = "no token types or separators say where the second text of a pair begins"
            source = source.with_manifest(exit_0=None)
            point = None
            rule = msgspec.structs.replace(rule, exit_0_threshold=None)
        else:
            inside = ExitZeroNodes(exit_0, marks)
            separators = marks.texts
    progress("pack", 0, 2)
    model = single_graph(load_graphs(source, graphs), source.manifest, rule, inside)
    weights = [value.const_value for part in model.graphs() for value in part.initializers.values()]
    is_large = sum(weight.nbytes for weight in weights if weight is not None) > _MOST_BYTES
    # Exit 0 of the graph takes a text with separators in its midst for a pair.
    texts = [text for text in reference if not any(token in "".join(text) for token in separators)]
    is_int8 = targets[name].precision == "int8"
    with staging(place) as folder:
        file = Path("model.onnx")
        if for_transformers_js:
            file = Path("onnx", "model_quantized.onnx" if is_int8 else file)
        (folder / file).parent.mkdir(exist_ok=True)
        progress("check", 1, 2)
        rows, near_ties, difference = check_single_graph(
            source, name, rule, model, folder / file, texts, is_large
        )
        onnx.checker.check_model(folder / file)
        packed = Packed(
            file=place / file,
            target=name,
            operating_point=point,
            rule=rule,
            exits=source.manifest.exits,
            no_exit_0=no_exit_0,
            rows=rows,
            near_ties=near_ties,
            max_logit_difference=difference,
        )
        write_files(source, folder, file, packed, model, is_large)
    return packed
