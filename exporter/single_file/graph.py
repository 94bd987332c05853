"""The whole model as one ONNX graph, with the exits and the rule inside.

The segments of an engines folder become a flat chain of `If` nodes, one for each exit. Its
condition is whether all rows have stopped. If they have, what the rule carries is handed on, and
otherwise the next segment runs, with the rows that are left, and the rule. The chain is flat,
because runtimes take twice as long to load a branch for each level that it is nested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
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
    Segment,
)
from ...runtime.rules.rules import ExitRule
from ..for_tensorrt import fit_tensorrt, read_by_identity, share_weights
from .exit_0_nodes import ExitZeroNodes
from .nodes import Tensor, Writer
from .rules import RowNodes, RuleNodes, State, as_inputs, settings_of

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
    before: Sequence[ExitZeroNodes] = (),
    for_plan: bool = False,
    rows: Callable[..., RowNodes] = RowNodes,
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
        before: the exits before layer 1, at most one.
        for_plan: whether it is for TensorRT.
        rows: makes what says how rows depend on each other.

    Raises:
        RuleError: the rule has no form as a graph, or does not fit the exits.
    """
    writer = Writer("classifier", in_32_bits=for_plan)
    if for_plan:
        for proto in protos.values():  # of fp32, or made by fpabee 1.0
            fit_tensorrt(proto.graph)
    parts = {name: ir.from_proto(proto).graph for name, proto in protos.items()}
    reads = [
        {str(value.name) for call in segment.calls for value in parts[call].inputs}
        for segment in manifest.segments
    ]
    inputs = _inputs(writer, parts, set().union(*reads))
    _share_weights(writer, parts, manifest, for_plan)
    held = _settings(writer, settings_of(rule, manifest.task, manifest.exits), for_plan)
    readable = _readable(inputs, parts, manifest.tokenizer.max_length)
    is_token = inputs[MASK].astype(np.bool_)
    tokens = inputs[_IDS], is_token, inputs.get(TYPES)
    compared = rows(*tokens, readable)
    nodes = compared.rule(held, rule, manifest.task, manifest.exits)
    state: State = {}  # of the rule, for all rows
    for number, each in zip(manifest.exits, before, strict=False):
        state = nodes.step_before_layer_1(number, each.logits(*tokens))
    chain = _Chain(writer, inputs, parts, nodes, for_plan)
    handed_on: State = {}  # from segment to segment, for the rows that are left
    for number, segment in enumerate(manifest.segments, start=1):
        later = {_ROWS}.union(*reads[number:]) if number < len(reads) else set()
        handed_on, state = chain.step(number, segment, later, handed_on, state)
    # OpenVINO gives numbers of other tensors if several nodes read an output of `If`.
    logits = readable[:, None].then("Where", state[LOGITS], np.nan)
    logits = compared.answers(logits, state[EXIT], manifest.exits[-1])
    exits = state[EXIT].then("Cast", to=ir.DataType.INT64)
    _output(writer, LOGITS, logits, (_BATCH, len(manifest.task.labels)))
    _output(writer, EXIT, exits, (_BATCH,))
    model = ir.Model(writer.graph, ir_version=_IR_VERSION)
    tidy = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    tidy(model)
    return model


def _inputs(writer: Writer, parts: Mapping[str, ir.Graph], read: Set[str]) -> State:
    """The inputs of the graph, and what segments read instead of the mask.

    Args:
        writer: of the graph, which gets the inputs.
        parts: graphs of the segments.
        read: what they read.
    """
    inputs: State = {}
    for name in (_IDS, MASK, TYPES):
        if name == MASK or name in read:
            value = ir.val(name, ir.DataType.INT64, (_BATCH, _SEQUENCE))
            writer.graph.inputs.append(value)
            inputs[name] = Tensor(writer, value)
    padding = 1 - inputs[MASK].astype(np.float32)
    types = [
        value.dtype
        for part in parts.values()
        for value in part.inputs
        if value.name == ATTENTION_BIAS and value.dtype is not None
    ]
    bias = (padding * MASK_FILL)[:, None][:, None]
    inputs[ATTENTION_BIAS] = bias.astype(types[0].numpy()) if types else bias
    return inputs


