"""The artifact: the content of an engines folder, and the fields of its manifest.

    manifest.json            describes everything else; written last, atomically
    tokenizer/tokenizer.json
    onnx/<precision>/*.onnx  portable source of every target
    targets/<target>/        built files, where a backend needs any
    calibration/             logits of the rows that calibrations have read
    exit_0.npz               classifier before layer 1, if the model has one
    reference.npz            texts and fp32 logits of the PyTorch model
    verification.json        agreement of the export with the PyTorch model
    trained_on.npz           which texts the exits learned from, if that is known
    classifier.json          configuration of the plain classifier, for other libraries

Nothing in the folder is ever unpickled. The module `folder` reads and writes the manifest.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal

import msgspec

from ..errors import ArtifactError
from .operating_point import Count, OperatingPoint, RuleSettings, Sha256

SCHEMA_VERSION = "1.0"
"""The version of a folder that needs nothing new."""
QUICK_PASS_VERSION = "1.1"
"""The version of a folder with an operating point that has a quick pass."""
MANIFEST_NAME = "manifest.json"
REFERENCE_NAME = "reference.npz"
EXIT_0_NAME = "exit_0.npz"
VERIFICATION_NAME = "verification.json"
TRAINED_ON_NAME = "trained_on.npz"
CLASSIFIER_NAME = "classifier.json"
TOKENIZER_NAME = "tokenizer/tokenizer.json"
_GRAPH = r"(embeddings|(segment|block|head)_\d+)"
_HASH = "-[0-9a-f]{8}"
_CONTENT = (
    *map(re.escape, (MANIFEST_NAME, REFERENCE_NAME, EXIT_0_NAME, VERIFICATION_NAME)),
    *map(re.escape, (TRAINED_ON_NAME, CLASSIFIER_NAME)),
    r"tokenizer/(tokenizer\.json)?",
    rf"onnx/([^/]+/({_GRAPH}({_HASH})?\.onnx)?)?",
    rf"targets/([^/]+/({_GRAPH}{_HASH}\.(onnx|plan)|timing\.cache)?)?",
    r"calibration/(trace-[^/]+\.npz)?",
    # What a process that was killed has left.
    r"\.manifest-[^/]+|calibration/\.trace-[^/]+",
    rf"(onnx|targets)/([^/]+/)?\.[^/]+{_HASH}\.unfinished/.*",
)
ENGINES_CONTENT = re.compile("|".join(_CONTENT))
"""The paths of what fpabee writes into an engines folder; those of empty folders end with `/`."""

# A graph output with this prefix replaces the carried tensor with the rest of its name.
NEXT = "next_"
HIDDEN_STATES = "hidden_states"
ATTENTION_BIAS = "attention_bias"
LOGITS = "logits"

# The additive attention bias on padding: finite in fp16, unlike -inf.
MASK_FILL = -1e4

Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Weight = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Size = Literal["batch", "sequence"] | Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class ProblemType(str, Enum):
    """The task, with the values of Hugging Face's `problem_type`."""

    SINGLE_LABEL = "single_label_classification"
    """One label for each row: softmax over the logits."""
    MULTI_LABEL = "multi_label_classification"
    """Any number of labels for each row: a sigmoid for each logit."""
    RANKING = "regression"
    """One logit for each row, a query and a document: how well the document answers the query."""


