"""Export a model: cut it at its exits, write ONNX graphs, check them, write the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..calibration.progress import Progress, silent
from ..runtime.artifact.folder import EnginesFolder, sha256_of
from ..runtime.artifact.manifest import (
    CLASSIFIER_NAME,
    REFERENCE_NAME,
    SCHEMA_VERSION,
    TRAINED_ON_NAME,
    VERIFICATION_NAME,
    Activation,
    Graph,
    Manifest,
    Model,
    ProblemType,
    Range,
    Shapes,
    Target,
    Task,
    TokenizerSpec,
)
from ..runtime.artifact.reference import write_reference
from ..runtime.check import BATCH_LIMIT, Agreement
from ..runtime.encoding import EncodedRow, Text, TextEncoder, padding_values
from ..runtime.hub import repository_of
from ..runtime.tasks import task_of, unnamed_task
from . import segments
from .checkpoint import load_checkpoint, resolve_model_dir
from .early import check_exits
from .exit_0_files import CONFIG_BLOCK, export_exit_0, load_exit_0
from .model import MultiExitModel, by_row, predict
from .paths import check_output, resolved
from .staging import staging
from .targets.backends import ONNXRUNTIME, version_of
from .targets.check import FP32_TARGET, check_chain, engine_of
from .tokenizer import save_tokenizer

_MAX_BATCH = 256

BUILT_IN_TEXTS: tuple[Text, ...] = (
    "",
    "yes",
    "What a film.",
    "play the latest album by the band and turn the lights down",
    "It is not that the plot is bad, but nobody could call it good either.",
    "Ünïcode — naïve café, 東京 で 会いましょう 😀",
    "12:45, 3.14 % & $99 <html> [UNK] [SEP] user@example.org https://example.org/?q=1",
    ("The cat sat on the mat.", "A cat was sitting."),
    ("", "The first text of this pair is empty."),
    ("He left early, or so they say.", ""),
    "set an alarm for six in the morning and remind me to water the plants " * 4,
    "the quick brown fox jumps over the lazy dog " * 40,
)
"""Every export is checked on these texts: short, long, empty, pairs, and odd characters."""


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an export.

    Attributes:
        exits: numbers of the exits to keep, counted from 1, ascending; None: all exits.
        problem_type: the task, for checkpoints that do not name it.
        max_length: longest sequence in tokens, including special tokens; None: the longest that
            the tokenizer and the model take.
        texts: more texts to check the export on, besides the built-in ones.
        force: whether to replace an existing engines folder.
    """

    exits: tuple[int, ...] | None = None
    problem_type: ProblemType | None = None
    max_length: int | None = None
    texts: Sequence[Text] = ()
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        folder: the engines folder.
        manifest: its manifest.
        agreement: how closely it agrees with the PyTorch model.
        size: of the folder, in bytes.
    """

    folder: Path
    manifest: Manifest
    agreement: Agreement
    size: int


def export(
    model_dir: str | Path,
    output: str | Path = "engines",
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Compile a trained multi-exit model into an engines folder.

    The model is cut into one ONNX segment for each exit, in fp32. The chain, in the runtime that
    users run, is compared with the whole model: the same labels and exits, and logits within 1e-4
    of their size, which is the largest logit of the row, or 1 if that is more. The folder appears
    completely or not at all. Its target is `onnxruntime-fp32`; `build_targets` of
    `fpabee.exporter.targets` adds others.

    Args:
        model_dir: a folder that `fpabee.exporter.training.train` wrote, or one in the layout of the
            checkpoints of PABEE and F-PABEE (`config.json`, weights with `classifiers.0`,
            `classifiers.1`, ... and a tokenizer), or the id of such a model on the Hugging Face
            hub.
        output: the folder to write.
        options: default: all exits, the model's task and length, built-in texts.
        progress: called with (what, done, total).

    Returns:
        The folder, its manifest, and how closely it agrees with the PyTorch model.

    Raises:
        ModelError: model_dir is missing or damaged, or cannot be compiled with these options.
        InputError: an item of `texts` is not a text, or `output` is inside of a model or
            contains `model_dir`.
        ArtifactError: the output folder exists, or cannot be written.
        MissingExtraError: torch or another package of `fpabee[export,cpu]` is not installed.
        CheckError: the segments differ too much from the model; nothing is written.

    Example:
        ```python
        from fpabee.exporter import ExportOptions, export

        result = export("model_dir", "engines/", ExportOptions(max_length=64, force=True))
        print(result.manifest.exit_layers, result.agreement.max_logit_difference, result.size)
        ```
    """
    options = options or ExportOptions()
    destination = resolved(output)
    check_output(destination, options.force, [model_dir])
    version_of(ONNXRUNTIME)  # the check needs it, so refuse before any slow step begins
    source = resolve_model_dir(model_dir)
    model = load_checkpoint(source, options.problem_type)
    labels = len(model.exit_config.labels)
    method = unnamed_task(model.exit_config.problem_type, labels).method
    exit_0 = load_exit_0(source, model.backbone.config, labels, method)
    texts = [*BUILT_IN_TEXTS, *options.texts]
    base_model = repository_of(model_dir) or ""
    progress = progress or silent
    with staging(destination) as folder:
        exits = options.exits or tuple(range(1, len(model.exit_config.exits) + 1))
        check_exits(exits, len(model.exit_config.exits))
        tokenizer = save_tokenizer(source, model, folder, options.max_length)
        cut = segments.cut(model, exits, "token_type_ids" in tokenizer.inputs)
        graphs = _write_graphs(folder, model, cut, progress)
        progress("check", len(cut.modules), len(cut.modules))
        rows = TextEncoder(folder, tokenizer).encode(texts)
        logits = _logits(model, rows, tokenizer, exits)
        if exit_0:
            logits = np.concatenate([exit_0(rows)[None], logits])
        write_reference(folder, texts, logits)
        manifest = msgspec.structs.replace(
            _manifest(model, cut, tokenizer, graphs),
            base_model=base_model,
            **export_exit_0(exit_0, folder),
        )
        engines, agreement = _checked(EnginesFolder(folder, manifest), texts, logits)
        manifest = _write_manifest(engines, source, model)
        # Again, because it may have appeared meanwhile.
        check_output(destination, options.force, [source])
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    return ExportResult(Path(output), manifest, agreement, size)


