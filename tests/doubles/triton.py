"""The module `triton_python_backend_utils`, which exists only in Triton's own processes."""

from __future__ import annotations

import enum
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class TritonError(Exception):
    Code = enum.Enum("Code", "INTERNAL INVALID_ARG UNAVAILABLE CANCELLED")
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = Code

    def __init__(self, message: str, code: Code) -> None:
        assert isinstance(code, TritonError.Code)  # an integer is refused by the real class
        super().__init__(message)
        self.code = code


@dataclass
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class Response:
    tensors: Sequence[Tensor] = ()
    error: TritonError | None = None

    def __getitem__(self, name: str) -> Any:
        (found,) = (tensor.array for tensor in self.tensors if tensor.name == name)
        return found


@dataclass
class Request:
    """A request, which is also its own response sender; texts may be bytes."""

    inputs: dict[str, Sequence[str | bytes]]
    options: dict[str, Any] = field(default_factory=dict)
    left: Callable[[], bool] = lambda: False
    answered: threading.Event = field(default_factory=threading.Event)
    response: Response | None = None

    def get_response_sender(self) -> Request:
        return self

    def parameters(self) -> str:
        return json.dumps(self.options) if self.options else ""

    def is_cancelled(self) -> bool:
        return self.left()

    def send(self, response: Response, flags: int) -> None:
        assert flags == 1
        assert self.response is None
        self.response = response
        self.answered.set()

    def result(self) -> Response:
        assert self.answered.wait(20)
        assert self.response is not None
        return self.response


def _input(request: Request, name: str) -> Tensor | None:
    texts = request.inputs.get(name)
    if texts is None:
        return None
    encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return Tensor(name, np.array(encoded, object)[:, None])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("triton_python_backend_utils")
    module.TritonError = TritonError
    module.Tensor = Tensor
    module.InferenceResponse = Response
    module.get_input_tensor_by_name = _input
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "fpabee.runtime.serving.triton_model", raising=False)
