"""The files beside the graph, as libraries of Hugging Face read them.

config.json            of the plain classifier
tokenizer.json         that of the engines folder, which cuts texts at the limit of the model
tokenizer_config.json  what is not in it
fpabee.json            exits, rule, what was measured, and texts to check the file with
README.md              the model card
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import msgspec
from tokenizers import Tokenizer

from ... import __version__
from ...runtime.artifact.folder import BAD_JSON, EnginesFolder
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Manifest
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.artifact.quick import quick_of
from ...runtime.errors import EXPORT_AGAIN, ArtifactError
from ...runtime.rules.rules import ExitRule
from ...runtime.rules.words import rule_in_words
from ...runtime.targets import rule_of
from ...runtime.tasks import Task, task_of
from ...runtime.tasks.task import HALF
from ..markdown import MarkdownFormatter
from .kinds import Kind
from .plan import Plan
from .rules import SETTINGS, as_inputs, differ_in_settings_only, settings_of
from .tokenizer import load_tokenizer

_NO_PROMISE = (
    "The plan has not run yet. What was measured holds for the target in `measured_on`. Nothing is "
    "promised on a GPU until the rule is calibrated there."
)
_ONE_LABEL = "answer = labels[str(logits.argmax())]"
_SEVERAL_LABELS = """probabilities = 1 / (1 + np.exp(-logits[0]))
answer = [labels[str(n)] for n in np.flatnonzero(probabilities > $thresholds)]"""


@dataclass(frozen=True)
class Packed:
    """The contents of a packed file, and the result of its check.

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


@dataclass(frozen=True)
class HubFiles:
    """The files.

    Attributes:
        engines: the engines folder, without the exits that were left out.
        kind: of the model.
        packed: what was packed.
        file: the graph or the plan, relative to their folder.
        inputs: the names of the inputs of the graph.
        is_large: whether its weights lie beside it.
        plan: the plan that was built from it; None: there is none.
        exit_0: what the card says about exit 0.
        kept: texts to check the file with, see `texts_to_keep`.
    """

    engines: EnginesFolder
    kind: Kind
    packed: Packed
    file: Path
    inputs: Sequence[str]
    is_large: bool
    plan: Plan | None
    exit_0: str
    kept: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write them to a folder.

        Raises:
            ArtifactError: the configuration of the classifier is damaged.
        """
        tokenizer = load_tokenizer(self.engines)
        tokenizer.save(str(folder / "tokenizer.json"))
        contents = {
            "config.json": self._classifier(),
            "tokenizer_config.json": self._tokenizer_config(tokenizer),
            "fpabee.json": self._record(),
        }
        for name, content in contents.items():
            text = msgspec.json.format(msgspec.json.encode(content), indent=2)
            (folder / name).write_bytes(text + b"\n")
        (folder / "README.md").write_text(self._page(), encoding="utf-8")

    @property
    def _manifest(self) -> Manifest:
        return self.engines.manifest

    @property
    def _task(self) -> Task:
        return task_of(self._manifest.task)

    @property
    def _points(self) -> Mapping[str, OperatingPoint]:
        """The operating points that were measured with what is inside, by name."""
        if self.packed.measured_on is None:
            return {}
        return self._manifest.targets[self.packed.measured_on].operating_points

    @property
    def _point(self) -> OperatingPoint | None:
        """That of the rule inside; None: there is none."""
        return self._points.get(self.packed.operating_point or "")

    def _classifier(self) -> dict[str, Any]:
        """The configuration of the plain classifier."""
        path = self.engines.file(CLASSIFIER_NAME, self._manifest.files[CLASSIFIER_NAME])
        try:
            classifier = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except BAD_JSON as error:
            problem = str(error) or type(error).__name__
            raise ArtifactError(
                f"{path} is not a configuration: {problem}", EXPORT_AGAIN
            ) from error
        if self.plan is not None:
            return classifier
        # What transformers.js calls the file: q8 for model_quantized.onnx, fp32 for model.onnx.
        dtype = "q8" if self.file.stem.endswith("_quantized") else "fp32"
        for_js = {"dtype": dtype, "use_external_data_format": self.is_large}
        return classifier | {"transformers.js_config": for_js}

    def _tokenizer_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        spec = self._manifest.tokenizer
        return {
            # The class that takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_length,
            "model_input_names": [name for name in self.inputs if not name.startswith(SETTINGS)],
            "pad_token": tokenizer.id_to_token(spec.pad_id),
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        }

    def _record(self) -> dict[str, Any]:
        """The contents of `fpabee.json`."""
        measured: dict[str, Any] = {"measured": self._point}
        if self.plan is not None:
            measured = _of_plan(self.plan, self.packed, self._manifest, self._points)
        return {
            **self.packed.to_dict(),
            "fpabee_version": __version__,
            "layers": self._manifest.exit_layers,
            **measured,
            "reference": self.kept,
        }

    def _page(self) -> str:
        """The model card with its metadata."""
        subfolder = "/".join(self.file.parent.parts)
        metadata = _metadata(
            self._manifest.base_model, self.kind.hub_task, is_for_js=bool(subfolder)
        )
        warning = "" if self.plan is None else f"{_NO_PROMISE}\n"
        parts = (self._card(), warning, self._promises(), self._use(subfolder))
        return f"---\n{metadata}\n---\n\n{''.join(parts)}"

    def _card(self) -> str:
        """The first part of the card: the file and its rule."""
        layers = zip(self.packed.exits, self._manifest.exit_layers, strict=True)
        return MarkdownFormatter().format(
            _template(f"{self.kind.templates}card"),
            manifest=self._manifest,
            packed=self.packed,
            labels=", ".join(self._manifest.task.labels),
            exits=", ".join(f"{n} after layer {layer}" for n, layer in layers),
            rule=rule_in_words(self.packed.rule),
            settings="initializers" if self.plan is None else "inputs",
            exit_0=self.exit_0,
        )

    def _promises(self) -> str:
        """The part of the card with the promise and the measurements."""
        point = self._point
        if point is None:
            return "Nothing is promised: the rule was not calibrated for this file.\n"
        speed = ", ".join(
            f"{times:.2f} for {'single texts' if batch == '1' else 'files'}"
            for batch, times in point.measured_speedup.items()
        )
        layers = self._manifest.model.layers
        own = self.kind.measured(point, self.packed.rule, self.packed.exits, layers, speed)
        return MarkdownFormatter().format(
            _template(f"{self.kind.templates}measured"),
            manifest=self._manifest,
            packed=self.packed,
            point=point,
            guarantee=self.packed.guarantee or _no_guarantee(point),
            speed=speed,
            hardware=point.hardware or "unknown hardware",
            versions=", ".join(map(" ".join, point.versions.items())),
            **own,
        )

    def _use(self, subfolder: str) -> str:
        """How to run the file, or how to build the plan again."""
        if self.plan is not None:
            fields = _how_to_build(self.plan, self.packed.precision)
            return Template(_template("use_plan")).substitute(fields)
        fields = {
            "file": self.file.as_posix(),
            "subfolder": subfolder,
            "answer": _answer(self._task),
        }
        names = (f"{self.kind.templates}use", "use_check")
        return "".join(Template(_template(name)).substitute(fields) for name in names)


def _of_plan(
    plan: Plan, packed: Packed, manifest: Manifest, points: Mapping[str, OperatingPoint]
) -> dict[str, Any]:
    """The part of `fpabee.json` about a plan.

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
        if point.rule["name"] != packed.rule.name or quick_of(point) is not None:
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
    """The metadata of a model card, for the Hugging Face hub.

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