def _share_weights(
    writer: Writer, parts: Mapping[str, ir.Graph], manifest: Manifest, for_plan: bool
) -> None:
    """Move the weights of blocks that several branches call out of them."""
    calls = Counter(name for segment in manifest.segments for name in segment.calls)
    for name, part in parts.items():
        if calls[name] > 1:
            move_weights(part, writer.graph, f"{name}/")
            if for_plan:
                share_weights(writer.graph, f"{name}/")


def _settings(
    writer: Writer, settings: Mapping[str, NDArray[Any]], for_plan: bool
) -> dict[str, Tensor]:
    """The settings of a rule as tensors: inputs of a plan, else initializers."""
    if for_plan:
        return {name: _input(writer, name, each) for name, each in as_inputs(settings).items()}
    return {name: writer.initializer(name, each) for name, each in settings.items()}


def _output(writer: Writer, name: str, tensor: Any, shape: tuple[Any, ...]) -> None:
    """Let the graph give a tensor."""
    output = tensor.value
    output.name = name
    output.shape = ir.Shape(shape)
    writer.graph.outputs.append(output)


class _Chain:
    """Adds the segments of a model to its graph, one branch for each but the first.

    Args:
        writer: of the graph.
        inputs: of all rows.
        parts: graphs of the segments.
        nodes: the rule.
        for_plan: whether the graph is for TensorRT, where stopped rows do not leave.
    """

    def __init__(
        self,
        writer: Writer,
        inputs: State,
        parts: Mapping[str, ir.Graph],
        nodes: RuleNodes,
        for_plan: bool,
    ) -> None:
        self._writer = writer
        self._inputs = inputs
        self._parts = parts
        self._nodes = nodes
        self._for_plan = for_plan
        self._sizes: State = {}
        if for_plan:
            shape = inputs[MASK].then("Shape")
            self._sizes = {_BATCH: shape[:1], _SEQUENCE: shape[1:]}

    def step(
        self, number: int, segment: Segment, later: Set[str], handed_on: State, state: State
    ) -> tuple[State, State]:
        """Add a segment and the decision of the rule after it.

        Args:
            number: of its exit.
            segment: the segment.
            later: the names of what later segments read.
            handed_on: what earlier segments handed on, for the rows that were left.
            state: of the rule, for all rows; empty before the first decision.

        Returns:
            Both as they are after it.
        """
        if not state:  # the first decision: no row can have stopped
            tensors = self._run(self._writer.graph, number, segment, self._inputs | handed_on)
            after = self._nodes.step(number, tensors.pop(LOGITS), state)
            return handed_on | self._new(tensors, handed_on, later), after
        rows_leave = not self._for_plan
        with self._writer.branch(_name_of(number)) as branch:
            tensors = self._inputs | handed_on
            if rows_leave:
                tensors = _of_rows_left(self._inputs, handed_on, state["stopped"])
            tensors = self._run(branch, number, segment, tensors, rows_leave)
            logits = tensors.pop(LOGITS)
            if rows_leave:
                logits = state[LOGITS].then("ScatterND", tensors[_ROWS][:, None], logits)
            after = self._nodes.step(number, logits, state)
        new = self._new(tensors, handed_on, later)
        kept = state | handed_on if self._for_plan else state
        results = _guarded(self._writer, branch, kept, new | after, self._sizes)
        handed_on = handed_on | {key: results[key] for key in new}
        return handed_on, {key: results[key] for key in after}

    def _run(
        self,
        graph: ir.Graph,
        number: int,
        segment: Segment,
        tensors: State,
        rows_leave: bool = False,
    ) -> State:
        """Add the graphs that a segment calls, and return all tensors by name."""
        for call in segment.calls:
            part = self._parts[call].clone(allow_outer_scope_values=True)
            if rows_leave:
                _rename_batch(part, f"{_name_of(number)}_rows")
            values = {key: tensor.value for key, tensor in tensors.items()}
            outputs = append(graph, part, values, f"{call}/")
            made = {key: Tensor(self._writer, value) for key, value in outputs.items()}
            tensors = tensors | made
        return tensors

    def _new(self, tensors: State, handed_on: State, later: Set[str]) -> State:
        """The tensors that a segment hands on in addition to earlier ones, or instead of them."""
        return {
            key: tensor
            for key, tensor in tensors.items()
            if key in later and key not in self._inputs and tensor is not handed_on.get(key)
        }


def _name_of(number: int) -> str:
    """The name of the branch of an exit."""
    return f"exit_{number:02d}"


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
