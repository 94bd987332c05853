"""A model for Triton's Python backend: the texts of all requests share one scheduler."""

import asyncio
import json
import logging
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as triton

from fpabee.runtime import Engine, InputError, OverloadedError, RuleError
from fpabee.runtime.serving import Scheduler


class TritonPythonModel:
    """Triton makes one of these, in a process of its own."""

    def initialize(self, args):
        """Load the engines folder that lies beside this file, for the device of this instance."""
        folder = Path(args["model_repository"], args["model_version"], "engines")
        on_gpu = args["model_instance_kind"] == "GPU"
        device = int(args["model_instance_device_id"]) if on_gpu else 0
        self.engine = Engine.load(folder, device=device)
        self.scheduler = Scheduler(self.engine, max_rows=1000)
        self.scheduler.warm_up()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def execute(self, requests):
        """Begin the requests; each is answered when its last text has stopped."""
        for request in requests:
            texts = triton.get_input_tensor_by_name(request, "TEXT").as_numpy()[:, 0].tolist()
            pairs = triton.get_input_tensor_by_name(request, "TEXT_PAIR")
            if pairs is not None:
                texts = list(zip(texts, pairs.as_numpy()[:, 0].tolist(), strict=True))
            options = json.loads(request.parameters() or "{}")
            answer = self.answer(request.get_response_sender(), texts, options)
            asyncio.run_coroutine_threadsafe(answer, self.loop)

    async def answer(self, sender, texts, options):
        """Classify the texts of a request, and send the answers or an error."""
        limits = {name: options.get(name) for name in ("deadline_ms", "max_exit")}
        try:
            rows = await self.scheduler.classify([decoded(text) for text in texts], **limits)
            response = triton.InferenceResponse(tensors(rows))
        except OverloadedError as error:
            response = failure(error, triton.TritonError.UNAVAILABLE)
        except (InputError, RuleError, UnicodeDecodeError) as error:
            response = failure(error, triton.TritonError.INVALID_ARG)
        except Exception:  # a request without a response would wait for ever
            logging.exception("a request failed")
            response = failure("the model failed", triton.TritonError.INTERNAL)
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        """Answer the requests that have begun, and close the engine."""
        asyncio.run_coroutine_threadsafe(all_others(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.scheduler.close()
        self.engine.close()


def decoded(text):
    """A text or a pair as strings."""
    return tuple(part.decode() for part in text) if isinstance(text, tuple) else text.decode()


def tensors(rows):
    """The outputs that `config.pbtxt` lists."""
    labels = np.array([[", ".join(row.labels)] for row in rows], object)
    return [
        triton.Tensor("LABEL", labels),
        triton.Tensor("PROBABILITIES", np.array([row.probabilities for row in rows], np.float32)),
        triton.Tensor("EXIT", np.array([[row.exit] for row in rows], np.int32)),
        triton.Tensor("TRUNCATED", np.array([[row.truncated] for row in rows], np.bool_)),
    ]


def failure(error, code):
    """A response without outputs."""
    return triton.InferenceResponse(error=triton.TritonError(str(error), code))


async def all_others():
    """Wait for the requests that have begun."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
