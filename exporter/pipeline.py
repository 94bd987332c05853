"""Export: adapt the backbone, cut at the exits, write ONNX, verify, write the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..runtime.agreement import Agreement
from ..runtime.artifact.folder import sha256_of, write_manifest
from ..runtime.artifact.manifest import (
    REFERENCE_NAME,
    SCHEMA_VERSION,
    Manifest,
    Model,
    ProblemType,
    Range,
    Shapes,
    Target,
    Task,
)
from ..runtime.artifact.reference import write_reference
from ..runtime.backends.onnxruntime_session import check_installed
from ..runtime.encoding import Text, TextEncoder
from ..runtime.engine import Engine
from ..runtime.errors import ArtifactError
from ..runtime.files import ReadOptions, read_rows
from ..runtime.progress import Progress
from ..runtime.rules.measures import Measure
from ..runtime.rules.rules import FPabee
from . import segments
from .checkpoint import load_checkpoint, resolve_model_dir
from .model import MultiExitModel
from .prune.keep import check_exits
from .staging import check_output, publish, resolved, staging
from .tokenizer import save_tokenizer
from .verify import (
    BUILT_IN_TEXTS,
    FP32_TARGET,
    LEAST_TOLERANCE,
    check_chain,
    check_graphs,
    reference_logits,
    with_verification,
)

# Cautious: a row stops only if two neighbouring exits agree and are nearly certain (for two
# classes, a mean probability of 0.98). It stands until the user calibrates.
DEFAULT_RULE = FPabee(measure=Measure.JSKD, threshold=0.1, patience=1)

_SOURCES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json")
_MAX_BATCH = 256


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an export.

    Attributes:
        exits: exit numbers to keep, counted from 1, ascending; None keeps all.
        problem_type: the task, for checkpoints that do not name it.
        max_length: longest sequence in tokens, special tokens included; None: what the model
            takes.
        verify_data: a file of more texts to verify with, in any format of `runtime.read_rows`.
        reading: how that file is read.
        force: replace an engines folder that is there.
    """

    exits: tuple[int, ...] | None = None
    problem_type: ProblemType | None = None
    max_length: int | None = None
    verify_data: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

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

    The model is cut into one ONNX segment for each exit, in fp32. Each graph is held against its
    PyTorch module, and the chain, as the runtime runs it, against the whole model: logits within
    1e-4, the same labels and exits. The folder appears whole, or not at all. It runs on
    `onnxruntime-fp32`; the command `fpabee-export` also writes other precisions and targets.

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
        ModelError: model_dir is missing, damaged, or cannot be compiled with these options.
        InputError: `verify_data` cannot be read.
        ArtifactError: the output folder exists, or cannot be written.
        MissingExtraError: torch or another package of `fpabee[export,cpu]` is not installed.
        VerificationError: the segments miss the bar; nothing is left behind.

    Example:
        ```python
        from fpabee.exporter import ExportOptions, export

        result = export("model_dir", "engines/", ExportOptions(max_length=64, force=True))
        print(result.manifest.exit_layers, result.agreement.max_logit_difference, result.size)
        ```
    """
    options = options or ExportOptions()
    target = resolved(output)
    check_output(target, options.force)
    check_installed()  # verification needs a runtime: say so before the long part
    source = resolve_model_dir(model_dir)
    if source.resolve().is_relative_to(target):
        raise ArtifactError(
            f"{target} holds the model itself, which would be replaced",
            "give another folder with -o",
        )
    model = load_checkpoint(source, options.problem_type)
    texts = _verification_texts(options)
    report = progress or (lambda what, done, total: None)
    with staging(target) as folder:
        manifest, agreement = _write(folder, source, model, texts, options, report)
        check_output(target, options.force)  # again: it may have appeared meanwhile
        publish(folder, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return ExportResult(Path(output), manifest, agreement, size)


def _write(
    folder: Path,
    source: Path,
    model: MultiExitModel,
    texts: Sequence[Text],
    options: ExportOptions,
    report: Progress,
) -> tuple[Manifest, Agreement]:
    exits = _chosen_exits(model, options.exits)
    tokenizer = save_tokenizer(source, model, folder, options.max_length)
    cut = segments.cut(model, exits)
    graphs = {}
    for number, (name, module) in enumerate(cut.modules.items()):
        report(name, number, len(cut.modules))
        inputs = segments.input_specs(model, module, tokenizer.inputs)
        outputs = segments.output_specs(model, module)
        path = folder / "onnx" / "fp32" / f"{name}.onnx"
        segments.export_graph(module, inputs, outputs, path, model.backbone.max_positions())
        graphs[name] = segments.graph_record(folder, path, inputs, outputs)
    report("verify", len(cut.modules), len(cut.modules))
    rows = TextEncoder(folder, tokenizer).encode(texts)
    logits = reference_logits(model, rows)[[number - 1 for number in exits]]
    write_reference(folder, texts, logits)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fpabee_version=__version__,
        versions={name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        model=_model_record(source, model, cut),
        task=Task(problem_type=model.exit_config.problem_type, labels=model.exit_config.labels),
        tokenizer=tokenizer,
        shapes=_shapes(tokenizer.max_length),
        graphs=graphs,
        segments=cut.segments,
        targets={FP32_TARGET: _target()},
        default_target=FP32_TARGET,
        default_rule=DEFAULT_RULE.to_dict(),
        files={REFERENCE_NAME: sha256_of(folder / REFERENCE_NAME)},
    )
    write_manifest(folder, manifest)
    differences = check_graphs(model, cut, manifest, folder, rows)
    with Engine.load(folder) as engine:
        agreement = check_chain(engine, texts, logits, differences)
    manifest = with_verification(folder, manifest, FP32_TARGET, agreement)
    write_manifest(folder, manifest)
    return manifest, agreement


def _shapes(max_length: int) -> Shapes:
    return Shapes(
        batch=Range(min=1, opt=32, max=_MAX_BATCH),
        sequence=Range(min=1, opt=min(64, max_length), max=max_length),
    )


def _target() -> Target:
    return Target(
        backend="onnxruntime",
        precision="fp32",
        versions={"onnxruntime": _onnxruntime_version()},
        tolerance=LEAST_TOLERANCE,
        row_invariant=True,
    )


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _model_record(source: Path, model: MultiExitModel, cut: segments.Cut) -> Model:
    return Model(
        model_type=model.backbone.model_type,
        layers=cut.segments[-1].layer,
        hidden_size=int(model.backbone.config.hidden_size),
        shared_layers=model.backbone.shared_layers,
        pooling=model.exit_config.pooling.value,
        source_sha256={
            name: sha256_of(source / name) for name in _SOURCES if (source / name).is_file()
        },
    )


def _chosen_exits(model: MultiExitModel, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    count = len(model.exit_config.exits)
    exits = asked or tuple(range(1, count + 1))
    check_exits(exits, count)
    return exits


def _verification_texts(options: ExportOptions) -> list[Text]:
    texts = list(BUILT_IN_TEXTS)
    if options.verify_data is not None:
        rows = read_rows(options.verify_data, options.reading)
        texts += [row.content for row in rows]
    return texts
