"""The files beside the graph, as libraries of Hugging Face read them.

config.json            of the plain classifier
tokenizer.json         that of the engines folder
tokenizer_config.json  what is not in it
fpabee.json            exits, rule, and what was measured
README.md              the model card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from ... import __version__
from ...runtime.artifact.folder import verified
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Manifest
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.errors import EXPORT_AGAIN, ArtifactError, printable
from ...runtime.rules.rules import ExitRule
from ...runtime.rules.words import rule_in_words
from .verify import Verified

SETTINGS_NAME = "fpabee.json"


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        file: the graph.
        target: whose graphs it holds.
        operating_point: the one inside; None: the default rule of the engines folder.
        rule: the rule inside.
        exits: the numbers of its exits.
        no_exit_0: why exit 0 of the model was left out; empty: it was not.
        verified: how closely the graph agrees with the segments.
    """

    file: Path
    target: str
    operating_point: str | None
    rule: ExitRule
    exits: range
    no_exit_0: str
    verified: Verified


def write_config(
    source: Path, folder: Path, manifest: Manifest, dtype: str, has_external_data: bool
) -> None:
    """Write the configuration, with what transformers.js needs to find the graph.

    Args:
        source: the engines folder.
        folder: where to write it.
        manifest: of the engines folder.
        dtype: what transformers.js calls the precision.
        has_external_data: whether the weights lie beside the graph.

    Raises:
        ArtifactError: the engines folder has none.
    """
    if CLASSIFIER_NAME not in manifest.files:
        raise ArtifactError(f"{source} has no {CLASSIFIER_NAME}, the configuration", EXPORT_AGAIN)
    path = verified(source, CLASSIFIER_NAME, manifest.files[CLASSIFIER_NAME])
    content = json.loads(path.read_bytes())
    content["transformers.js_config"] = {
        "dtype": dtype,
        "use_external_data_format": has_external_data,
    }
    _write_json(folder / "config.json", content)


def write_tokenizer(source: Path, folder: Path, manifest: Manifest, inputs: Sequence[str]) -> None:
    """Write the tokenizer and its configuration.

    Args:
        source: the engines folder.
        folder: where to write them.
        manifest: of the engines folder.
        inputs: the names of the inputs of the graph.
    """
    spec = manifest.tokenizer
    path = verified(source, spec.file, spec.sha256)
    shutil.copyfile(path, folder / "tokenizer.json")
    content = {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.max_length,
        "model_input_names": list(inputs),
        "pad_token": Tokenizer.from_file(str(path)).id_to_token(spec.pad_id),
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", content)


def write_settings(folder: Path, manifest: Manifest, packed: Packed) -> None:
    """Write `fpabee.json` and the model card."""
    measured = manifest.targets[packed.target].operating_points.get(packed.operating_point or "")
    content = {
        "fpabee_version": __version__,
        "target": packed.target,
        "operating_point": packed.operating_point,
        "rule": packed.rule.to_dict(),
        "layers": dict(zip(packed.exits, manifest.exit_layers, strict=True)),
        "no_exit_0": packed.no_exit_0,
        "verified": packed.verified,
        "measured": measured,
    }
    _write_json(folder / SETTINGS_NAME, msgspec.to_builtins(content, str_keys=True))
    card = "\n".join(_card(manifest, packed, measured))
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _card(manifest: Manifest, packed: Packed, measured: OperatingPoint | None) -> list[str]:
    name, task = packed.file.name, manifest.task
    lines = [
        "---",
        "library_name: onnx",
        "pipeline_tag: text-classification",
        "tags: [early-exit, onnx]",
        "---",
        "",
        f"# {manifest.model.model_type} classifier with {len(packed.exits)} exits in one file",
        "",
        f"`{name}` stops each text at the first exit that is sure of it. It has the inputs of a "
        "usual export, and beside `logits` an output `exit`: the number of the exit that answered.",
        "",
        f"- Labels: {printable(', '.join(task.labels))} ({task.problem_type.value}).",
        f"- Exits: {packed.exits[0]} to {packed.exits[-1]}, after the layers "
        f"{', '.join(map(str, manifest.exit_layers))}.",
        f"- Rule: {rule_in_words(packed.rule)}; its settings are initializers whose names begin "
        "with `fpabee.`.",
        f"- Precision: {manifest.targets[packed.target].precision}. Texts of up to "
        f"{manifest.tokenizer.max_length} tokens, padded on the right.",
        f"- Verified on {packed.verified.rows} texts against the segments that it was made from: "
        f"logits differ by at most {packed.verified.max_logit_difference:.1e}, and all exits that "
        f"were compared are equal ({packed.verified.near_ties} are too close to a threshold).",
    ]
    if packed.no_exit_0:
        lines.append(f"- Exit 0 of the model was left out: {packed.no_exit_0}.")
    if measured is None:
        lines += ["", "The rule was not calibrated, so nothing is promised."]
        return lines
    low, high = measured.drop_interval
    lines += [
        "",
        "## Promised and measured",
        "",
        f"Operating point {packed.operating_point} of {packed.target}, on {measured.rows} texts "
        f"({measured.held_out}):",
        "",
        f"- Guarantee: {measured.certificate or 'none'}.",
        f"- Goal: {measured.goal or 'none'}.",
        f"- Score ({measured.metric}): {measured.score:.4f}, at full depth "
        f"{measured.full_depth_score:.4f}; the drop is between {low:.2f} and {high:.2f} points "
        "(95 % interval).",
        f"- Layers per text: {measured.mean_depth:.2f} of {manifest.model.layers}.",
    ]
    if packed.no_exit_0:
        lines += ["", "All of this was measured with exit 0, which is not in this file."]
    return lines


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
