"""Pack an engines folder into one ONNX file, or one TensorRT plan, in a folder of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Target
from ...runtime.artifact.reference import Text, read_reference
from ...runtime.backends.tensorrt import MODULES
from ...runtime.encoding import TextEncoder
from ...runtime.errors import EXPORT_AGAIN, ArtifactError, BackendError
from ...runtime.exit_0 import ExitZero
from ...runtime.rules.rules import ExitRule, TopK
from ...runtime.targets import rule_of, target_of
from ...runtime.tasks import task_of
from ..onnx_file import graphs_of, load_graphs
from ..paths import check_new, resolved
from ..staging import staging
from ..targets.builders import BUILDERS, FP16, Builder
from ..targets.check import FP32_TARGET
from ..targets.fp16 import lowered_graphs
from ..targets.plans import PlanOptions
from ..targets.tensorrt import plans_record
from .cases import Cases, QueryCases
from .check import check_single_graph, logits_of_segments, texts_to_keep
from .exit_0_nodes import ExitZeroNodes
from .graph import TYPES, single_graph
from .hub_files import Packed, guarantee_in_words, load_tokenizer, write_files
from .pair_marks import PairMarks
from .plan import build_plan

# Protobuf refuses 2 GiB; the nodes need little of it.
_MOST_BYTES = 2**31 - 2**26
# TensorRT chooses kernels for the typical shape, and a plan serves single texts above all.
_SHAPES = PlanOptions(batch=(1, 1, 32))
# Queries on which a ranking is checked, their documents besides twice the best, and their words.
_QUERIES = 8
_LEAST_DOCUMENTS = 10
_MOST_WORDS = 20
_PLANS = [name for name, builder in BUILDERS.items() if builder.backend in MODULES]


def pack(
    engines: str | Path,
    output: str | Path,
    target: str | None = None,
    operating_point: str | None = None,
    for_transformers_js: bool = False,
    plans: PlanOptions | None = None,
    progress: Progress = silent,
) -> Packed:
    """Write a model with its exits and a rule as one ONNX graph, in a folder of its own.

    Before the folder appears, the graph runs the reference texts with the rule and with two other
    thresholds: its logits must be those of the segments, and its exits those of `simulate`.

    For a target of TensorRT, a plan is built from the graph. The settings of the rule are inputs of
    it, so one plan serves all operating points with this rule; `fpabee.json` has their settings.
    The plan does not run before it is written.

    Args:
        engines: an engines folder.
        output: the folder to write, which must not exist yet, or be empty.
        target: a target for CPUs in fp32 or int8, whose graphs are packed; or one of TensorRT,
            such as `tensorrt-rtx-fp16`, that this machine can build, which the folder need not
            have. Default: the default target, or if that cannot be packed, `onnxruntime-fp32`.
        operating_point: one of the target's, or if the folder does not have the target, of its
            default target; default: the default point, or if there is none the default rule of the
            folder.
        for_transformers_js: whether the graph is `onnx/model.onnx`, or in int8
            `onnx/model_quantized.onnx`, instead of `model.onnx`.
        plans: shapes and GPUs of a plan; default: typically one row.
        progress: called with (what, done, total).

    Returns:
        What was packed.

    Raises:
        ArtifactError: the engines folder is damaged, or the output folder exists.
        BackendError: the folder has no such target, or it does not run ONNX graphs in fp32 or int8;
            or the plan cannot be built.
        InputError: the model does not take the shapes of `plans`.
        RuleError: the target has no such point, or its rule cannot be a graph.
        CheckError: the graph does not agree with the segments, or fp16 changes answers; nothing is
            written.

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
    if CLASSIFIER_NAME not in source.manifest.files:
        raise ArtifactError(f"{engines} has no {CLASSIFIER_NAME}", EXPORT_AGAIN)
    ranks = source.manifest.task.ranks
    if target in _PLANS:
        if ranks:
            raise BackendError("plans of rankings are not built yet", "choose a `target` for CPUs")
        contents = _for_plan(source, BUILDERS[target], plans or _SHAPES, progress)
    else:
        contents = _for_cpu(source, target)
    protos = contents.protos
    point, rule = rule_of(source.manifest, contents.measured_on, operating_point)
    exit_0 = ExitZero.load(source)
    marks = None
    no_exit_0 = ""
    if exit_0 is not None or ranks:
        inputs = {value.name for proto in protos.values() for value in proto.graph.input}
        marks = PairMarks.of(load_tokenizer(source), TYPES in inputs)
    if ranks and marks is None:
        raise BackendError(
            "no token types or separators say where a document begins, so documents of a query "
            "cannot be recognised in a batch",
            "run the engines folder instead of a file",
        )
    reference, _ = read_reference(source)
    texts = [] if ranks else _texts(reference, marks)
    if ranks:  # a file gets no scores, and the promise holds without them
        source = source.with_manifest(first_stage=None)
        rule = msgspec.structs.replace(rule, exit_0_threshold=None)
    if exit_0 is not None and marks is None:
        no_exit_0 = "no token types or separators say where the second text of a pair begins"
        source = source.with_manifest(exit_0=None)
        exit_0 = None
        point = None
        rule = msgspec.structs.replace(rule, exit_0_threshold=None)
    inside = None if exit_0 is None or marks is None else ExitZeroNodes(exit_0, marks)
    manifest = source.manifest
    progress("pack", 0, 2)
    # First, because the weights of the graphs are moved.
    cases: Cases
    if ranks:
        cases = _query_cases(protos, source, reference, rule, contents.precision)
    else:
        rows = TextEncoder(source.path, manifest.tokenizer).encode(texts)
        expected = logits_of_segments(manifest, protos, exit_0, rows, contents.precision)
        cases = Cases(manifest=manifest, texts=texts, rows=rows, expected=expected)
    model = single_graph(
        protos, manifest, rule, inside, contents.plan is not None, marks if ranks else None
    )
    weights = [value.const_value for part in model.graphs() for value in part.initializers.values()]
    is_large = sum(weight.nbytes for weight in weights if weight is not None) > _MOST_BYTES
    with staging(place) as folder:
        file = Path("model.onnx")
        if for_transformers_js:
            file = Path("onnx", "model_quantized.onnx" if contents.precision == "int8" else file)
        (folder / file).parent.mkdir(exist_ok=True)
        progress("check", 1, 2)
        near_ties, difference = check_single_graph(
            model, rule, cases, contents.precision, folder / file, is_large
        )
        onnx.checker.check_model(folder / file)
        plan = None
        if contents.plan is not None:
            progress(f"build {contents.target}", 0, 1)
            plan = build_plan(model, folder / file, contents.plan)
            file = Path(plan.file)
        record = manifest.targets[contents.measured_on].operating_points.get(point or "")
        guarantee = ""
        if record is not None:
            guarantee = guarantee_in_words(record, task_of(source.manifest.task).unit)
        packed = Packed(
            file=place / file,
            target=contents.target,
            precision=contents.precision,
            operating_point=point,
            measured_on=contents.measured_on if point else None,
            guarantee=guarantee,
            rule=rule,
            exits=manifest.exits,
            no_exit_0=no_exit_0,
            rows=len(cases.rows),
            near_ties=near_ties,
            max_logit_difference=difference,
        )
        kept = texts_to_keep(model, rule, cases, contents.precision)
        write_files(source, folder, file, packed, model, is_large, plan, kept)
    return packed