class Activation(str, Enum):
    """The function from the logit of a document to its score, which keeps the order."""

    SIGMOID = "sigmoid"
    IDENTITY = "identity"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The task.

    Attributes:
        problem_type: single-label, multi-label, or ranking.
        labels: label names in the order of the logits; one for ranking.
        label_thresholds: for multi-label: a label is predicted if its probability is above its
            threshold; empty means 0.5 for all labels.
        activation: for ranking: what makes the score of a logit.
    """

    problem_type: ProblemType
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    label_thresholds: tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], ...] = ()
    activation: Activation = Activation.SIGMOID

    @property
    def ranks(self) -> bool:
        """Whether rows are documents of queries."""
        return self.problem_type is ProblemType.RANKING


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The model that was exported.

    Attributes:
        model_type: encoder family, as Hugging Face names it.
        layers: encoder layers up to the last exit.
        hidden_size: width of the hidden states, in values.
        shared_layers: whether all layers are one block (ALBERT).
        pooling: how the exit heads pool hidden states: `cls`, `mean`, `first`, `both`
            or `attention`.
    """

    model_type: str
    layers: Count
    hidden_size: Count
    shared_layers: bool
    pooling: str


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How texts become model inputs.

    Attributes:
        file: path in the folder of the `tokenizers` library's tokenizer.json.
        sha256: its SHA-256, in hexadecimal.
        max_length: longest sequence in tokens, special tokens included.
        pad_id: token id of padding.
        pad_type_id: token type id of padding.
        inputs: names of the model inputs that the tokenizer makes.
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
        min: smallest size.
        opt: typical size, for which plans are tuned.
        max: largest size.
    """

    min: Count
    opt: Count
    max: Count


class Shapes(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes that graphs or plans accept.

    Attributes:
        batch: rows in a batch.
        sequence: tokens in a row.
    """

    batch: Range
    sequence: Range


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output of a graph.

    Attributes:
        name: its name. An output `next_X` replaces the carried tensor `X`.
        dtype: `int64`, `float32`, `float16` or `bfloat16`.
        shape: sizes; `batch` and `sequence` are the dimensions that vary from run to run.
    """

    name: str
    dtype: Annotated[str, msgspec.Meta(pattern="^(int64|float32|float16|bfloat16)$")]
    shape: tuple[Size, ...]


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """One ONNX graph.

    Attributes:
        file: its path in the folder.
        sha256: its SHA-256, in hexadecimal.
        inputs: the inputs in order.
        outputs: the outputs in order.
    """

    file: str
    sha256: Sha256
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the model from one exit to the next.

    Attributes:
        layer: encoder layers that have run at its end.
        calls: names of the graphs to run, in order: one graph, or for shared layers the block
            once per layer and then the head.
    """

    layer: Count
    calls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=1024)]


class ExitZeroSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The classifier before layer 1, see `fpabee.runtime.exit_0`.

    Attributes:
        file: its path in the folder.
        sha256: its SHA-256, in hexadecimal.
        unigrams: how many rows of its table belong to unigrams.
        buckets: how many rows belong to hashed n-grams.
    """

    file: str
    sha256: Sha256
    unigrams: Count
    buckets: Count


class FirstStageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Exit 0 of a ranking, see `fpabee.runtime.first_stage`.

    Attributes:
        weights: of the features of a score, in logits.
        bias: the logit where all features are 0.
    """

    weights: tuple[Weight, Weight, Weight]
    bias: Weight


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
        precision: numeric format of the weights and activations, such as `fp32`. In `int8`, what is
            not quantized is in fp32, and in `int8-bf16` in bf16.
        graph_precision: that of the ONNX graphs which are run, or from which the files were built;
            empty: the target's own. OpenVINO rounds fp32 graphs to bf16.
        device: device class that the files are bound to; empty: any.
        versions: version of each library that built or checked it.
        files: built file of each graph, by the graph's name; empty if the ONNX graphs are run.
        tolerance: largest measured difference of logits from the PyTorch model in fp32, divided by
            the largest logit of the row if that is more than 1; None: it was built where it cannot
            run.
        checked_on: the kind of machine on which it gave the logits of the PyTorch model, see
            `kind_of_machine`; unset: none is recorded, as in folders of fpabee 1.0.
        relative_speed: how many times as fast as the first target for CPUs it was at full depth, on
            the machine that chose the default target; None: not measured.
        compute_capabilities: of the GPUs that run the files, such as `8.6`.
        built_on: the GPU that built the files, by the driver's name for it and its multiprocessors,
            if they are built on the GPU that runs them; unset: none is recorded, as in folders of
            fpabee 1.0.
        profiles: the shapes that the files accept, by length; empty: any.
        batch_sizes: the batch sizes to pad to, in rows; empty: any.
        sequence_lengths: the lengths to pad to, in tokens; empty: any.
        operating_points: calibrated rules by name; they are valid for this target only.
        default_operating_point: the point that is used when none is named; empty: the manifest's
            default rule is used.
    """

    backend: str
    precision: str
    graph_precision: str = ""
    device: str = ""
    versions: dict[str, str] = {}
    files: dict[str, BuiltFile] = {}
    tolerance: Annotated[float, msgspec.Meta(ge=0)] | None
    # Left out of the JSON if it is unset, so that folders of 1.0 keep their revision.
    checked_on: str | msgspec.UnsetType = msgspec.UNSET
    relative_speed: Annotated[float, msgspec.Meta(ge=0)] | None = None
    compute_capabilities: tuple[str, ...] = ()
    built_on: str | msgspec.UnsetType = msgspec.UNSET
    profiles: tuple[Shapes, ...] = ()
    batch_sizes: tuple[Count, ...] = ()
    sequence_lengths: tuple[Count, ...] = ()
    operating_points: dict[str, OperatingPoint] = {}
    default_operating_point: str = ""

    @property
    def name(self) -> str:
        """Its name in the folder, such as `tensorrt-fp16-sm87`."""
        return "-".join(filter(None, (self.backend, self.precision, self.device)))

    @property
    def on_gpu(self) -> bool:
        """Whether it needs a GPU of NVIDIA."""
        return self.backend.startswith("tensorrt") or self.device == "cuda"


def with_operating_points(
    target: Target, points: dict[str, OperatingPoint], default: str
) -> Target:
    """A target with these operating points, of which one is the default."""
    return msgspec.structs.replace(target, operating_points=points, default_operating_point=default)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `manifest.json`. Paths in it are relative POSIX paths.

    Attributes:
        schema_version: version of the format. Every later version of fpabee reads it.
        fpabee_version: version of fpabee that wrote it.
        versions: versions of the libraries that exported the model.
        model: the model that was exported.
        task: the task.
        tokenizer: how texts become model inputs.
        shapes: the sizes that the graphs accept.
        graphs: ONNX graphs in fp32, by name.
        segments: the chain, in order; one segment for each exit from exit 1.
        targets: targets by name, such as `onnxruntime-fp32`.
        default_target: the target that runs when none is named.
        default_is_fixed: whether the default target was chosen by hand.
        default_rule: the rule without an operating point, as `ExitRule.from_dict` reads it.
        files: SHA-256 of the other files in the folder, by path.
        precisions: for each other precision its graphs, with the names of `graphs`.
        exit_0: the classifier before layer 1; None: the model has none.
        first_stage: for rankings: what the scores of the search predict before layer 1; None: the
            model has no such exit.
        base_model: the id on the Hugging Face hub of the model that was exported or converted;
            empty: it was a folder.

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
    default_is_fixed: bool = False
    default_rule: RuleSettings
    files: dict[str, Sha256] = {}
    precisions: dict[str, dict[str, Graph]] = {}
    exit_0: ExitZeroSpec | None = None
    first_stage: FirstStageSpec | None = None
    base_model: str = ""

    def graphs_in(self, precision: str) -> dict[str, Graph]:
        """The graphs in a precision.

        Args:
            precision: `fp32`, or one of `precisions`.

        Raises:
            ArtifactError: the folder has no graphs in this precision.
        """
        if precision == "fp32":
            return self.graphs
        if precision not in self.precisions:
            raise ArtifactError(
                f"the engines folder has no {precision} graphs; it has "
                f"{', '.join(['fp32', *self.precisions])}",
                f"build a target in {precision}",
            )
        return self.precisions[precision]

    def graphs_of(self, target: Target) -> dict[str, Graph]:
        """The ONNX graphs that a target runs, or from which its files were built.

        Args:
            target: one of `targets`.

        Raises:
            ArtifactError: the folder does not have them.
        """
        return self.graphs_in(target.graph_precision or target.precision)

    @property
    def exits(self) -> range:
        """The numbers of the exits: from 0 if the model has exit 0, else from 1."""
        has_none = self.exit_0 is None and self.first_stage is None
        return range(1 if has_none else 0, len(self.segments) + 1)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layer of each exit, in the order of `exits`: how many layers ran; 0 for exit 0."""
        layers = tuple(segment.layer for segment in self.segments)
        return (0, *layers) if 0 in self.exits else layers
