"""Cut a multi-exit model into ONNX graphs, one segment per exit.

A segment is one graph: the layers from the exit before, and the head. Where layers share
their weights (ALBERT), the shared block is stored once and a segment is a list of calls:
the embeddings first, the block once per layer, then the head.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import (
    ATTENTION_BIAS,
    HIDDEN_STATES,
    LOGITS,
    MASK_FILL,
    NEXT,
    Graph,
    Segment,
    Size,
    TensorSpec,
)
from .backbones import Block, Embeddings
from .model import Head, MultiExitModel, token_weights
from .onnx_file import serialized

OPSET = 20
TOKEN_WEIGHTS = "token_weights"

_EXAMPLE = {"batch": 3, "sequence": 7}
# Where the exporter notes the modules that a node comes from, outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"


class GraphModule(nn.Module):
    """A stretch of the model: optionally the embeddings, some blocks, optionally a head.

    Args:
        embeddings: for the first stretch.
        blocks: the layers to run.
        head: the exit at its end.
        mean: whether any head of the model takes the mean over tokens.
        is_last: whether nothing follows, so that hidden states need not leave.
    """

    def __init__(
        self,
        embeddings: Embeddings | None,
        blocks: Sequence[Block],
        head: Head | None,
        mean: bool,
        is_last: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.is_last = is_last
        self.mean = mean

    @property
    def needs_bias(self) -> bool:
        """Whether the attention bias is read."""
        return len(self.blocks) > 0 or (self.mean and self.embeddings is not None)

    @property
    def needs_weights(self) -> bool:
        """Whether the token weights are read; the first stretch makes them for all heads."""
        return self.head is not None and self.head.mean and self.embeddings is None

    @property
    def gives_weights(self) -> bool:
        """Whether token weights leave."""
        return self.mean and self.embeddings is not None and not self.is_last

    @property
    def gives_hidden(self) -> bool:
        """Whether hidden states leave."""
        return not self.is_last and (self.embeddings is not None or len(self.blocks) > 0)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, see `TensorSpec` in the manifest."""
        bias = inputs.get(ATTENTION_BIAS)
        weights = inputs.get(TOKEN_WEIGHTS)
        outputs = {}
        if self.embeddings is not None:
            hidden_states, carried = self.embeddings(
                inputs["input_ids"], inputs.get("token_type_ids")
            )
            outputs = {NEXT + name: value for name, value in carried.items()}
            if self.mean:
                weights = token_weights(inputs[ATTENTION_BIAS])
            if self.gives_weights:
                outputs[NEXT + TOKEN_WEIGHTS] = weights
        else:
            hidden_states = inputs[HIDDEN_STATES]
            carried = {
                name: value
                for name, value in inputs.items()
                if name not in (HIDDEN_STATES, ATTENTION_BIAS, TOKEN_WEIGHTS)
            }
        for block in self.blocks:
            hidden_states = block(hidden_states, bias, **carried)
        if self.gives_hidden:
            outputs[NEXT + HIDDEN_STATES] = hidden_states
        if self.head is not None:
            outputs[LOGITS] = self.head(hidden_states, weights)
        return outputs


@dataclass(frozen=True)
class Cut:
    """How a model is cut: graphs by name, and the segments that call them."""

    modules: dict[str, GraphModule]
    segments: tuple[Segment, ...]


def cut(model: MultiExitModel, exits: Sequence[int]) -> Cut:
    """Cut a model at chosen exits.

    Args:
        model: the model, in eval mode.
        exits: exit numbers to keep, counted from 1, ascending.
    """
    layers = [model.exit_config.exits[number - 1] for number in exits]
    heads = [model.parts[2][number - 1] for number in exits]
    if model.backbone.shared_layers:
        return _cut_shared(model, layers, heads)
    positions = model.backbone.max_positions()
    embeddings = model.parts[0].frozen(positions)
    blocks = [block.frozen(positions) for block in model.parts[1][: layers[-1]]]
    mean = any(head.mean for head in heads)
    modules, segments = {}, []
    start = 0
    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), start=1):
        name = f"segment_{number:02d}"
        modules[name] = GraphModule(
            embeddings if number == 1 else None,
            blocks[start:layer],
            head,
            mean,
            is_last=number == len(layers),
        ).eval()
        segments.append(Segment(exit=number, layer=layer, calls=(name,)))
        start = layer
    return Cut(modules, tuple(segments))


def _cut_shared(model: MultiExitModel, layers: Sequence[int], heads: Sequence[Head]) -> Cut:
    blocks = model.parts[1]
    embeddings = model.parts[0].frozen(model.backbone.max_positions())
    mean = any(head.mean for head in heads)
    names: dict[int, str] = {}
    modules = {"embeddings": GraphModule(embeddings, (), None, mean).eval()}
    block_names = []
    for block in blocks[: layers[-1]]:
        name = names.setdefault(id(block.layer), f"block_{len(names) + 1:02d}")
        modules.setdefault(name, GraphModule(None, [block], None, mean).eval())
        block_names.append(name)
    segments = []
    start = 0
    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), start=1):
        head_name = f"head_{number:02d}"
        modules[head_name] = GraphModule(None, (), head, mean, is_last=True).eval()
        first = ["embeddings"] if number == 1 else []
        calls = (*first, *block_names[start:layer], head_name)
        segments.append(Segment(exit=number, layer=layer, calls=calls))
        start = layer
    return Cut(modules, tuple(segments))


