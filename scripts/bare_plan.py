"""Run a packed plan in bare TensorRT, as an application without fpabee does.

`gpu_check.py` compares the chain with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpabee.exporter.single_file.graph import MASK
from fpabee.exporter.single_file.rules import settings_of
from fpabee.exporter.targets.backends import RTX
from fpabee.runtime import Bucket, ExitRule
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS, Manifest, TensorSpec
from fpabee.runtime.backends.buffers import dtype_of, shape_of
from fpabee.runtime.backends.cuda import PinnedArray, cuda
from fpabee.runtime.backends.tensorrt import (
    MODULES,
    ErrorLog,
    RuntimeCache,
    error_logger,
    succeeds,
)
from fpabee.runtime.encoding import Arrays, EncodedRow, padding_values, write_rows


class BarePlan:
    """A plan of `fpabee-pack`.

    It has one execution context for each shape that was needed, whose inputs may change.

    Args:
        folder: what `fpabee-pack` wrote.
        library: `tensorrt-rtx` or `tensorrt`.
        manifest: of the chain: how rows are padded, and which settings a rule has.
        shapes: to which rows are padded, ascending.
    """

    def __init__(
        self, folder: Path, library: str, manifest: Manifest, shapes: Sequence[Bucket]
    ) -> None:
        description = json.loads((folder / "fpabee.json").read_text(encoding="utf-8"))
        self._settings: dict[str, Any] = description["settings"]
        self._inputs = msgspec.convert(description["plan"]["inputs"], list[TensorSpec])
        self._outputs = msgspec.convert(description["plan"]["outputs"], list[TensorSpec])
        self._manifest = manifest
        self._shapes = shapes
        self._trt: Any = import_module(MODULES[library])
        self._errors = ErrorLog()
        self._logger = error_logger(self._trt, self._errors)
        self._compiled: RuntimeCache | None = None
        if library == RTX:
            self._compiled = RuntimeCache(f"check of {folder.name}", self._errors)
        self._contexts: dict[Bucket, tuple[Any, dict[str, tuple[PinnedArray, int]]]] = {}
        self._allocated: list[int] = []
        self._calls = cuda(0)
        with self._calls:
            self._stream = self._calls.stream()
            self._event = self._calls.event()
            self._runtime = self._trt.Runtime(self._logger)
            plan = (folder / description["plan"]["file"]).read_bytes()
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            self._must(self._engine is not None, "cannot be loaded")

    def prepare(self, rows: Sequence[EncodedRow], rule: ExitRule) -> Callable[[], Arrays]:
        """The run of rows with a rule, padded to the first shape that is large enough."""
        longest = max(map(len, rows))
        shape = next(s for s in self._shapes if s.batch >= len(rows) and s.sequence >= longest)
        padding = padding_values(self._manifest.tokenizer)
        settings = self._settings | settings_of(rule, self._manifest.task, self._manifest.exits)
        inputs = {}
        for spec in self._inputs:
            inputs[spec.name] = array = np.empty(shape_of(spec, shape), dtype_of(spec))
            if spec.name in settings:
                array[...] = settings[spec.name]
            elif spec.name == MASK:
                write_rows(array, ATTENTION_BIAS, rows, -1)  # which is 0 on tokens
                array += 1
            else:
                write_rows(array, spec.name, rows, padding[spec.name])
        return partial(self._run, shape, inputs, len(rows))

    def _run(self, shape: Bucket, inputs: Arrays, rows: int) -> Arrays:
        with self._calls:
            if shape not in self._contexts:
                self._contexts[shape] = self._context(shape)
            context, memory = self._contexts[shape]
            for name, array in inputs.items():
                pinned, address = memory[name]
                pinned.array[...] = array
                self._calls.copy(address, pinned.pointer, array.nbytes, self._stream)
            self._must(context.execute_async_v3(self._stream), "does not start")
            outputs = {spec.name: memory[spec.name] for spec in self._outputs}
            for pinned, address in outputs.values():
                self._calls.copy(pinned.pointer, address, pinned.array.nbytes, self._stream)
            self._calls.record(self._event, self._stream)
            self._calls.wait(self._event)
            return {name: pinned.array[:rows].copy() for name, (pinned, _) in outputs.items()}

    def _context(self, shape: Bucket) -> tuple[Any, dict[str, tuple[PinnedArray, int]]]:
        """An execution context, and where its inputs and outputs are on the host and the device."""
        how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._compiled is not None:  # otherwise slow kernels run until better ones are compiled
            how = self._compiled.config(self._trt, "plan", self._engine)
        context = self._engine.create_execution_context(how)
        self._must(context is not None, "has no execution context")
        set_profile = context.set_optimization_profile_async
        self._must(succeeds(set_profile, 0, self._stream), "has no profile")
        memory = {}
        for spec in (*self._inputs, *self._outputs):
            pinned = self._calls.pinned(shape_of(spec, shape), dtype_of(spec))
            address = self._malloc(pinned.array.nbytes)
            memory[spec.name] = pinned, address
            accepted = context.set_tensor_address(spec.name, address)
            if spec in self._inputs:
                accepted &= context.set_input_shape(spec.name, pinned.array.shape)
            self._must(accepted, f"does not accept {spec.name} of shape {pinned.array.shape}")
        self._must(succeeds(lambda: not context.infer_shapes()), "lacks an input")
        size = int(context.update_device_memory_size_for_shapes())
        self._must(size > 0, "does not say how much memory it needs")
        context.set_device_memory(self._malloc(size), size)
        return context, memory

    def _malloc(self, size: int) -> int:
        self._allocated.append(self._calls.malloc(size))
        return self._allocated[-1]

    def _must(self, done: bool, what: str) -> None:
        self._errors.must(done, f"the plan in bare TensorRT {what}", 0)

    def close(self) -> None:
        """Free everything: contexts, the engine, what contexts were made with, and the runtime."""
        with self._calls:
            self._contexts.clear()
            del self._engine, self._compiled, self._runtime
            for address in self._allocated:
                self._calls.free(address)
            self._calls.destroy_event(self._event)
            self._calls.destroy_stream(self._stream)
