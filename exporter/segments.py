"""Cut a multi-exit model into ONNX graphs, with one segment for each exit.

A segment is one graph: the layers after the previous exit, and the head. If layers share their
weights (ALBERT), the shared block is stored once and a segment is a list of calls: the embeddings
in the first segment, the block once for each layer, then the head.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..runtime.artifact.manifest import (
    ATTENTION_BIAS,
    HIDDEN_STATES,
    LOGITS,
    MASK_FILL,
    NEXT,
    Graph,
    Segment,
    Size,
)
from .backbones.base import Block, Embeddings
from .model import Head, MultiExitModel
from .onnx_file import OPSET, strip, write_graph

_TOKEN_IDS = "input_ids"
_TOKEN_TYPES = "token_type_ids"
_EXAMPLE = {"batch": 3, "sequence": 7}
# Where torch's exporter notes the modules that a node comes from, outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"


class GraphModule(nn.Module):
    """A part of the model: optionally the embeddings, some blocks, optionally a head.

    Args:
        model: the whole model.
        token_types: whether the tokenizer gives token types.
        embeddings: for the first part.
        blocks: the layers to run.
        head: the exit at its end.
        is_last: whether no other part reads its hidden states.

    Attributes:
        inputs: names of its inputs, in order.
        outputs: names of its outputs, in order.
    """

    def __init__(
        self,
        model: MultiExitModel,
        token_types: bool,
        embeddings: Embeddings | None,
        blocks: Sequence[Block],
        head: Head | None,
        is_last: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        if embeddings is not None:
            self.inputs.append(_TOKEN_IDS)
            if token_types and model.backbone.token_types:
                self.inputs.append(_TOKEN_TYPES)
            self.outputs += [NEXT + name for name in model.backbone.carried]
        else:
            self.inputs.append(HIDDEN_STATES)
        if blocks or (head is not None and head.weighs):
            self.inputs.append(ATTENTION_BIAS)
        if blocks and embeddings is None:
            self.inputs += model.backbone.carried
        if not is_last:
            self.outputs.append(NEXT + HIDDEN_STATES)
        if head is not None:
            self.outputs.append(LOGITS)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, from the inputs by name, see `TensorSpec` in the manifest."""
        values = dict(inputs)
        bias = values.pop(ATTENTION_BIAS, None)
        if self.embeddings is not None:
            hidden_states, carried = self.embeddings(values[_TOKEN_IDS], values.get(_TOKEN_TYPES))
        else:
            hidden_states = values.pop(HIDDEN_STATES)
            carried = values  # what is left; see `Backbone.carried`
        for block in self.blocks:
            hidden_states = block(hidden_states, bias, **carried)
        leaving = {**carried, HIDDEN_STATES: hidden_states}
        outputs = {NEXT + name: value for name, value in leaving.items()}
        if self.head is not None:
            outputs[LOGITS] = self.head(hidden_states, bias)
        return {name: outputs[name] for name in self.outputs}


@dataclass(frozen=True)
class Cut:
    """How a model is cut.

    Attributes:
        modules: what becomes a graph, by the name of the graph.
        segments: which graphs each segment calls; one may be called several times.
    """

    modules: dict[str, GraphModule]
    segments: tuple[Segment, ...]


def cut(model: MultiExitModel, exits: Sequence[int], token_types: bool = True) -> Cut:
    """Cut a model at chosen exits.

    Args:
        model: the model, in eval mode.
        exits: numbers of the exits to keep, counted from 1, ascending; the model must have them.
        token_types: whether the tokenizer gives token types.
    """
    layers = [model.exit_config.exits[number - 1] for number in exits]
    heads = [model.parts[2][number - 1] for number in exits]
    positions = model.backbone.max_positions()
    blocks = model.parts[1]

    def part(
        embeddings: Embeddings | None = None,
        blocks: Sequence[Block] = (),
        head: Head | None = None,
        is_last: bool = False,
    ) -> GraphModule:
        return GraphModule(model, token_types, embeddings, blocks, head, is_last).eval()

    modules: dict[str, GraphModule] = {}
    block_names: dict[int, str] = {}
    segments = []
    start = 0
    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), start=1):
        embeddings = model.parts[0].frozen(positions) if number == 1 else None
        own_blocks = blocks[start:layer]
        start = layer
        calls = []
        if model.backbone.shared_layers:
            if embeddings is not None:
                modules["embeddings"] = part(embeddings)
                calls.append("embeddings")
            for block in own_blocks:
                new_name = f"block_{len(block_names) + 1:02d}"
                name = block_names.setdefault(id(block.layer), new_name)
                if name not in modules:
                    modules[name] = part(blocks=[block])
                calls.append(name)
            name = f"head_{number:02d}"
            modules[name] = part(head=head, is_last=True)
        else:
            name = f"segment_{number:02d}"
            frozen = [block.frozen(positions) for block in own_blocks]
            modules[name] = part(embeddings, frozen, head, is_last=number == len(layers))
        calls.append(name)
        segments.append(Segment(layer=layer, calls=tuple(calls)))
    return Cut(modules, tuple(segments))


