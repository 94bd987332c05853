"""The whole model as one ONNX graph, with the exits and the rule inside.

The segments of an engines folder become a flat chain of `If` nodes, one for each exit. Its
condition is whether all rows have stopped. If they have, what the rule carries is handed on, and
otherwise the next segment and the rule run. A branch that is nested in another one would take
runtimes twice as long to load for each level.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...runtime.artifact.manifest import (
    ATTENTION_BIAS,
    LOGITS,
    MASK_FILL,
    NEXT,
    Manifest,
)
from ...runtime.exit_0 import ExitZero
from ...runtime.rules.rules import ExitRule
from .exit_0_nodes import PairMarks, exit_0_logits
from .nodes import Tensor, Writer
from .rules import RuleNodes, State

MASK = "attention_mask"
TYPES = "token_type_ids"
EXIT = "exit"
_IR_VERSION = 10
_IDS = "input_ids"


def single_graph(
    protos: Mapping[str, Any],
    manifest: Manifest,
    rule: ExitRule,
    exit_0: tuple[ExitZero, PairMarks] | None,
) -> ir.Model:
    """One graph that answers each row at its own exit.

    Its inputs are `input_ids`, `attention_mask` and, if the model reads them, `token_type_ids`, all
    `[batch, sequence]` int64. Its outputs are `logits`, `[batch, labels]` float32, and `exit`,
    `[batch]` int64.

    Args:
        protos: the graphs of a target by name, each an `onnx.ModelProto`, whose weights get other
            names.
        manifest: says how segments call them.
        rule: the rule.
        exit_0: exit 0, and how it recognises second texts; None: leave it out.

    Raises:
        RuleError: the rule has no form as a graph, or does not fit the exits.
    """
    writer = Writer("classifier")
    top = writer.graph
    parts = {name: ir.from_proto(proto).graph for name, proto in protos.items()}
    read = {value.name for part in parts.values() for value in part.inputs}
    # What is carried from segment to segment, with what the rule carries.
    state: State = {}
    for name in (_IDS, MASK, TYPES):
        if name in read or name == MASK:
            value = ir.val(name, ir.DataType.INT64, ("batch", "sequence"))
            top.inputs.append(value)
            state[name] = Tensor(writer, value)
    padding = 1 - state[MASK].astype(np.float32)
    state[ATTENTION_BIAS] = (padding * MASK_FILL)[:, None][:, None]
    calls = Counter(name for segment in manifest.segments for name in segment.calls)
    for name, part in parts.items():
        if calls[name] > 1:  # a block whose weights several branches share
            move_weights(part, top, f"{name}/")
    nodes = RuleNodes(writer, rule, manifest.task, manifest.exits)
    if exit_0 is not None:
        is_token = state[MASK].astype(np.bool_)
        logits = exit_0_logits(*exit_0, state[_IDS], is_token, state.get(TYPES))
        state |= nodes.step(0, logits, {})
    for number, segment in enumerate(manifest.segments, start=1):
        is_first = "done" not in state
        name = f"exit_{number:02d}"
        with contextlib.nullcontext(top) if is_first else writer.branch(name) as branch:
            new: State = {}
            for call in segment.calls:
                part = parts[call].clone(allow_outer_scope_values=True)
                given = {name: each.value for name, each in (state | new).items()}
                outputs = append(branch, part, given, f"{call}/")
                new |= {name: Tensor(writer, value) for name, value in outputs.items()}
            after = nodes.step(number, new.pop(LOGITS), state)
        if segment is manifest.segments[-1]:
            new = {}
        state |= new | after if is_first else _guarded(writer, branch, state, new, after)
    for name in (LOGITS, EXIT):
        output = state[name].then("Identity").value
        output.name = name
        top.outputs.append(output)
    model = ir.Model(top, ir_version=_IR_VERSION)
    tidy = common.RemoveUnusedNodesPass(), common.NameFixPass()
    ir.passes.Sequential(*tidy, common.ClearMetadataAndDocStringPass())(model)
    return model


def _guarded(writer: Writer, branch: ir.Graph, before: State, new: State, after: State) -> State:
    """Run a branch only if not all rows have stopped.

    Args:
        writer: adds the `If`.
        branch: the branch.
        before: what was carried on before.
        new: the tensors that later segments need.
        after: what the rule carries on.

    Returns:
        `new` and `after` as outputs of the `If`.
    """
    results = new | after
    with writer.branch(f"{branch.name}_skipped") as skipped:
        for name, tensor in results.items():
            if name in after:
                # A branch cannot return a tensor from outside.
                kept = before[name].then("Identity")
            else:
                # Nothing reads it, so it has one row; the width is for the analysis of shapes.
                sizes = [size if isinstance(size, int) else 1 for size in tensor.shape]
                kept = writer.constant(np.zeros(sizes, tensor.dtype))
            skipped.outputs.append(kept.value)
    branch.outputs.extend(tensor.value for tensor in results.values())
    branches = {"then_branch": skipped, "else_branch": branch}
    node = ir.node("If", [before["done"].value], branches, num_outputs=len(results))
    writer.graph.append(node)
    for output, (name, tensor) in zip(node.outputs, results.items(), strict=True):
        output.name = f"after_{branch.name}/{name}"
        output.type = tensor.value.type
        output.shape = tensor.value.shape
        if name in new:  # a skipped branch gives another batch and sequence
            fixed = [size if isinstance(size, int) else None for size in tensor.shape]
            output.shape = ir.Shape(fixed)
    made = (Tensor(writer, output) for output in node.outputs)
    return dict(zip(results, made, strict=True))


def append(
    graph: ir.Graph, part: ir.Graph, given: Mapping[str, ir.Value], prefix: str
) -> dict[str, ir.Value]:
    """Move the nodes and weights of a graph to the end of another one.

    Args:
        graph: what gets them.
        part: what has none afterwards.
        given: what it reads, by the names of its inputs.
        prefix: what the names of its tensors begin with afterwards.

    Returns:
        Its outputs, by the names of the inputs of later graphs.
    """
    for value in part.inputs:
        value.replace_all_uses_with(given[str(value.name)])
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
