"""The artifact on disk: what an engines folder is. The only module that touches its JSON.

    manifest.json            the only file any code trusts, written last, atomically
    tokenizer/tokenizer.json
    onnx/<precision>/*.onnx  portable source of every target
    targets/<target>/        built files, where a backend needs any
    reference.npz            texts and fp32 logits of the PyTorch model
    verification.json        parity of the export

Hashes find damage, not malice. Nothing in the folder is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from .errors import ArtifactError
from .graphs import ATTENTION_BIAS as ATTENTION_BIAS
from .graphs import HIDDEN_STATES as HIDDEN_STATES
from .graphs import LOGITS as LOGITS
from .graphs import NEXT as NEXT
from .graphs import Graph as Graph
from .graphs import Segment as Segment
from .graphs import TensorSpec as TensorSpec
from .graphs import chain_problem
from .operating_point import Count, OperatingPoint, RuleSettings, Sha256

SCHEMA_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"
REFERENCE_NAME = "reference.npz"
VERIFICATION_NAME = "verification.json"
TOKENIZER_NAME = "tokenizer/tokenizer.json"

# The additive attention bias on padding: finite in fp16, unlike -inf.
MASK_FILL = -1e4

_MAX_MANIFEST_BYTES = 16 * 2**20

Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class ProblemType(str, Enum):
    """The task, in the words of Hugging Face's `problem_type`."""

    SINGLE_LABEL = "single_label_classification"
    """One label a row: softmax over the logits."""
    MULTI_LABEL = "multi_label_classification"
    """Any number of labels a row: a sigmoid for each logit."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the model predicts.

    Attributes:
        problem_type: single-label or multi-label.
        labels: names in the order of the logits.
        cuts: multi-label: a label is predicted if its probability is above its cut; empty
            means 0.5 for all.
    """

    problem_type: ProblemType
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    cuts: tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], ...] = ()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Where the segments come from.

    Attributes:
        model_type: encoder family as Hugging Face calls it.
        layers: encoder layers up to the last exit.
        hidden_size: width of the hidden states, in values.
        shared_layers: whether all layers are one block (ALBERT).
        pooling: what the exit heads see: `cls` or `mean`.
        source_sha256: SHA-256 of each source file of the export, by file name.
    """

    model_type: str
    layers: Count
    hidden_size: Count
    shared_layers: bool
    pooling: str
    source_sha256: dict[str, Sha256]


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How texts become model inputs.

    Attributes:
        file: tokenizer.json of the `tokenizers` library; its path in the folder.
        sha256: its SHA-256, in hexadecimal.
        max_length: longest sequence in tokens, special tokens included.
        pad_id: token id on padding.
        pad_type_id: token type id on padding.
        inputs: names of the model inputs the tokenizer makes.
    """

    file: str
    sha256: Sha256
    max_length: Count
    pad_id: Index
    pad_type_id: Index = 0
    inputs: tuple[str, ...]


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a dimension.

    Attributes:
        min: smallest.
        opt: typical: what plans are tuned for.
        max: largest.
    """

    min: Count
    opt: Count
    max: Count


class Shapes(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes that the graphs are for.

    Attributes:
        batch: rows in a batch.
        sequence: tokens in a row.
    """

    batch: Range
    sequence: Range


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What the export's verification found; `verification.json` has the rest.

    Attributes:
        rows: texts that were compared with the PyTorch model.
        max_logit_difference: largest absolute difference of a logit.
        label_agreement: share of (row, exit) with the same labels, near ties left out.
        exit_agreement: share of rows with the same exit, near ties left out.
    """

    rows: int
    max_logit_difference: float
    label_agreement: float
    exit_agreement: float


class BuiltFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a target, and the ONNX file it was built from.

    Attributes:
        file: its path in the folder.
        sha256: its SHA-256, in hexadecimal.
        onnx_sha256: SHA-256 of the ONNX file.
    """

    file: str
    sha256: Sha256
    onnx_sha256: Sha256


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the segments: backend, precision, and device where built for one.

    Attributes:
        backend: inference library, such as `onnxruntime` or `tensorrt`.
        precision: numeric format of the weights and activations, such as `fp32`.
        device: device class the files are bound to; empty if none.
        versions: version of each library that it was built or verified with.
        files: built file of each graph, by the graph's name; empty where the ONNX itself is run.
        tolerance: largest difference in logits from the PyTorch model in fp32, measured;
            None: it was built where it cannot run.
        row_invariant: whether a row's logits are independent of its neighbours.
        compute_capabilities: those of the GPUs that the files run on, such as `8.6`.
        hardware_compatible: whether they also run on Ampere and every later GPU.
        version_compatible: whether they also run with later versions of the library.
        profiles: the shapes that the files take, by length; empty: any.
        batch_sizes: the batch sizes to pad to, in rows; empty: any.
        sequence_lengths: the lengths to pad to, in tokens; empty: any.
        operating_points: calibrated rules by name; they hold for this target only.
        default_operating_point: the one that runs when none is named; empty: the manifest's
            default rule.
    """

    backend: str
    precision: str
    device: str = ""
    versions: dict[str, str] = {}
    files: dict[str, BuiltFile] = {}
    tolerance: Annotated[float, msgspec.Meta(ge=0)] | None
    row_invariant: bool = True
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    profiles: tuple[Shapes, ...] = ()
    batch_sizes: tuple[Count, ...] = ()
    sequence_lengths: tuple[Count, ...] = ()
    operating_points: dict[str, OperatingPoint] = {}
    default_operating_point: str = ""


class NotBuilt(msgspec.Struct, frozen=True, kw_only=True):
    """A target that could not be built where the folder was made.

    Attributes:
        backend: inference library.
        precision: of the graphs to build.
        reason: why it could not be built.
        command: what builds it where it can be, with ENGINES for the folder.
    """

    backend: str
    precision: str
    reason: str
    command: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """An engines folder, as its `manifest.json` says. Paths in it are relative POSIX paths.

    Attributes:
        schema_version: of the format, `major.minor`; the major number is what must fit.
        fpabee_version: that wrote it.
        versions: of the libraries that exported the model.
        model: where the segments come from.
        task: what the model predicts.
        tokenizer: how texts become model inputs.
        shapes: the sizes that the graphs are for.
        graphs: ONNX graphs in fp32 by name.
        segments: the chain, in order; one for each exit.
        targets: by name, such as `onnxruntime-fp32`.
        default_target: the one that runs when none is named.
        default_rule: what runs where no operating point does, as `ExitRule.from_dict` reads it.
        verification: what the export's verification found; None: nothing was verified.
        files: SHA-256 of the other files in the folder.
        precisions: by precision, the graphs in it, by the names of `graphs`.
        not_built: targets that could not be built where the folder was made, by name.

    Example:
        ```python
        from fpabee.runtime import read_manifest

        manifest = read_manifest("engines/")
        print(manifest.task.labels, manifest.exit_layers)
        for name, target in manifest.targets.items():
            print(name, target.precision, list(target.operating_points))
        ```
    """

    schema_version: str
    fpabee_version: str
    versions: dict[str, str]
    model: Model
    task: Task
    tokenizer: TokenizerSpec
    shapes: Shapes
    graphs: dict[str, Graph]
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(min_length=1, max_length=1024)]
    targets: dict[str, Target]
    default_target: str
    default_rule: RuleSettings
    verification: Verification | None = None
    files: dict[str, Sha256] = {}
    precisions: dict[str, dict[str, Graph]] = {}
    not_built: dict[str, NotBuilt] = {}

    def graphs_in(self, precision: str) -> dict[str, Graph]:
        """The graphs in a precision.

        Args:
            precision: `fp32`, or one of `precisions`.

        Raises:
            ArtifactError: the folder has none in it.
        """
        if precision == "fp32":
            return self.graphs
        if precision not in self.precisions:
            raise ArtifactError(
                f"the engines folder has no {precision} graphs; it has "
                f"{', '.join(['fp32', *self.precisions])}",
                f"write them: fpabee-export --from ENGINES --{precision}",
            )
        return self.precisions[precision]

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layer of each exit, counted from 1."""
        return tuple(segment.layer for segment in self.segments)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an engines folder; other files are not looked at.

    Args:
        folder: the folder.

    Raises:
        ArtifactError: no engines folder, damaged, inconsistent, or a newer schema.
    """
    path = Path(folder)
    manifest = _decode(path, _read_bytes(path))
    _check_consistency(path, manifest)
    return manifest


def is_engines_folder(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours, of any version, damaged inside or not."""
    try:
        content = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"schema_version", "fpabee_version"} <= content.keys()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, keeping fields of the old one that this version lacks.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    new = _plain(manifest)
    if (folder / MANIFEST_NAME).is_file():
        raw = _read_bytes(folder)
        new = _graft(msgspec.json.decode(raw), _plain(_decode(folder, raw)), new)
    text = msgspec.json.format(msgspec.json.encode(new), indent=2) + b"\n"
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".manifest-", delete=False) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(folder / MANIFEST_NAME)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {folder / MANIFEST_NAME}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def resolve(folder: Path, relative: str) -> Path:
    """The path of a file of the artifact.

    Raises:
        ArtifactError: the path leaves the folder, or the file is not there.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in relative or not relative
    try:
        leaves = leaves or not path.resolve().is_relative_to(folder.resolve())
        is_file = path.is_file()
    # No path at all: a null byte, too long, or a link to itself.
    except (ValueError, OSError, RuntimeError):
        leaves, is_file = True, False
    if leaves:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} names {relative!r}, which is outside the engines folder",
            "do not use this folder; export the model again with fpabee-export",
        )
    if not is_file:
        raise ArtifactError(
            f"{path} is missing, though the manifest names it",
            "copy the whole engines folder again, or export again with fpabee-export",
        )
    return path


def verified(folder: Path, relative: str, sha256: str) -> Path:
    """The path of a file of the artifact whose hash is that of the manifest.

    Raises:
        ArtifactError: missing, outside the folder, or damaged.
    """
    path = resolve(folder, relative)
    found = sha256_of(path)
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged: sha256 {found[:12]}..., expected {sha256[:12]}...",
            "copy the engines folder again, or export again with fpabee-export",
        )
    return path


def _decode(folder: Path, raw: bytes) -> Manifest:
    try:
        versions = msgspec.json.decode(raw, type=_Version)
        _check_version(versions.schema_version, versions.fpabee_version)
        # Whole, too: fields that this version does not know must be fit to be written again.
        msgspec.json.decode(raw)
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} is damaged: {error or type(error).__name__}",
            "export the model again with fpabee-export",
        ) from error


class _Version(msgspec.Struct):
    schema_version: str
    fpabee_version: str = ""


def _read_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ArtifactError(
            f"engines folder {folder} does not exist",
            "make one with: fpabee-export model_dir -o engines/",
        )
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not an engines folder: it has no {MANIFEST_NAME}",
            "make one with: fpabee-export model_dir -o engines/",
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes, more than any manifest",
            "export the model again with fpabee-export",
        )
    return path.read_bytes()


def _check_version(version: str, fpabee_version: str) -> None:
    if not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
        raise ArtifactError(
            f"schema_version {version!r} is not of the form major.minor",
            "export the model again with fpabee-export",
        )
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        written_by = f"=={fpabee_version}" if re.fullmatch(r"[\w.]+", fpabee_version) else ""
        raise ArtifactError(
            f"the engines folder has schema {version}; this fpabee reads {SCHEMA_VERSION}",
            f"install the fpabee that wrote it: pip install 'fpabee{written_by}', "
            "or export again with this one",
        )


def _check_consistency(folder: Path, manifest: Manifest) -> None:
    problem = _inconsistency(manifest)
    if problem:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} is damaged: {problem}",
            "export the model again with fpabee-export",
        )


def _inconsistency(manifest: Manifest) -> str:
    for number, segment in enumerate(manifest.segments, start=1):
        if segment.exit != number:
            return f"segment {number} says it ends at exit {segment.exit}"
        for call in segment.calls:
            if call not in manifest.graphs:
                return f"segment {number} calls graph {call!r}, which is not listed"
    layers = manifest.exit_layers
    if list(layers) != sorted(set(layers)) or layers[-1] > manifest.model.layers:
        return f"the exits' layers {list(layers)} do not ascend to {manifest.model.layers}"
    problem = chain_problem(manifest.segments, manifest.graphs, len(manifest.task.labels))
    if problem:
        return problem
    if manifest.default_target not in manifest.targets:
        return f"the default target {manifest.default_target!r} is not listed"
    for precision, graphs in manifest.precisions.items():
        if graphs.keys() != manifest.graphs.keys():
            return f"its {precision} graphs are not those of fp32"
    for name, target in manifest.targets.items():
        if target.precision != "fp32" and target.precision not in manifest.precisions:
            return f"target {name} is in {target.precision}, of which there are no graphs"
        default = target.default_operating_point
        if default and default not in target.operating_points:
            return f"target {name} has no operating point {default!r}, its default"
        if target.files and target.files.keys() != manifest.graphs.keys():
            return f"target {name} does not have one file for each graph"
    labels = manifest.task.labels
    if len(set(labels)) != len(labels):
        return "a label name appears twice"
    if manifest.task.cuts and len(manifest.task.cuts) != len(labels):
        return f"{len(manifest.task.cuts)} cuts for {len(labels)} labels"
    return ""


def _plain(manifest: Manifest) -> Any:
    """The manifest as the dictionaries and lists that stand on disk."""
    return msgspec.json.decode(msgspec.json.encode(manifest))


def _graft(raw: Any, known: Any, new: Any) -> Any:
    """`new`, plus what `raw` holds and this version does not know.

    Args:
        raw: the old content as it stands on disk.
        known: the same content after reading, so without unknown fields.
        new: the content to write.
    """
    if isinstance(raw, dict) and isinstance(known, dict) and isinstance(new, dict):
        merged = {key: value for key, value in raw.items() if key not in known}
        for key, value in new.items():
            both = key in raw and key in known
            merged[key] = _graft(raw[key], known[key], value) if both else value
        return merged
    lists = isinstance(raw, list) and isinstance(known, list) and isinstance(new, list)
    if lists and len(raw) == len(known) == len(new):
        return [_graft(*items) for items in zip(raw, known, new, strict=True)]
    return new
