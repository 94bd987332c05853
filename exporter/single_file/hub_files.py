"""The files beside the graph, as libraries of Hugging Face read them.

config.json            of the plain classifier
tokenizer.json         that of the engines folder, which cuts texts at the limit of the model
tokenizer_config.json  what is not in it
fpabee.json            exits, rule, what was measured, and texts to check the file with
README.md              the model card
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import msgspec
from tokenizers import Tokenizer

from ... import __version__
from ...calibration.scoring import AGREEMENT
from ...runtime.artifact.folder import BAD_JSON, EnginesFolder
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Manifest
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.encoding import read_tokenizer
from ...runtime.errors import EXPORT_AGAIN, ArtifactError
from ...runtime.rules.rules import ExitRule
from ...runtime.rules.words import rule_in_words
from ...runtime.targets import rule_of
from ...runtime.tasks import Task, task_of
from ...runtime.tasks.task import HALF
from ..markdown import MarkdownFormatter
from .plan import Plan
from .rules import SETTINGS, as_inputs, differ_in_settings_only, settings_of

# By the method of `Engine` that answers: what the names of templates begin with, and what the hub
# calls the task.
_TEMPLATES = {"predict": "", "rank": "ranking_"}
_HUB_TASKS = {"predict": "text-classification", "rank": "text-ranking"}
_NO_PROMISE = (
    "The plan has not run yet. What was measured holds for the target in `measured_on`. Nothing is "
    "promised on a GPU until the rule is calibrated there."
)
_WITH_SCORES = " with the scores of a search, which this file does not take"
_ONE_LABEL = "answer = labels[str(logits.argmax())]"
_SEVERAL_LABELS = """probabilities = 1 / (1 + np.exp(-logits[0]))
answer = [labels[str(n)] for n in np.flatnonzero(probabilities > $thresholds)]"""
_COSTS_OF_RANKING = (
    "- Layers per document: {depth:.2f} of {layers}, if a query is one batch.\n"
    "- Times as fast as full depth: {speed}.\n"
)


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        file: the graph or the plan.
        target: whose graphs it holds, or that the plan is for.
        precision: of the target.
        operating_point: the one inside, or for a plan, the one that `settings` are of; None: the
            default rule of the engines folder.
        measured_on: the target on which the operating point was measured; None: none was.
        guarantee: of the operating point on that target, in words; empty: there is none.
        rule: the rule inside.
        exits: the numbers of its exits.
        no_exit_0: why exit 0 of the model was left out; empty: it was not.
        rows: how many texts it was checked on, with the rule and with other thresholds.
        near_ties: the most texts of one threshold whose exits were not compared, because a score
            is so close to the threshold that rounding decides.
        max_logit_difference: from the segments, on these texts, divided by the largest logit of
            the row if that is more than 1.
    """

    file: Path
    target: str
    precision: str
    operating_point: str | None
    measured_on: str | None
    guarantee: str
    rule: ExitRule
    exits: range
    no_exit_0: str
    rows: int
    near_ties: int
    max_logit_difference: float

    def to_dict(self) -> dict[str, Any]:
        """The fields in types that JSON has."""
        content = vars(self) | {"file": self.file.name, "rule": self.rule.to_dict()}
        return content | {"exits": list(self.exits)}


