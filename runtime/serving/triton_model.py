"""The model that Triton's Python backend runs, see `triton`.

Requests share a `Scheduler`, and each is answered as soon as its last row has stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from ..encoding import Text
from ..engine import Engine
from ..errors import FpabeeError, InputError, OverloadedError, RuleError
from ..predictions import Prediction
from .scheduler import Scheduler
from .triton import INPUTS, OUTPUTS

logger = logging.getLogger(__name__)

# How often a request asks whether its client has left.
_SECONDS = 0.1
_KINDS = {"STRING": object, "FP32": np.float32, "INT32": np.int32, "BOOL": np.bool_}
_Texts = list[list[bytes] | None]


class TritonPythonModel:
    """Answers requests; Triton makes one for each instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine.

        Args:
            args: what Triton says about the model: its configuration, folder and device.

        Raises:
            FpabeeError: as in `Engine.load`. Triton then does not load the model.
        """
        if args["model_instance_kind"] == "GPU":
            _use_gpu(int(args["model_instance_device_id"]))
        settings = json.loads(args["model_config"])["parameters"]
        given = {name: value["string_value"] for name, value in settings.items()}
        numbers: dict[str, Any] = {
            name: int(given[name]) for name in ("threads", "max_length") if name in given
        }
        self._engine = Engine.load(
            Path(args["model_repository"], args["model_version"], "engines"),
            given["target"],
            given.get("operating_point"),
            **numbers,
        )
        self._scheduler = Scheduler(self._engine, int(given["max_rows"]))
        self._engine.warm_up(tokens=1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin requests; `_answer` answers them later, in any order."""
        for request in requests:
            sender = request.get_response_sender()
            inputs = [triton.get_input_tensor_by_name(request, name) for name in INPUTS]
            texts = [None if found is None else found.as_numpy()[:, 0].tolist() for found in inputs]
            options = json.loads(request.parameters() or "{}")
            asyncio.run_coroutine_threadsafe(self._answer(sender, texts, options), self._loop)

    def finalize(self) -> None:
        """Answer the requests that have begun, and close the engine."""
        asyncio.run_coroutine_threadsafe(_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._scheduler.close()
        self._engine.close()

    async def _answer(self, sender: Any, inputs: _Texts, options: dict[str, Any]) -> None:
        work = asyncio.ensure_future(self._classify(inputs, options))
        while not work.done():
            await asyncio.wait({work}, timeout=_SECONDS)
            if not work.done() and sender.is_cancelled():
                work.cancel()
        try:
            response = triton.InferenceResponse(self._tensors(work.result()))
        except asyncio.CancelledError:
            response = _failure("the client has left", triton.TritonError.CANCELLED)
        except FpabeeError as error:
            response = _failure(str(error), _code(error))
        except Exception:
            logger.exception("a request failed")
            response = _failure("the model failed", triton.TritonError.INTERNAL)
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _classify(self, inputs: _Texts, options: dict[str, Any]) -> list[Prediction]:
        first, second = inputs
        if first is None:
            raise InputError("the input TEXT is missing", "TEXT_PAIR holds only the second texts")
        try:
            texts: Sequence[Text] = [text.decode() for text in first]
            if second is not None:
                texts = [(a.decode(), b.decode()) for a, b in zip(first, second, strict=True)]
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8: {error}", "encode texts as UTF-8") from error
        limits = {name: options.get(name) for name in ("deadline_ms", "max_exit")}
        return await self._scheduler.classify(texts, **limits)

    def _tensors(self, found: Sequence[Prediction]) -> list[Any]:
        width = len(self._engine.labels) if self._engine.multi_label else 1

        def row(value: Any, kind: str) -> list[Any]:
            values = value if isinstance(value, tuple) else (value,)
            filled = width if isinstance(value, tuple) else 1
            return [*values, *["" if kind == "STRING" else 0] * (filled - len(values))]

        return [
            triton.Tensor(
                name, np.array([row(getattr(x, source), kind) for x in found], _KINDS[kind])
            )
            for name, (kind, source) in OUTPUTS.items()
        ]


async def _others() -> None:
    """Wait for the requests that have begun."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _failure(message: str, code: Any) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(message, code))


def _code(error: FpabeeError) -> Any:
    if isinstance(error, OverloadedError):
        return triton.TritonError.UNAVAILABLE
    is_wrong = isinstance(error, (InputError, RuleError))
    return triton.TritonError.INVALID_ARG if is_wrong else triton.TritonError.INTERNAL


def _use_gpu(number: int) -> None:
    """Make one of the visible GPUs the only one that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