def input_specs(
    model: MultiExitModel, module: GraphModule, tokenizer_inputs: Sequence[str]
) -> list[TensorSpec]:
    """The inputs of a graph."""
    hidden = int(model.backbone.config.hidden_size)
    specs = []
    if module.embeddings is not None:
        names = ["input_ids"]
        if model.backbone.token_types and "token_type_ids" in tokenizer_inputs:
            names.append("token_type_ids")
        specs += [TensorSpec(name=n, dtype="int64", shape=("batch", "sequence")) for n in names]
    else:
        specs.append(
            TensorSpec(name=HIDDEN_STATES, dtype="float32", shape=("batch", "sequence", hidden))
        )
    if module.needs_bias:
        specs.append(
            TensorSpec(name=ATTENTION_BIAS, dtype="float32", shape=("batch", 1, 1, "sequence"))
        )
    if module.needs_weights:
        specs.append(_weights_spec(""))
    if module.embeddings is None and len(module.blocks):
        specs += _carried_specs(model, "")
    return specs


def output_specs(model: MultiExitModel, module: GraphModule) -> list[TensorSpec]:
    """The outputs of a graph."""
    hidden = int(model.backbone.config.hidden_size)
    specs = _carried_specs(model, NEXT) if module.embeddings is not None else []
    if module.gives_weights:
        specs.append(_weights_spec(NEXT))
    if module.gives_hidden:
        shape: tuple[Size, ...] = ("batch", "sequence", hidden)
        specs.append(TensorSpec(name=NEXT + HIDDEN_STATES, dtype="float32", shape=shape))
    if module.head is not None:
        labels = len(model.exit_config.labels)
        specs.append(TensorSpec(name=LOGITS, dtype="float32", shape=("batch", labels)))
    return specs


def _carried_specs(model: MultiExitModel, prefix: str) -> list[TensorSpec]:
    return [
        TensorSpec(name=prefix + name, dtype="float32", shape=shape)
        for name, shape in model.backbone.carried.items()
    ]


def _weights_spec(prefix: str) -> TensorSpec:
    return TensorSpec(name=prefix + TOKEN_WEIGHTS, dtype="float32", shape=("batch", 1, "sequence"))


def export_graph(
    module: GraphModule,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    path: Path,
    max_positions: int,
) -> None:
    """Write one ONNX file: opset 20, dynamic batch and sequence, the same bytes every time."""
    # torch.export assumes at least 2 of each; the ONNX graph that comes out has no such limit.
    dims = {
        "batch": torch.export.Dim("batch", min=2),
        "sequence": torch.export.Dim("sequence", min=2, max=max_positions),
    }
    shapes = {
        spec.name: {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in inputs
    }
    with _quiet(), torch.no_grad():
        # Captured here, since torch.onnx.export would take the dictionary for keywords.
        captured = torch.export.export(
            module, (_example(inputs),), dynamic_shapes={"inputs": shapes}, strict=False
        )
        program = torch.onnx.export(
            captured,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _name_dimensions(proto, inputs)
    _name_nodes(proto)
    _bound_fills(proto)
    _strip(proto)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized(proto, path.name))


def graph_record(
    folder: Path, path: Path, inputs: list[TensorSpec], outputs: list[TensorSpec]
) -> Graph:
    """What the manifest says of a written graph."""
    return Graph(
        file=path.relative_to(folder).as_posix(),
        sha256=sha256_of(path),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _example(inputs: list[TensorSpec]) -> dict[str, Tensor]:
    example = {}
    for spec in inputs:
        shape = [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
        dtype = torch.int64 if spec.dtype == "int64" else torch.float32
        example[spec.name] = torch.zeros(shape, dtype=dtype)
    return example


def _name_dimensions(proto: Any, inputs: list[TensorSpec]) -> None:
    """Call the symbolic dimensions `batch` and `sequence` instead of s32 and s41."""
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    names = {
        dimension.dim_param: size
        for value, spec in zip(proto.graph.input, inputs, strict=True)
        for dimension, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True)
        if isinstance(size, str)
    }
    for value in values:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def _name_nodes(proto: Any) -> None:
    """Call nodes by the module they come from, as in `blocks.0.layer.output.dense/linear_5`.

    Messages name nodes, and what is in a head is told by its name.
    """
    for node in proto.graph.node:
        scopes = next((item.value for item in node.metadata_props if item.key == _SCOPES), "['']")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if "hook" not in scope]
        own = node.name.removeprefix("node_")
        node.name = f"{modules[-1]}/{own}" if modules and modules[-1] else own


def _bound_fills(proto: Any) -> None:
    """Where a model masks scores with the lowest float, use MASK_FILL: fp16 can hold it too."""
    lowest = np.finfo(np.float32).min
    for tensor in proto.graph.initializer:
        is_number = tensor.data_type == onnx.TensorProto.FLOAT and not tensor.dims
        if is_number and onnx.numpy_helper.to_array(tensor) <= lowest:
            fill = np.array(MASK_FILL, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(fill, tensor.name))


def _strip(proto: Any) -> None:
    """Drop what differs from run to run or names files of this machine."""
    nodes = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for item in [proto, proto.graph, *nodes, *values, *proto.graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter out of our output."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