@dataclass(frozen=True)
class _Contents:
    """What the graph is made of.

    Attributes:
        target: the name of the target.
        precision: its precision.
        measured_on: the name of the target whose operating points it takes.
        protos: its graphs by name, each an `onnx.ModelProto`.
        plan: the record of the target, if it is a plan.
    """

    target: str
    precision: str
    measured_on: str
    protos: dict[str, Any]
    plan: Target | None = None


def _for_cpu(engines: EnginesFolder, target: str | None) -> _Contents:
    """What a target for CPUs is packed from.

    Raises:
        BackendError: the folder has no such target, or it cannot be packed.
    """
    targets = engines.manifest.targets
    packable = [
        name
        for name, each in targets.items()
        if each.precision in ("fp32", "int8") and not each.on_gpu
    ]
    default = engines.manifest.default_target
    default = default if default in packable else FP32_TARGET
    name = target_of(engines, target or default)
    if name not in packable:
        raise BackendError(
            f"target {name} does not run ONNX graphs in fp32 or int8, so they cannot be packed",
            f"choose a `target` from {', '.join([*packable, *_PLANS])}",
        )
    protos = load_graphs(engines, graphs_of(engines.manifest, targets[name]))
    return _Contents(name, targets[name].precision, name, protos)


def _for_plan(
    engines: EnginesFolder, builder: Builder, options: PlanOptions, progress: Progress
) -> _Contents:
    """What a plan is built from. Graphs in fp16 that the folder does not have are made, see `fp16`.

    Raises:
        FpabeeError: this machine cannot build it, or fp16 changes too many answers.
    """
    error = builder.why_not()
    if error is not None:
        raise error
    manifest = engines.manifest
    record = plans_record(engines, builder.backend, builder.precision, options)
    measured_on = record.name if record.name in manifest.targets else manifest.default_target
    if builder.precision == FP16 and FP16 not in manifest.precisions:
        protos = lowered_graphs(engines, None, progress)
    else:
        protos = load_graphs(engines, manifest.graphs_in(builder.precision))
    return _Contents(record.name, builder.precision, measured_on, protos, record)


def _texts(reference: Sequence[Text], marks: PairMarks | None) -> list[Text]:
    """The reference texts, except those that exit 0 of a graph takes for pairs.

    Args:
        reference: the texts.
        marks: how exit 0 recognises pairs: texts with separators in their midst look like some.
    """
    separators = () if marks is None else marks.texts
    return [text for text in reference if not any(each in "".join(text) for each in separators)]


def _query_cases(
    protos: dict[str, Any],
    engines: EnginesFolder,
    reference: Sequence[Text],
    rule: ExitRule,
    precision: str,
) -> QueryCases:
    """Queries with documents, made of the words of the reference texts.

    A batch holds all documents of a query and some of the next one, so that queries are mixed.
    """
    manifest = engines.manifest
    top = rule.top if isinstance(rule, TopK) else 1
    words = " ".join(" ".join(text) if isinstance(text, tuple) else text for text in reference)
    documents = _LEAST_DOCUMENTS + 2 * top
    draw = random.Random(0).choices
    queries = np.repeat(np.arange(_QUERIES), documents)
    names = [" ".join(draw(words.split(), k=3)) for _ in range(_QUERIES)]
    texts = [
        (names[query], " ".join(draw(words.split(), k=1 + place % _MOST_WORDS)))
        for place, query in enumerate(queries)
    ]
    rows = TextEncoder(engines.path, manifest.tokenizer).encode(texts)
    expected = logits_of_segments(manifest, protos, None, rows, precision)
    return QueryCases(
        manifest=manifest,
        texts=texts,
        rows=rows,
        expected=expected,
        batch=documents + top,
        queries=queries,
    )
