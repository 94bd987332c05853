"""ONNX graphs as the bytes of one file, weights included."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import ModelError


def serialized(proto: Any, what: str) -> bytes:
    """The checked content of an ONNX file, the same bytes every time.

    Weights are never kept in other files: the runtime refuses such graphs.

    Args:
        proto: an `onnx.ModelProto`.
        what: what it is, for the message.

    Raises:
        ModelError: it is larger than protobuf allows.
    """
    import onnx
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        content = bytes(proto.SerializeToString(deterministic=True))
    except EncodeError as error:
        raise ModelError(
            f"{what} does not fit into one ONNX file, which holds at most 2 GiB: {error}",
            "keep more exits, so that fewer layers lie between two of them, with --exits",
        ) from error
    onnx.checker.check_model(content)
    return content
