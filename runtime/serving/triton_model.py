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
from ..results import Prediction
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

# How often a request asks whether its client has left.
_SECONDS = 0.1


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
        numbers = {
            name: int(given[name])
            for name in ("threads", "max_length", "max_rows")
            if name in given
        }
        most = {"max_rows": numbers.pop("max_rows")} if "max_rows" in numbers else {}
        self._engine = Engine.load(
            Path(args["model_repository"], args["model_version"], "engines"),
            given["target"],
            given.get("operating_point"),
            preload=True,
            **numbers,
        )
        self._scheduler = Scheduler(self._engine, **most)
        self._scheduler.submit("").result()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin requests; `_answer` answers them later, in any order."""
        for request in requests:
            sender = request.get_response_sender()
            texts = [
                triton.get_input_tensor_by_name(request, name) for name in ("TEXT", "TEXT_PAIR")
            ]
            rows = [text.as_numpy()[:, 0].tolist() for text in texts if text is not None]
            options = json.loads(request.parameters() or "{}")
            asyncio.run_coroutine_threadsafe(self._answer(sender, rows, options), self._loop)

    def finalize(self) -> None:
        """Answer the requests that have begun, and close the engine."""
        asyncio.run_coroutine_threadsafe(_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._scheduler.close()
        self._engine.close()

    async def _answer(self, sender: Any, rows: list[list[bytes]], options: dict[str, Any]) -> None:
        work = asyncio.ensure_future(self._classify(rows, options))
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

    async def _classify(self, rows: list[list[bytes]], options: dict[str, Any]) -> list[Prediction]:
        try:
            decoded = [[text.decode() for text in texts] for texts in rows]
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8: {error}", "encode texts as UTF-8") from error
        texts: list[Text] = list(zip(*decoded, strict=True)) if len(rows) > 1 else list(decoded[0])
        limits = {name: options.get(name) for name in ("deadline_ms", "max_exit")}
        return await self._scheduler.classify(texts, **limits)

    def _tensors(self, found: Sequence[Prediction]) -> list[Any]:
        width = len(self._engine.labels) if self._engine.multi_label else 1

        def padded(values: Sequence[Any], filler: Any) -> list[Any]:
            return [*values, *[filler] * (width - len(values))]

        columns = {
            "LABEL": (object, [padded(row.labels, "") for row in found]),
            "SCORE": (np.float32, [padded(row.scores, 0.0) for row in found]),
            "PROBABILITIES": (np.float32, [row.probabilities for row in found]),
            "EXIT": (np.int32, [[row.exit] for row in found]),
            "LAYER": (np.int32, [[row.layer] for row in found]),
            "TRUNCATED": (np.bool_, [[row.truncated] for row in found]),
            "DEADLINE_LIMITED": (np.bool_, [[row.deadline_limited] for row in found]),
            "DEADLINE_MISSED": (np.bool_, [[row.deadline_missed] for row in found]),
        }
        return [triton.Tensor(name, np.array(x, kind)) for name, (kind, x) in columns.items()]


async def _others() -> None:
    """Wait for the requests that have begun."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _failure(message: str, code: int) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(message, code))


def _code(error: FpabeeError) -> int:
    if isinstance(error, OverloadedError):
        return int(triton.TritonError.UNAVAILABLE)
    is_wrong = isinstance(error, (InputError, RuleError))
    return int(triton.TritonError.INVALID_ARG if is_wrong else triton.TritonError.INTERNAL)


def _use_gpu(number: int) -> None:
    """Make one of the visible GPUs the only one that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
