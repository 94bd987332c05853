"""The whole model as one ONNX graph, with the exits and the rule inside.

The segments of an engines folder become a flat chain of `If` nodes, one for each exit. Its
condition is whether all rows have stopped. If they have, what the rule carries is handed on, and
otherwise the next segment runs, with the rows that are left, and the rule. The chain is flat,
because runtimes take twice as long to load a branch for each level that it is nested.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from ...runtime.artifact.manifest import (
    ATTENTION_BIAS,
    LOGITS,
    MASK_FILL,
    NEXT,
    Manifest,
)
from ...runtime.rules.rules import ExitRule
from ..for_tensorrt import fit_tensorrt, read_by_identity, share_weights
from .exit_0_nodes import ExitZeroNodes
from .nodes import Tensor, Writer
from .pair_marks import PairMarks
from .query_nodes import QueryNodes
from .rules import RuleNodes, State, as_inputs, settings_of

MASK = "attention_mask"
TYPES = "token_type_ids"
EXIT = "exit"
_IR_VERSION = 10
_IDS = "input_ids"
_ROWS = "rows"
_BATCH = "batch"
_SEQUENCE = "sequence"


def single_graph(
    protos: Mapping[str, Any],
    manifest: Manifest,
    rule: ExitRule,
    exit_0: ExitZeroNodes | None,
    for_plan: bool = False,
    marks: PairMarks | None = None,
) -> ir.Model:
    """One graph that answers each row at its own exit.

    Its inputs are `input_ids`, `attention_mask` and, if the model reads them, `token_type_ids`, all
    `[batch, sequence]` int64. Its outputs are `logits`, `[batch, labels]` float32, and `exit`,
    `[batch]` int64. A row that the model cannot read has NaN as its logits, see `_readable`. In a
    ranking, documents are compared with those of the same query in the batch, and the logits of
    documents that leave are moved below those of all others, see `QueryNodes`.

    Rows that have stopped leave. TensorRT builds no such graph, so it has a form of its own: all
    rows run until the last one has stopped, both branches of an `If` give the same shapes and read
    what is outside through nodes of their own, see `for_tensorrt`, the rule computes in 32
    bits, and its settings are inputs, see `as_inputs`.

    Args:
        protos: the graphs of a target by name, each an `onnx.ModelProto`, whose weights get other
            names.
        manifest: says how segments call them.
        rule: the rule.
        exit_0: exit 0; None: leave it out.
        for_plan: whether it is for TensorRT.
        marks: how documents are recognised, for rankings; else None.

    Raises:
        RuleError: the rule has no form as a graph, or does not fit the exits.
    """
    writer = Writer("classifier", in_32_bits=for_plan)
    top = writer.graph
    if for_plan:
        for proto in protos.values():  # of fp32, or made by fpabee 1.0
            fit_tensorrt(proto.graph)
    parts = {name: ir.from_proto(proto).graph for name, proto in protos.items()}
    reads = [
        {str(value.name) for call in segment.calls for value in parts[call].inputs}
        for segment in manifest.segments
    ]
    inputs: State = {}  # of all rows
    for name in (_IDS, MASK, TYPES):
        if name == MASK or any(name in names for names in reads):
            value = ir.val(name, ir.DataType.INT64, (_BATCH, _SEQUENCE))
            top.inputs.append(value)
            inputs[name] = Tensor(writer, value)
    padding = 1 - inputs[MASK].astype(np.float32)
    bias_types = [
        value.dtype
        for part in parts.values()
        for value in part.inputs
        if value.name == ATTENTION_BIAS and value.dtype is not None
    ]
    bias = (padding * MASK_FILL)[:, None][:, None]
    inputs[ATTENTION_BIAS] = bias.astype(bias_types[0].numpy()) if bias_types else bias
    calls = Counter(name for segment in manifest.segments for name in segment.calls)
    for name, part in parts.items():
        if calls[name] > 1:  # a block whose weights several branches share
            move_weights(part, top, f"{name}/")
            if for_plan:
                share_weights(top, f"{name}/")
    settings = settings_of(rule, manifest.task, manifest.exits)
    if for_plan:
        held = {name: _input(writer, name, each) for name, each in as_inputs(settings).items()}
    else:
        held = {name: writer.initializer(name, each) for name, each in settings.items()}
    readable = _readable(inputs, parts, manifest.tokenizer.max_length)
    queries = None
    is_token = inputs[MASK].astype(np.bool_)
    if marks is not None:
        queries = QueryNodes(inputs[_IDS], is_token, inputs.get(TYPES), marks, readable)
    nodes = RuleNodes(held, rule, manifest.task, manifest.exits, queries)
    state: State = {}  # of the rule, for all rows
    if exit_0 is not None:
        logits = exit_0.logits(inputs[_IDS], is_token, inputs.get(TYPES))
        state = nodes.step(0, logits, {})
    sizes = {}
    if for_plan:
        shape = inputs[MASK].then("Shape")
        sizes = {_BATCH: shape[:1], _SEQUENCE: shape[1:]}
    handed_on: State = {}  # from segment to segment, for the rows that are left
    for number, segment in enumerate(manifest.segments, start=1):
        is_first = not state
        name = f"exit_{number:02d}"
        with contextlib.nullcontext(top) if is_first else writer.branch(name) as branch:
            rows_leave = not (for_plan or is_first)
            tensors = inputs | handed_on
            if rows_leave:
                tensors = _of_rows_left(inputs, handed_on, state["stopped"])
            for call in segment.calls:
                part = parts[call].clone(allow_outer_scope_values=True)
                if rows_leave:
                    _rename_batch(part, f"{name}_rows")
                values = {key: tensor.value for key, tensor in tensors.items()}
                outputs = append(branch, part, values, f"{call}/")
                tensors |= {key: Tensor(writer, value) for key, value in outputs.items()}
            logits = tensors.pop(LOGITS)
            if rows_leave:
                logits = state[LOGITS].then("ScatterND", tensors[_ROWS][:, None], logits)
            after = nodes.step(number, logits, state)
        later = {_ROWS}.union(*reads[number:]) if number < len(reads) else set()
        new = {
            key: tensor
            for key, tensor in tensors.items()
            if key in later and key not in inputs and tensor is not handed_on.get(key)
        }
        if not is_first:
            before = state | handed_on if for_plan else state
            results = _guarded(writer, branch, before, new | after, sizes)
            new = {key: results[key] for key in new}
            after = {key: results[key] for key in after}
        handed_on |= new
        state = after
    # OpenVINO gives numbers of other tensors if several nodes read an output of `If`.
    logits = readable[:, None].then("Where", state[LOGITS], np.nan)
    if queries is not None:
        logits = queries.below_others(logits, state[EXIT] < manifest.exits[-1])
    answers = {
        LOGITS: logits,
        EXIT: state[EXIT].then("Cast", to=ir.DataType.INT64),
    }
    shapes = {LOGITS: (_BATCH, len(manifest.task.labels)), EXIT: (_BATCH,)}
    for name, tensor in answers.items():
        output = tensor.value
        output.name = name
        output.shape = ir.Shape(shapes[name])
        top.outputs.append(output)
    model = ir.Model(top, ir_version=_IR_VERSION)
    tidy = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    tidy(model)
    return model


def _readable(inputs: State, parts: Mapping[str, ir.Graph], longest: int) -> Any:
    """Which rows the model can read: `[batch]` bool.

    Not those without tokens, with padding on the left, in a batch that is too long, or with ids
    that the model does not have. Runtimes give numbers for many of them: OpenVINO checks no ids,
    an id below 0 counts from the end, and exit 0 takes any id.

    Args:
        inputs: of all rows.
        parts: graphs of the segments, which look up what they read.
        longest: the longest sequence, in tokens.
    """
    mask = inputs[MASK]
    readable = (np.add.reduce(mask[:, :1], axis=1) == 1) & (mask.then("Shape")[1] <= longest)
    uses = [
        (value, node)
        for part in parts.values()
        for value in part.inputs
        for node in value.consumers()
    ]
    for value, node in uses:
        if value.name in (_IDS, TYPES) and node.op_type == "Gather":
            table = node.inputs[0]
            while table is not None and (producer := table.producer()):  # what dequantizes it
                table = producer.inputs[0]
            assert table is not None
            known = len(Tensor(mask.writer, table))
            ids = inputs[str(value.name)]
            readable = readable & (np.minimum.reduce(ids, axis=1) >= 0)
            readable = readable & (np.maximum.reduce(ids, axis=1) < known)
    return readable


def _of_rows_left(inputs: State, handed_on: State, stopped: Tensor) -> State:
    """Take the rows that have not stopped.

    Args:
        inputs: tensors of all rows.
        handed_on: tensors of the rows that were left before, with the numbers of these rows;
            without the numbers, of all rows.
        stopped: `[batch]` bool, which of all rows have stopped.

    Returns:
        All tensors, and the numbers `[rows]` int64 of the rows that are left.
    """
    was_left = handed_on.get(_ROWS)
    is_left = ~stopped if was_left is None else ~stopped[was_left]
    places = is_left.then("NonZero").then("Reshape", [-1])
    left = {
        # The first dimension of a tensor that is the same for all rows is a number.
        name: tensor if isinstance(tensor.shape[0], int) else tensor[places]
        for name, tensor in handed_on.items()
    }
    rows = left.setdefault(_ROWS, places)
    return {name: tensor[rows] for name, tensor in inputs.items()} | left


def _rename_batch(part: ir.Graph, name: str) -> None:
    """Give the number of rows of a graph another name, because equal names mean equal sizes."""
    for value in (value for node in part for value in node.outputs):
        if value.shape is not None:
            sizes = [name if size == _BATCH else size for size in value.shape]
            value.shape = ir.Shape(sizes)


def _guarded(
    writer: Writer, branch: ir.Graph, before: State, results: State, sizes: State
) -> State:
    """Run a branch only if not all rows have stopped.

    Args:
        writer: adds the `If`.
        branch: the branch.
        before: what was carried on before, which a skipped branch hands on.
        results: what the branch gives. A skipped one gives zeros for what it has not before, which
            nothing reads.
        sizes: of the dimensions of these zeros that vary, `[1]` int64 by their names; empty: 1.

    Returns:
        The results as outputs of the `If`.
    """
    with writer.branch(f"{branch.name}_skipped") as skipped:
        for name, tensor in results.items():
            if name in before:
                # A branch cannot return a tensor from outside.
                kept = before[name].then("Identity")
            else:
                # The width is for the analysis of shapes.
                fixed = [size if isinstance(size, int) else 1 for size in tensor.shape]
                kept = writer.constant(np.zeros(fixed, tensor.dtype))
                if sizes:
                    lengths = [sizes.get(str(size), [1]) for size in tensor.shape]
                    kept = kept.then("Expand", writer.node("Concat", *lengths, axis=0))
            skipped.outputs.append(kept.value)
    branch.outputs.extend(tensor.value for tensor in results.values())
    if sizes:
        for each in (skipped, branch):
            read_by_identity(each)
    branches = {"then_branch": skipped, "else_branch": branch}
    node = ir.node("If", [before["done"].value], branches, num_outputs=len(results))
    writer.graph.append(node)
    for output, (name, tensor) in zip(node.outputs, results.items(), strict=True):
        output.name = f"after_{branch.name}/{name}"
        output.type = tensor.value.type
        output.shape = tensor.value.shape
        if name not in before:  # a skipped branch gives another batch and sequence
            varies = [size if isinstance(size, int) else None for size in tensor.shape]
            output.shape = ir.Shape(varies)
    made = (Tensor(writer, output) for output in node.outputs)
    return dict(zip(results, made, strict=True))


def _input(writer: Writer, name: str, setting: NDArray[Any]) -> Tensor:
    """A setting as an input of the graph, and as the rule computes with it."""
    value = ir.val(name, ir.DataType.from_numpy(setting.dtype), setting.shape)
    writer.graph.inputs.append(value)
    tensor = Tensor(writer, value)
    return tensor if tensor.dtype == writer.type_of(tensor.dtype) else tensor.astype(tensor.dtype)


def append(
    graph: ir.Graph, part: ir.Graph, inputs: Mapping[str, ir.Value], prefix: str
) -> dict[str, ir.Value]:
    """Move the nodes and weights of a graph to the end of another one.

    Args:
        graph: what gets them.
        part: what has none afterwards.
        inputs: what it reads, by the names of its inputs.
        prefix: what the names of its tensors begin with afterwards.

    Returns:
        Its outputs, by the names of the inputs of later graphs.
    """
    for value in part.inputs:
        value.replace_all_uses_with(inputs[str(value.name)])
    outputs = {str(value.name).removeprefix(NEXT): value for value in part.outputs}
    part.outputs.clear()
    move_weights(part, graph, prefix)
    nodes = [*part]
    for value in (value for node in nodes for value in node.outputs):
        value.name = f"{prefix}{value.name}"
    part.remove(nodes)
    graph.extend(nodes)
    return outputs


def move_weights(part: ir.Graph, graph: ir.Graph, prefix: str) -> None:
    """Move the weights of a graph to another one, see `append`."""
    for weight in [*part.initializers.values()]:
        del part.initializers[str(weight.name)]
        weight.name = f"{prefix}{weight.name}"
        graph.register_initializer(weight)