def load_tokenizer(engines: EnginesFolder) -> Tokenizer:
    """The tokenizer of an engines folder, which cuts texts at the limit and does not pad them.

    Its file may pad every text to one length, and cut it earlier.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    spec = engines.manifest.tokenizer
    tokenizer = read_tokenizer(engines.file(spec.file, spec.sha256))
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec.max_length)
    return tokenizer


def write_files(
    engines: EnginesFolder,
    folder: Path,
    file: Path,
    packed: Packed,
    model: Any,
    is_large: bool,
    plan: Plan | None,
    kept: Mapping[str, Any],
) -> None:
    """Write the files.

    Args:
        engines: the engines folder, without exit 0 if it was left out.
        folder: where to write them.
        file: the graph or the plan, relative to this folder.
        packed: what was packed.
        model: the graph, an `onnx_ir.Model`.
        is_large: whether its weights lie beside it.
        plan: the plan that was built from it; None: there is none.
        kept: texts to check the file with, see `texts_to_keep`.

    Raises:
        ArtifactError: the configuration of the classifier is damaged.
    """
    manifest = engines.manifest
    spec = manifest.tokenizer
    points = {}
    if packed.measured_on is not None:
        points = manifest.targets[packed.measured_on].operating_points
    point = points.get(packed.operating_point or "")
    tokenizer = load_tokenizer(engines)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = engines.file(CLASSIFIER_NAME, manifest.files[CLASSIFIER_NAME])
    try:
        classifier = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
        raise ArtifactError(f"{path} is not a configuration: {problem}", EXPORT_AGAIN) from error
    measured = {"measured": point} if plan is None else _of_plan(plan, packed, manifest, points)
    # What transformers.js calls the file: q8 for model_quantized.onnx, fp32 for model.onnx.
    dtype = "q8" if file.stem.endswith("_quantized") else "fp32"
    for_js = {"dtype": dtype, "use_external_data_format": is_large}
    if plan is None:
        classifier["transformers.js_config"] = for_js
    names = [str(value.name) for value in model.graph.inputs]
    contents = {
        "config.json": classifier,
        "tokenizer_config.json": {
            # The class that takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_length,
            "model_input_names": [name for name in names if not name.startswith(SETTINGS)],
            "pad_token": tokenizer.id_to_token(spec.pad_id),
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        },
        "fpabee.json": {
            **packed.to_dict(),
            "fpabee_version": __version__,
            "layers": manifest.exit_layers,
            **measured,
            "reference": kept,
        },
    }
    for name, content in contents.items():
        text = msgspec.json.format(msgspec.json.encode(content), indent=2)
        (folder / name).write_bytes(text + b"\n")
    texts = MarkdownFormatter()
    task = task_of(manifest.task)
    kind = _TEMPLATES[task.method]
    promises = "Nothing is promised: the rule was not calibrated for this file.\n"
    if point is not None:
        speed = ", ".join(
            f"{times:.2f} for {'single texts' if batch == '1' else 'files'}"
            for batch, times in point.measured_speedup.items()
        )
        # Scores save layers that the file has to run.
        had_scores = task.compares and len(point.exits) > len(packed.exits)
        costs = _COSTS_OF_RANKING.format(
            depth=point.mean_depth, layers=manifest.model.layers, speed=speed
        )
        promises = texts.format(
            _template(f"{kind}measured"),
            manifest=manifest,
            packed=packed,
            point=point,
            guarantee=packed.guarantee or _no_guarantee(point),
            top=getattr(packed.rule, "top", 0),
            scores=_WITH_SCORES if had_scores else "",
            costs="" if had_scores else costs,
            changed_queries=round(point.rows * (1 - point.score)),
            changed_at_full_depth=round(point.rows * (1 - point.full_depth_score)),
            changed=f" ({1 - point.score:.2%} changed)" if point.metric == AGREEMENT else "",
            speed=speed,
            hardware=point.hardware or "unknown hardware",
            versions=", ".join(map(" ".join, point.versions.items())),
        )
    layers = zip(packed.exits, manifest.exit_layers, strict=True)
    card = texts.format(
        _template(f"{kind}card"),
        manifest=manifest,
        packed=packed,
        labels=", ".join(manifest.task.labels),
        exits=", ".join(f"{n} after layer {layer}" for n, layer in layers),
        rule=rule_in_words(packed.rule),
        settings="initializers" if plan is None else "inputs",
        exit_0=packed.no_exit_0 or ("inside" if packed.exits[0] == 0 else "the model has none"),
    )
    subfolder = "/".join(file.parent.parts)
    fields = {"file": file.as_posix(), "subfolder": subfolder, "answer": _answer(task)}
    name = f"{kind}use"
    if plan is not None:
        fields = _how_to_build(plan, packed.precision)
        name = "use_plan"
    use = Template(_template(name)).substitute(fields)
    if plan is None:
        use += Template(_template("use_check")).substitute(fields)
    metadata = _metadata(manifest.base_model, _HUB_TASKS[task.method], is_for_js=bool(subfolder))
    warning = "" if plan is None else f"{_NO_PROMISE}\n"
    page = f"---\n{metadata}\n---\n\n{card}{warning}{promises}{use}"
    (folder / "README.md").write_text(page, encoding="utf-8")


def _of_plan(
    plan: Plan, packed: Packed, manifest: Manifest, points: Mapping[str, OperatingPoint]
) -> dict[str, Any]:
    """What `fpabee.json` says of a plan.

    Args:
        plan: the plan.
        packed: what was packed.
        manifest: that of the engines folder.
        points: the operating points by name. Those with another rule need another plan.
    """

    def settings(rule: ExitRule) -> dict[str, Any]:
        inputs = as_inputs(settings_of(rule, manifest.task, manifest.exits))
        return {name: value.tolist() for name, value in inputs.items()}

    served = {}
    for name, point in points.items():
        if point.rule["name"] != packed.rule.name:
            continue
        _, rule = rule_of(manifest, packed.measured_on or "", name)
        if differ_in_settings_only(rule, packed.rule, manifest.task, manifest.exits):
            served[name] = {"settings": settings(rule), "measured": point}
    return {
        "promise": _NO_PROMISE,
        "plan": plan,
        "settings": settings(packed.rule),
        "operating_points": served,
    }


def _how_to_build(plan: Plan, precision: str) -> dict[str, str]:
    """The fields of `use_plan.md`: what the plan is for, and what builds it again."""
    (library,) = plan.versions
    fields = {"target": f"{library.replace('_', '-')}-{precision}"}
    fields["versions"] = f"{library} {plan.versions[library]}"
    fields["gpus"] = ", ".join(plan.compute_capabilities)
    for name in ("batch", "sequence"):
        sizes = getattr(plan.shapes, name)
        fields[name] = f"{sizes.min},{sizes.opt},{sizes.max}"
    return fields


def _metadata(base_model: str, task: str, is_for_js: bool) -> Any:
    """What the Hugging Face hub reads of a model card.

    Args:
        base_model: the repository of the classifier; empty: it is not known.
        task: what the hub calls it.
        is_for_js: whether transformers.js finds the graph without being told where it is.
    """
    from huggingface_hub import ModelCardData

    tags = ["early-exit", "fpabee", "onnx"]
    if is_for_js:
        tags.append("transformers.js")
    return ModelCardData(
        library_name="onnx",
        pipeline_tag=task,
        tags=tags,
        base_model=base_model or None,
        # How the hub names the relation of an ONNX graph to its model, in fp32 as well.
        base_model_relation="quantized" if base_model else None,
    )


def _answer(task: Task) -> str:
    """The lines of Python that make an answer of `logits` and `labels`."""
    if not task.flags:
        return _ONE_LABEL
    thresholds = list(task.record.label_thresholds) or HALF
    return Template(_SEVERAL_LABELS).substitute(thresholds=thresholds)


def _no_guarantee(point: OperatingPoint) -> str:
    return "none" if point.goal is None else f"none; the goal was: {point.goal}"


def guarantee_in_words(point: OperatingPoint, unit: str) -> str:
    """The guarantee of an operating point; empty if there is none.

    Args:
        point: the operating point.
        unit: what it was tested on.
    """
    if point.certificate is None:
        return ""
    tested = [f"{each} (tested on {each.rows:,} {unit})" for each in point.certificate.promises]
    return f"{' and '.join(tested)}, with {point.certificate.confidence:.4g} % confidence"


def _template(name: str) -> str:
    """A part of the model card, to format."""
    return Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8")
