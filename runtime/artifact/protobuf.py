"""Read the fields of a protobuf message without its schema, and without copying what it holds."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, I64, LEN, I32 = 0, 1, 2, 5

_FIXED = {I64: 8, I32: 4}
_MOST_VARINT_BYTES = 10


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """The fields of one message; those that it nests are not entered.

    Args:
        message: its bytes.

    Yields:
        Field number, wire type, and the number, or a view of the bytes.

    Raises:
        ValueError: these bytes are no message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: int | memoryview
        if wire == VARINT:
            value, at = _varint(message, at)
        else:
            if wire == LEN:
                size, at = _varint(message, at)
            elif wire in _FIXED:
                size = _FIXED[wire]
            else:  # groups, which nobody has written for many years, are nested in another way
                raise ValueError(f"byte {at} begins a field of wire type {wire}")
            if size > len(message) - at:
                raise ValueError(f"a field has {size} bytes, and {len(message) - at} are left")
            value, at = message[at : at + size], at + size
        if not 0 < number < 2**29:
            raise ValueError(f"field number {number} is impossible")
        yield number, wire, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for index, byte in enumerate(message[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"the number at byte {at} does not end")
