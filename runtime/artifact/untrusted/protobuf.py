"""Read the fields of a protobuf message without its schema, and without copying their contents.

The tables give the numbers of the fields of ONNX messages, as in onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

MODEL = {"ir_version": 1, "graph": 7, "opset_import": 8, "training_info": 20, "functions": 25}
OPSET = {"domain": 1}
GRAPH = {
    "node": 1,
    "name": 2,
    "initializer": 5,
    "input": 11,
    "output": 12,
    "sparse_initializer": 15,
}
NODE = {"input": 1, "output": 2, "op_type": 4, "attribute": 5, "domain": 7}
ATTRIBUTE = {
    "name": 1,
    "t": 5,
    "g": 6,
    "tensors": 10,
    "graphs": 11,
    "type": 20,
    "sparse_tensor": 22,
    "sparse_tensors": 23,
}
TENSOR = {
    "dims": 1,
    "data_type": 2,
    "name": 8,
    "raw_data": 9,
    "external_data": 13,
    "data_location": 14,
}
ENTRY = {"key": 1, "value": 2}
VALUE = {"name": 1, "type": 2}
TYPE = {"tensor_type": 1}
TENSOR_TYPE = {"elem_type": 1, "shape": 2}

_VARINT = 0
_LENGTH = 2
# Sizes of the numbers of fixed size.
_FIXED = {1: 8, 5: 4}
_MAX_VARINT_BYTES = 10


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one message; nested messages are not read.

    Numbers of fixed size are left out: no field of interest is one, and a library ignores a field
    of another type than the one that it knows.

    Args:
        message: its bytes.

    Yields:
        Field number, and the number or a view of the bytes.

    Raises:
        ValueError: the bytes are not a protobuf message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number = tag >> 3
        wire = tag & 7
        if not 0 < number < 2**29:
            raise ValueError(f"field number {number} is impossible")
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _LENGTH:
            size, at = _varint(message, at)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:  # groups are deprecated and nested differently; ONNX has none
            raise ValueError(f"byte {at} begins a field of wire type {wire}")
        if size > len(message) - at:
            raise ValueError(f"a field has {size} bytes, but only {len(message) - at} are left")
        if wire == _LENGTH:
            yield number, message[at : at + size]
        at += size


def values_at(message: memoryview, path: tuple[int, ...]) -> Iterator[memoryview]:
    """The values at a path of field numbers through nested messages."""
    for number, value in fields(message):
        if number == path[0] and isinstance(value, memoryview):
            if path[1:]:
                yield from values_at(value, path[1:])
            else:
                yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length that begins at `at`, and the position after it."""
    value = 0
    for index, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"the number at byte {at} does not end")
