"""Pack an engines folder into one ONNX file, or one TensorRT plan, in a folder of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Manifest, Target
from ...runtime.artifact.reference import read_reference
from ...runtime.backends.tensorrt import MODULES
from ...runtime.errors import EXPORT_AGAIN, ArtifactError, BackendError, RuleError
from ...runtime.rules.rules import ExitRule
from ...runtime.targets import rule_alone, rule_of, target_of
from ...runtime.tasks import row_of, task_of
from ..onnx_file import graphs_of, load_graphs
from ..paths import check_new, resolved
from ..staging import staging
from ..targets.builders import BUILDERS, FP16, Builder
from ..targets.check import FP32_TARGET
from ..targets.fp16 import lowered_graphs
from ..targets.plans import PlanOptions
from ..targets.tensorrt import plans_record
from .check import check_single_graph, texts_to_keep
from .graph import single_graph
from .hub_files import HubFiles, Packed, guarantee_in_words
from .kinds import KINDS, Kind, Parts
from .plan import Plan, build_plan
from .rules import OUTPUTS

logger = logging.getLogger(__name__)

# Protobuf refuses 2 GiB; the nodes need little of it.
_MOST_BYTES = 2**31 - 2**26
# TensorRT chooses kernels for the typical shape, and a plan serves single texts above all.
_SHAPES = PlanOptions(batch=(1, 1, 32))
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
        InputError: the model does not take the shapes of `plans`, or its kind cannot be packed.
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
    task = source.manifest.task
    row_of(OUTPUTS, task.problem_type, "packed")  # which the graph looks up much later
    kind = KINDS[task_of(task).method]
    contents = _contents(source, kind, target, plans or _SHAPES, progress)
    point, rule = _rule_of(source.manifest, contents.measured_on, operating_point)
    parts = kind.parts(source, contents.protos, rule, point)
    reference, _ = read_reference(source)
    progress("pack", 0, 2)
    # Before the graph, which takes the weights of the segments.
    cases = kind.cases(parts, reference, contents.protos, contents.precision)
    model = _graph(contents, parts)
    is_large = _bytes_of(model) > _MOST_BYTES
    with staging(place) as folder:
        file = folder / _name_of(contents.precision, for_transformers_js)
        file.parent.mkdir(exist_ok=True)
        progress("check", 1, 2)
        near_ties, difference = check_single_graph(
            model, parts.rule, cases, contents.precision, file, is_large
        )
        onnx.checker.check_model(file)
        plan = _plan(contents, model, file, progress)
        packed = _packed(
            contents,
            parts,
            file=place / (file if plan is None else file.with_name(plan.file)).relative_to(folder),
            rows=len(cases.rows),
            near_ties=near_ties,
            max_logit_difference=difference,
        )
        HubFiles(
            engines=parts.source,
            kind=kind,
            packed=packed,
            file=packed.file.relative_to(place),
            inputs=[str(value.name) for value in model.graph.inputs],
            is_large=is_large,
            plan=plan,
            exit_0=parts.exit_0,
            kept=texts_to_keep(model, parts.rule, cases, contents.precision),
        ).write(folder)
    return packed


@dataclass(frozen=True)
class _Contents:
    """The graphs that are packed.

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


def _contents(
    engines: EnginesFolder,
    kind: Kind,
    target: str | None,
    plans: PlanOptions,
    progress: Progress,
) -> _Contents:
    """The graphs of a target; those of a plan need not be in the folder.

    Raises:
        FpabeeError: see `_for_cpu` and `_for_plan`.
    """
    if target not in _PLANS:
        return _for_cpu(engines, target)
    kind.check_plan()
    return _for_plan(engines, BUILDERS[target], plans, progress)


def _for_cpu(engines: EnginesFolder, target: str | None) -> _Contents:
    """The graphs from which a target for CPUs is packed.

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
    """The graphs of a plan. Those in fp16 that the folder does not have are made, see `fp16`.

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


def _graph(contents: _Contents, parts: Parts) -> ir.Model:
    """The graph, whose settings are inputs if it becomes a plan."""
    return single_graph(
        contents.protos,
        parts.source.manifest,
        parts.rule,
        parts.before,
        contents.plan is not None,
        parts.rows,
    )


def _bytes_of(model: ir.Model) -> int:
    """The size of the weights of a graph."""
    weights = [value.const_value for part in model.graphs() for value in part.initializers.values()]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _name_of(precision: str, for_transformers_js: bool) -> Path:
    """Where the graph lies in its folder."""
    if not for_transformers_js:
        return Path("model.onnx")
    return Path("onnx", "model_quantized.onnx" if precision == "int8" else "model.onnx")


def _plan(contents: _Contents, model: ir.Model, graph: Path, progress: Progress) -> Plan | None:
    """The plan of a graph, built beside it; None: the target is none.

    Raises:
        BackendError: it could not be built.
    """
    if contents.plan is None:
        return None
    progress(f"build {contents.target}", 0, 1)
    return build_plan(model, graph, contents.plan)


def _rule_of(manifest: Manifest, target: str, point: str | None) -> tuple[str | None, ExitRule]:
    """The point that is packed: one graph runs one target, so none with a quick pass."""
    asked, _ = rule_of(manifest, target, point)
    name, rule = rule_alone(manifest, target, point)
    if name is None and asked is not None:
        raise RuleError(
            f"operating point {asked} runs in two targets, which one file cannot, and has no point "
            "that does without the quick pass",
            "name another `operating_point`, or calibrate one",
        )
    if name != asked:
        logger.warning(
            f"operating point {asked} runs in two targets, which one file cannot; {name} is packed "
            "instead"
        )
    return name, rule


def _packed(contents: _Contents, parts: Parts, **checked: Any) -> Packed:
    """The description of a packed file.

    Args:
        contents: its graphs.
        parts: what else is inside.
        checked: the file, and what its check found, as in `Packed`.
    """
    manifest = parts.source.manifest
    point = parts.operating_point
    points = manifest.targets[contents.measured_on].operating_points
    record = points.get(point or "")
    unit = task_of(manifest.task).unit
    return Packed(
        target=contents.target,
        precision=contents.precision,
        operating_point=point,
        measured_on=contents.measured_on if point else None,
        guarantee="" if record is None else guarantee_in_words(record, unit),
        rule=parts.rule,
        exits=manifest.exits,
        no_exit_0=parts.no_exit_0,
        **checked,
    )
