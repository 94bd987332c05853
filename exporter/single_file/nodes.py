"""Tensors of an ONNX graph that formulas of numpy work on, such as those of the exit rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from ..onnx_file import OPSET

_OPERATORS: dict[np.ufunc, str] = {
    **{np.add: "Add", np.subtract: "Sub", np.multiply: "Mul", np.divide: "Div"},
    **{np.remainder: "Mod", np.negative: "Neg", np.absolute: "Abs", np.exp: "Exp", np.log: "Log"},
    **{np.maximum: "Max", np.minimum: "Min", np.less: "Less", np.less_equal: "LessOrEqual"},
    **{np.greater: "Greater", np.greater_equal: "GreaterOrEqual", np.equal: "Equal"},
    **{np.bitwise_and: "And", np.bitwise_or: "Or", np.invert: "Not"},
}
_REDUCTIONS: dict[np.ufunc, str] = {
    np.add: "ReduceSum",
    np.maximum: "ReduceMax",
    np.minimum: "ReduceMin",
}

_IN_32_BITS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float64): np.dtype(np.float32),
    np.dtype(np.int64): np.dtype(np.int32),
}


class Writer:
    """Adds nodes to a graph, or to the branch of an `If` that is being written.

    Args:
        name: of the graph.
        in_32_bits: whether formulas compute in float32 and int32 instead of float64 and int64.

    Attributes:
        graph: what gets the nodes.
    """

    def __init__(self, name: str, in_32_bits: bool = False) -> None:
        self._in_32_bits = in_32_bits
        self._begin(name)

    def type_of(self, dtype: Any) -> np.dtype[Any]:
        """The type in which formulas compute that are written for another one."""
        wanted: np.dtype[Any] = np.dtype(dtype)
        return _IN_32_BITS.get(wanted, wanted) if self._in_32_bits else wanted

    def _begin(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self._op = GraphBuilder(self.graph).op

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[ir.Graph]:
        """Add nodes to a new branch; their names begin with that of the branch."""
        outer_graph = self.graph
        outer_op = self._op
        self._begin(name)
        yield self.graph
        made = [value for node in self.graph for value in node.outputs]
        for named in (*self.graph, *made, *[*self.graph.initializers.values()]):
            named.name = f"{name}/{named.name}"
        self.graph = outer_graph
        self._op = outer_op

    def node(self, kind: str, *inputs: Any, **attributes: Any) -> Tensor:
        """The first result of a node, whose inputs are tensors, numbers or lists of numbers."""
        values = [
            each.value if isinstance(each, Tensor) else np.asarray(each).tolist() for each in inputs
        ]
        results = getattr(self._op, kind)(*values, **attributes)
        return Tensor(self, results if isinstance(results, ir.Value) else results[0])

    def constant(self, array: NDArray[Any]) -> Tensor:
        """An array that never changes."""
        return self.node("Constant", value=ir.tensor(array))

    def initializer(self, name: str, array: NDArray[Any]) -> Tensor:
        """An array that the graph holds under a name."""
        return Tensor(self, self._op.initializer(ir.tensor(array, name=name)))


class Tensor(NDArrayOperatorsMixin):
    """A tensor of a graph. Operators and functions of numpy add the nodes that compute them.

    Args:
        writer: what adds nodes.
        value: the tensor.
    """

    def __init__(self, writer: Writer, value: ir.Value) -> None:
        self.writer = writer
        self.value = value

    @property
    def shape(self) -> tuple[Any, ...]:
        """Its dimensions, of which those that are not integers vary from run to run."""
        assert self.value.shape is not None
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type."""
        assert self.value.dtype is not None
        return self.value.dtype.numpy()

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    def then(self, kind: str, *inputs: Any, **attributes: Any) -> Tensor:
        """The result of an operator whose first input this is."""
        return self.writer.node(kind, self, *inputs, **attributes)

    def astype(self, dtype: Any, copy: bool = True) -> Tensor:
        """The same values in another type, see `Writer.type_of`."""
        return self.then("Cast", to=ir.DataType.from_numpy(self.writer.type_of(dtype)))

    def argmax(self, axis: int) -> Tensor:
        """The number of the largest value along an axis, the lowest of equal ones."""
        return self.then("ArgMax", axis=axis, keepdims=0)

    def __getitem__(self, index: Any) -> Tensor:
        """A new axis, a slice or some numbers along one axis; all slices before it are whole."""
        *before, item = index if isinstance(index, tuple) else (index,)
        axis = -1 if before == [...] else len(before)
        if item is None:
            return self.then("Unsqueeze", [axis])
        if isinstance(item, slice):
            return self.then("Slice", [item.start or 0], [item.stop or np.iinfo(int).max], [axis])
        return self.then("Gather", item, axis=axis)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Tensor:
        """The result of a function of numpy, or of its method `reduce`."""
        if method != "reduce":
            return self.writer.node(_OPERATORS[ufunc], *inputs)
        axes = [options["axis"]]
        keepdims = int(options.get("keepdims", False))
        if ufunc is np.logical_and:  # runtimes do not reduce bool
            return self.astype(np.int32).then("ReduceMin", axes, keepdims=0).astype(np.bool_)
        return self.then(_REDUCTIONS[ufunc], axes, keepdims=keepdims)

    def __array_function__(
        self, function: Callable[..., Any], types: Any, inputs: Any, options: Any
    ) -> Tensor:
        """The result of a function of numpy that is no `ufunc`."""
        return _FUNCTIONS[function](*inputs, **options)


def _sort(values: Tensor, axis: int) -> Tensor:
    return values.then("TopK", [values.shape[axis]], axis=axis, largest=0, _outputs=2)


def _delete(values: Tensor, number: int, axis: int) -> Tensor:
    rest = np.delete(np.arange(values.shape[axis]), number)
    return values.then("Gather", rest, axis=axis)


def _stack(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0].writer.node("Concat", *(each[..., None] for each in tensors), axis=axis)


def _full_like(rows: Tensor, value: Any, dtype: Any = None) -> Tensor:
    is_tensor = isinstance(value, Tensor)
    writer = rows.writer
    one = value
    if not is_tensor:
        one = writer.constant(np.asarray(value, writer.type_of(dtype or rows.dtype)))
    return writer.node("Expand", one, rows.then("Shape"))


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **{np.sort: _sort, np.delete: _delete, np.stack: _stack, np.full_like: _full_like},
    np.where: lambda condition, yes, no: condition.then("Where", yes, no),
    np.zeros_like: lambda rows: _full_like(rows, 0),
}
