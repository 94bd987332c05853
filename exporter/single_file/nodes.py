"""Nodes of ONNX graphs, written as formulas of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import ArrayLike

Shape = tuple[int | str, ...]
"""Dimensions; those that vary from run to run are names."""

_CALCULATIONS = {
    **{"add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "remainder": "Mod"},
    **{"negative": "Neg", "absolute": "Abs", "exp": "Exp", "log": "Log", "maximum": "Max"},
    **{"bitwise_and": "And", "bitwise_or": "Or", "invert": "Not"},
}
_COMPARISONS = {
    **{"less": "Less", "greater": "Greater", "greater_equal": "GreaterOrEqual", "equal": "Equal"}
}
_REDUCTIONS = {"add": "ReduceSum", "maximum": "ReduceMax", "logical_and": "ReduceMin"}


class Scope:
    """The nodes and initializers of a graph, or of one branch of an `If`.

    Args:
        prefix: what the names of its nodes and tensors begin with, since names are unique over all
            branches.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node.

        Args:
            kind: the operator.
            inputs: names of its inputs.
            outputs: names of its outputs; default: one output with a name of its own.
            **attributes: those of the operator.

        Returns:
            The name of its first output.
        """
        name = f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(
            onnx.helper.make_node(kind, inputs, outputs or [name], name, **attributes)
        )
        return outputs[0] if outputs else name

    def constant(self, values: ArrayLike, dtype: Any, name: str = "") -> Value:
        """Add an initializer, by default with a name of its own."""
        array = np.asarray(values, dtype)
        name = name or f"{self.prefix}constant_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return Value(self, name, array.dtype, array.shape)


class Value(NDArrayOperatorsMixin):
    """A tensor of a graph. Operators and functions of numpy add the nodes that compute them.

    So the formulas of `runtime.rules.measures` are those of the graph.

    Attributes:
        scope: where nodes are added.
        name: the name of the tensor.
        dtype: its type.
        shape: its dimensions.
    """

    def __init__(self, scope: Scope, name: str, dtype: np.dtype[Any], shape: Shape) -> None:
        self.scope, self.name, self.dtype, self.shape = scope, name, dtype, shape

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def then(
        self,
        kind: str,
        *inputs: Value,
        dtype: Any = None,
        shape: Shape | None = None,
        **attributes: Any,
    ) -> Value:
        """The result of an operator whose first input this is.

        Args:
            kind: the operator.
            inputs: its other inputs.
            dtype: the type of the result; default: that of this tensor.
            shape: the dimensions of the result; default: those of this tensor.
            **attributes: those of the operator.
        """
        name = self.scope.node(kind, self.name, *(x.name for x in inputs), **attributes)
        return Value(
            self.scope,
            name,
            self.dtype if dtype is None else np.dtype(dtype),
            self.shape if shape is None else shape,
        )

    def within(self, scope: Scope) -> Value:
        """The same tensor, read in a branch."""
        return Value(scope, self.name, self.dtype, self.shape)

    def astype(self, dtype: Any) -> Value:
        """The same values in another type."""
        return self.then(
            "Cast", dtype=dtype, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        )

    def add_axis(self, axis: int) -> Value:
        """The same values with one more dimension, counted from the first or, below 0, the last."""
        shape = list(self.shape)
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 1)
        axes = self.scope.constant([axis], np.int64)
        return self.then("Unsqueeze", axes, shape=tuple(shape))

    def take(self, numbers: ArrayLike | Value, axis: int) -> Value:
        """The slices of these numbers along an axis, counted from the first."""
        if not isinstance(numbers, Value):
            numbers = self.scope.constant(numbers, np.int64)
        shape = (*self.shape[:axis], *numbers.shape, *self.shape[axis + 1 :])
        return self.then("Gather", numbers, shape=shape, axis=axis)

    def reduce(self, kind: str, axis: int, keepdims: bool = False) -> Value:
        """The result of a reduction such as `ReduceSum` over one axis; bool needs `ReduceMin`."""
        if self.dtype == np.bool_:  # which no operator reduces
            return self.astype(np.int32).reduce(kind, axis, keepdims).astype(np.bool_)
        shape = list(self.shape)
        shape[axis] = 1
        if not keepdims:
            del shape[axis]
        axes = self.scope.constant([axis], np.int64)
        return self.then(kind, axes, shape=tuple(shape), keepdims=int(keepdims))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Value:
        """The result of a function of numpy, or of its method `reduce`."""
        name = ufunc.__name__
        if method == "reduce":
            return self.reduce(_REDUCTIONS[name], options["axis"])
        values = [x if isinstance(x, Value) else self.scope.constant(x, self.dtype) for x in inputs]
        is_comparison = name in _COMPARISONS
        return values[0].then(
            _COMPARISONS[name] if is_comparison else _CALCULATIONS[name],
            *values[1:],
            dtype=np.bool_ if is_comparison else None,
            shape=_broadcast([value.shape for value in values]),
        )


def where(condition: Value, yes: Value, no: Value) -> Value:
    """Values of `yes` where a condition holds, else of `no`."""
    shape = _broadcast([value.shape for value in (condition, yes, no)])
    return condition.then("Where", yes, no, dtype=yes.dtype, shape=shape)


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    """The dimensions of a result: of each axis the one that is not 1."""
    most = max(map(len, shapes))
    padded = [(1,) * (most - len(shape)) + shape for shape in shapes]
    return tuple(
        next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True)
    )