def _write_graphs(
    folder: Path, model: MultiExitModel, cut: segments.Cut, progress: Progress
) -> dict[str, Graph]:
    """Write the graphs of a model in fp32; returns their records for the manifest."""
    graphs = {}
    for number, (name, module) in enumerate(cut.modules.items()):
        progress(name, number, len(cut.modules))
        file = f"onnx/fp32/{name}.onnx"
        graphs[name] = segments.export_graph(model, module, folder / file, file)
    return graphs


def _logits(
    model: MultiExitModel,
    rows: Sequence[EncodedRow],
    tokenizer: TokenizerSpec,
    exits: Sequence[int],
) -> NDArray[np.float32]:
    """The logits of a model at some of its exits, `[exits, rows, labels]`."""
    # In small batches, because attention that is not fused needs much memory.
    every = predict(model, rows, padding_values(tokenizer), by_row, batch=8)
    return every.swapaxes(0, 1)[[number - 1 for number in exits]]


def _manifest(
    model: MultiExitModel, cut: segments.Cut, tokenizer: TokenizerSpec, graphs: dict[str, Graph]
) -> Manifest:
    """The manifest of an export that was not checked yet, without exit 0."""
    backbone = model.backbone
    longest = tokenizer.max_length
    task = Task(
        problem_type=model.exit_config.problem_type,
        labels=model.exit_config.labels,
        label_thresholds=model.exit_config.label_thresholds,
        activation=model.exit_config.activation or Activation.SIGMOID,
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fpabee_version=__version__,
        versions={name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        model=Model(
            model_type=backbone.model_type,
            layers=cut.segments[-1].layer,
            hidden_size=int(backbone.config.hidden_size),
            shared_layers=backbone.shared_layers,
            pooling=model.exit_config.pooling.value,
        ),
        task=task,
        tokenizer=tokenizer,
        shapes=Shapes(
            batch=Range(min=1, opt=32, max=_MAX_BATCH),
            sequence=Range(min=1, opt=min(64, longest), max=longest),
        ),
        graphs=graphs,
        segments=cut.segments,
        targets={
            FP32_TARGET: Target(
                backend=ONNXRUNTIME,
                precision="fp32",
                versions={ONNXRUNTIME: version_of(ONNXRUNTIME)},
                tolerance=BATCH_LIMIT,
            )
        },
        default_target=FP32_TARGET,
        default_rule=task_of(task).default_rule(range(1, len(cut.segments) + 1)).to_dict(),
    )


def _checked(
    engines: EnginesFolder, texts: Sequence[Text], logits: NDArray[np.float32]
) -> tuple[EnginesFolder, Agreement]:
    """Compare the chain with the model, and write how closely they agree.

    Returns:
        The folder with the tolerance of its target, and the agreement.

    Raises:
        CheckError: they differ too much.
    """
    with engine_of(engines, FP32_TARGET) as engine:
        agreement = check_chain(engine, texts, logits)
        kind = engine.core.backend.kind_of_machine
    record = engines.path / VERIFICATION_NAME
    record.write_text(json.dumps(agreement.to_dict(), indent=2) + "\n", encoding="utf-8")
    target = msgspec.structs.replace(
        engines.manifest.targets[FP32_TARGET],
        tolerance=max(BATCH_LIMIT, agreement.max_logit_difference),
        checked_on=kind,
    )
    return engines.with_target(FP32_TARGET, target), agreement


def _write_manifest(engines: EnginesFolder, source: Path, model: MultiExitModel) -> Manifest:
    """Write the manifest, after the files that come from the model_dir and have hashes in it."""
    folder = engines.path
    _write_config(folder / CLASSIFIER_NAME, source, model)
    written = [REFERENCE_NAME, VERIFICATION_NAME, CLASSIFIER_NAME]
    if (source / TRAINED_ON_NAME).is_file():
        shutil.copyfile(source / TRAINED_ON_NAME, folder / TRAINED_ON_NAME)
        written.append(TRAINED_ON_NAME)
    files = {name: sha256_of(folder / name) for name in written}
    engines = engines.with_manifest(files=files)
    engines.write()
    return engines.manifest


def _write_config(path: Path, source: Path, model: MultiExitModel) -> None:
    """Write the configuration of a classifier without exits, which `pack` hands on."""
    from transformers.models.auto import modeling_auto

    content = json.loads((source / "config.json").read_bytes())
    content.pop(CONFIG_BLOCK, None)
    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    labels = model.exit_config.labels
    content |= {
        "architectures": [names[model.backbone.model_type]],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": model.exit_config.problem_type.value,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
