"""The artifact: what an engines folder holds, and what its manifest says.

    manifest.json            the only file any code trusts, written last, atomically
    tokenizer/tokenizer.json
    onnx/<precision>/*.onnx  portable source of every target
    targets/<target>/        built files, where a backend needs any
    reference.npz            texts and fp32 logits of the PyTorch model
    verification.json        parity of the export

Nothing in the folder is ever unpickled. It is read and written by `engines_folder.py`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

from ..errors import ArtifactError
from .graphs import ATTENTION_BIAS as ATTENTION_BIAS
from .graphs import HIDDEN_STATES as HIDDEN_STATES
from .graphs import LOGITS as LOGITS
from .graphs import NEXT as NEXT
from .graphs import Graph as Graph
from .graphs import Segment as Segment
from .graphs import TensorSpec as TensorSpec
from .operating_point import Count, OperatingPoint, RuleSettings, Sha256

SCHEMA_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"
REFERENCE_NAME = "reference.npz"
VERIFICATION_NAME = "verification.json"
TOKENIZER_NAME = "tokenizer/tokenizer.json"

# The additive attention bias on padding: finite in fp16, unlike -inf.
MASK_FILL = -1e4

Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class ProblemType(str, Enum):
    """The task, in the words of Hugging Face's `problem_type`."""

    SINGLE_LABEL = "single_label_classification"
    """One label a row: softmax over the logits."""
    MULTI_LABEL = "multi_label_classification"
    """Any number of labels a row: a sigmoid for each logit."""


class Task(msgspec.Struct, frozen=True, kw_only=True, rename={"label_thresholds": "cuts"}):
    """What the model predicts.

    Attributes:
        problem_type: single-label or multi-label.
        labels: names in the order of the logits.
        label_thresholds: multi-label: a label is predicted if its probability is above its
            threshold; empty means 0.5 for all. Its key in the manifest is `cuts`.
    """

    problem_type: ProblemType
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    label_thresholds: tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], ...] = ()


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
