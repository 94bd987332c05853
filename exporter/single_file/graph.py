"""The whole model as one ONNX graph, with the exits and the rule inside.

The segments of an engines folder become a flat chain of `If` nodes, one for each exit. Its
condition is whether all rows have stopped. If they have, what the rule carries is handed on, and
otherwise the next segment and the rule run. A branch that is nested in another one would take
runtimes twice as long to load for each level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from ...runtime.artifact.manifest import (
    ATTENTION_BIAS,
    LOGITS,
    MASK_FILL,
    NEXT,
    Manifest,
)
from ...runtime.exit_0 import ExitZero
from ...runtime.rules.rules import ExitRule
from .exit_0 import PairMarks, exit_0_logits
from .nodes import Scope, Value
from .rules import RuleNodes, State

OPSET, IR_VERSION = 20, 10
MASK, TYPES = "attention_mask", "token_type_ids"
EXIT = "exit"
_IDS = "input_ids"


def single_graph(
    protos: Mapping[str, Any],
    manifest: Manifest,
    rule: ExitRule,
    exit_0: tuple[ExitZero, PairMarks] | None,
) -> Any:
    """One graph that answers each row at its own exit.

    Its inputs are `input_ids`, `attention_mask` and, if the model reads them, `token_type_ids`, all
    `[batch, sequence]` int64. Its outputs are `logits`, `[batch, labels]` float32, and `exit`,
    `[batch]` int64.

    Args:
        protos: the graphs of a target by name, each an `onnx.ModelProto`.
        manifest: says how segments call them.
        rule: the rule.
        exit_0: exit 0, and how it recognises second texts; None: leave it out.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        RuleError: the rule has no form as a graph, or does not fit the exits.
    """
    top = Scope("")
    calls = [name for segment in manifest.segments for name in segment.calls]
    read = {spec.name for graph in manifest.graphs.values() for spec in graph.inputs}
    inputs = [name for name in (_IDS, MASK, TYPES) if name in {*read, MASK}]
    given = {name: Value(top, name, np.dtype(np.int64), ("batch", "sequence")) for name in inputs}
    padding: Any = given[MASK].astype(np.float32)
    bias = ((1 - padding) * MASK_FILL).add_axis(1).add_axis(1)
    carried = {**given, ATTENTION_BIAS: bias}
    nodes = RuleNodes(top, rule, manifest.task, manifest.exits)
    state: State | None = None
    if exit_0 is not None:
        is_token = given[MASK].astype(np.bool_)
        logits = exit_0_logits(*exit_0, given[_IDS], is_token, given.get(TYPES))
        state = nodes.step(top, 0, logits, None)
    for number, segment in enumerate(manifest.segments, start=1):
        scope = top if state is None else Scope(f"exit_{number:02d}/")
        new: State = {}
        for place, name in enumerate(segment.calls):
            prefix, inside = f"exit_{number:02d}/{place}/", carried | new
            # A block that is called several times lies outside of the branches.
            weights = (top, f"{name}/") if calls.count(name) > 1 else (scope, prefix)
            names = _copy(protos[name], scope, prefix, inside, *weights)
            for spec in manifest.graphs[name].outputs:
                tensor = Value(scope, names[spec.name], np.dtype(spec.dtype), spec.shape)
                new[spec.name.removeprefix(NEXT)] = tensor
        after = nodes.step(scope, number, new.pop(LOGITS), state)
        needed = {
            spec.name
            for later in manifest.segments[number:]
            for name in later.calls
            for spec in manifest.graphs[name].inputs
        }
        new = {name: value for name, value in new.items() if name in needed}
        if state is not None:
            new, after = _guarded(top, number, state, scope, new, after)
        carried |= new
        state = after
    assert state is not None
    for name, value in ((LOGITS, state["logits"]), (EXIT, state["exit"])):
        top.node("Identity", value.name, outputs=[name])
    results = [_info(LOGITS, state["logits"]), _info(EXIT, state["exit"])]
    graph = onnx.helper.make_graph(
        top.nodes, "classifier", [_info(*each) for each in given.items()], results, top.initializers
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def _guarded(
    top: Scope, number: int, before: State, scope: Scope, new: State, after: State
) -> tuple[State, State]:
    """Run the nodes of a scope only if not all rows have stopped.

    Args:
        top: the graph, which gets the `If`.
        number: the exit.
        before: what the rule carried on at the exit before.
        scope: the nodes.
        new: the tensors that later segments need.
        after: what the rule carries on.

    Returns:
        `new` and `after` as outputs of the `If`.
    """
    done = Scope(f"done_{number:02d}/")
    for name in after:
        # A branch cannot return a tensor from outside.
        done.node("Identity", before[name].name, outputs=[f"{done.prefix}{name}"])
    for name, value in new.items():
        # Nothing reads it, so it has no rows; the width is for the runtime's analysis of shapes.
        sizes = [1 if isinstance(size, str) else size for size in value.shape]
        done.constant(np.zeros(sizes), value.dtype, f"{done.prefix}{name}")
    results = new | after
    names = {name: f"after_{number:02d}/{name}" for name in results}
    branches = {
        "then_branch": _branch(done, {n: (f"{done.prefix}{n}", v) for n, v in results.items()}),
        "else_branch": _branch(scope, {n: (v.name, v) for n, v in results.items()}),
    }
    top.node("If", before["done"].name, outputs=list(names.values()), **branches)
    made = {name: Value(top, names[name], v.dtype, v.shape) for name, v in results.items()}
    return {name: made[name] for name in new}, {name: made[name] for name in after}


def _branch(scope: Scope, results: Mapping[str, tuple[str, Value]]) -> Any:
    outputs = [_info(name, value) for name, value in results.values()]
    return onnx.helper.make_graph(scope.nodes, scope.prefix[:-1], [], outputs, scope.initializers)


def _copy(
    proto: Any, scope: Scope, prefix: str, given: State, weights: Scope, of_weights: str
) -> dict[str, str]:
    """Add the nodes of a graph to a scope, and its weights unless they are there.

    Args:
        proto: the graph.
        scope: where its nodes are added.
        prefix: what their names and those of tensors begin with.
        given: its inputs, and perhaps other tensors.
        weights: where its weights are added.
        of_weights: what the names of the weights begin with.

    Returns:
        The new names of its tensors.
    """
    names = {value.name: given[value.name].name for value in proto.graph.input}
    stored = {tensor.name for tensor in weights.initializers}
    for tensor in proto.graph.initializer:
        names[tensor.name] = of_weights + tensor.name
        if names[tensor.name] not in stored:
            copied = onnx.TensorProto()
            copied.CopyFrom(tensor)
            copied.name = names[tensor.name]
            weights.initializers.append(copied)
    for node in proto.graph.node:
        names |= {output: prefix + output for output in node.output if output}
        inputs, outputs = ([names.get(x, "") for x in each] for each in (node.input, node.output))
        scope.nodes.append(onnx.NodeProto())
        scope.nodes[-1].CopyFrom(node)
        scope.nodes[-1].name = prefix + node.name
        scope.nodes[-1].input[:], scope.nodes[-1].output[:] = inputs, outputs
    return names


def _info(name: str, value: Value) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)