def export_graph(model: MultiExitModel, module: GraphModule, path: Path, file: str) -> Graph:
    """Write one ONNX graph of opset 20 for any batch and sequence; it always has the same bytes.

    Args:
        model: the whole model, in eval mode, which says how large its tensors are.
        module: the part of it to write, see `cut`.
        path: where to write it; its folder is made if it does not exist.
        file: its path in the engines folder, see `write_graph`.

    Returns:
        The record of the graph for the manifest.

    Raises:
        ModelError: it is larger than protobuf allows.
    """
    hidden = int(model.backbone.config.hidden_size)
    shapes: dict[str, tuple[Size, ...]] = {
        _TOKEN_IDS: ("batch", "sequence"),
        _TOKEN_TYPES: ("batch", "sequence"),
        ATTENTION_BIAS: ("batch", 1, 1, "sequence"),
        HIDDEN_STATES: ("batch", "sequence", hidden),
        **model.backbone.carried,
    }
    # torch.export assumes at least 2 of each; the resulting ONNX graph has no such limit.
    longest = model.backbone.max_positions()
    dims = {
        "batch": torch.export.Dim("batch", min=2),
        "sequence": torch.export.Dim("sequence", min=2, max=longest),
    }
    dynamic = {}
    example = {}
    for name in module.inputs:
        shape = shapes[name]
        dynamic[name] = {
            axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)
        }
        dtype = torch.int64 if name in (_TOKEN_IDS, _TOKEN_TYPES) else torch.float32
        sizes = [_EXAMPLE[size] if isinstance(size, str) else size for size in shape]
        example[name] = torch.zeros(sizes, dtype=dtype)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            kwargs={"inputs": example},
            dynamic_shapes={"inputs": dynamic},
            input_names=module.inputs,
            output_names=module.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _keep_shapes_constant(proto)
    _name_nodes(proto)
    _bound_fills(proto)
    # Without the nodes that computed the shapes.
    proto = onnx.utils.Extractor(proto).extract_model([*module.inputs], [*module.outputs])
    strip(proto)
    return write_graph(path, file, proto)


def _keep_shapes_constant(proto: onnx.ModelProto) -> None:
    """Change each Reshape to keep axes by number, as in [0, 0, heads, size], where possible.

    Otherwise nodes compute the new shape from the shape of an input. ONNX Runtime runs these nodes
    on the CPU, also when the others run on a GPU.
    """
    graph = proto.graph
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output, *graph.value_info]
    }
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        before = sizes.get(node.input[0], [])
        after = sizes.get(node.output[0], [])
        kept = [axis < len(before) and size == before[axis] for axis, size in enumerate(after)]
        shape = [
            0 if keep else size if isinstance(size, int) else -1
            for keep, size in zip(kept, after, strict=True)
        ]
        # The shape is unknown, or several sizes vary and are not kept.
        if not after or shape.count(-1) > 1:
            continue
        name = f"shape_of_{node.output[0]}"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), name))
        node.input[1] = name
        del node.attribute[:]  # a 0 would otherwise be a size


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Rename nodes by the module they come from, as in `blocks.0.layer.output.dense/linear_5`.

    Messages name nodes, and the nodes of a head are recognised by their names, see
    `onnx_file.in_head`.
    """
    for node in proto.graph.node:
        scopes = next((item.value for item in node.metadata_props if item.key == _SCOPES), "['']")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if "hook" not in scope]
        own = node.name.removeprefix("node_")
        node.name = f"{modules[-1]}/{own}" if modules and modules[-1] else own


def _bound_fills(proto: onnx.ModelProto) -> None:
    """Replace the lowest float, where it serves as a mask, by MASK_FILL, which fp16 has, too."""
    lowest = np.finfo(np.float32).min
    for tensor in proto.graph.initializer:
        is_number = tensor.data_type == onnx.TensorProto.FLOAT and not tensor.dims
        if is_number and onnx.numpy_helper.to_array(tensor) <= lowest:
            fill = np.array(MASK_FILL, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(fill, tensor.name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of torch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
