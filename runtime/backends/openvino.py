"""OpenVINO on the CPU.

The fp32 graphs are compiled in the precision of the target. In bf16, segments also pass hidden
states on in bf16, so that nothing is converted between them and dropping rows copies half as much.
Each graph has one infer request per group of buffers, whose tensors are set only once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import util
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..artifact.folder import EnginesFolder
from ..artifact.manifest import HIDDEN_STATES, NEXT, BuiltFile, Graph, Target, TensorSpec
from ..errors import BackendError, MissingExtraError, first_line
from ..machine import cpu_info, package, usable_cores
from . import compiled_cache
from .buffers import Limits
from .host import HostBackend, Run

logger = logging.getLogger(__name__)

_OLDEST = (2026, 0)
_INSTALL = f"pip install -U {package('openvino')}"
_DEVICE = "CPU"
BF16 = "bf16"
"""The end of the precisions in which what is not quantized runs in bf16."""
# OpenVINO prepares its kernels again for each new shape, so rows and lengths are rounded up to few
# values. Batches of up to 16 rows are not padded, lengths of up to 512 tokens are multiples of 8,
# and beyond that a step is a sixteenth to an eighth of the size.
_LENGTH_STEP = 8
_FINE_LENGTHS = 512
_ROW_STEP = 1
_FINE_ROWS = 16
# Short texts are padded most, so in groups, their lengths are multiples of 4.
_SHORT_STEP = 4
_SHORT = 32
# If texts run one at a time, their lengths differ, and after each change of the length, every
# segment takes longer. With AMX, 16 tokens take as long as 8, so few lengths cost nothing.
_AMX_STEP = 16
# With AMX, a segment is so short that what Python does around it counts: twice the tokens in a
# group take 0.88 of the time over a file of short texts, and three times as many gain no more.
_AMX_GROUP_TOKENS = 2048


@dataclass(eq=False)
class Compiled:
    """A compiled graph.

    Attributes:
        model: the compiled model.
        memory: its constants, if they are in a mapped file, which must stay open with the model.
        has_run: whether it has run, so that its weights are packed and the constants are not read
            again.
    """

    model: Any
    memory: memoryview | None = None
    has_run: bool = False

    def run(self, request: Any) -> None:
        """Run an infer request of this graph."""
        request.infer(share_outputs=True)
        if not self.has_run:
            self.has_run = True
            if self.memory is not None:
                compiled_cache.drop_pages(self.memory)


class OpenVinoBackend(HostBackend):
    """Graphs as compiled models of OpenVINO; see `Backend`."""

    library = "OpenVINO"
    update = _INSTALL
    # It takes long to make an infer request, so more of them are kept than by default.
    free_bytes = 256 * 2**20

    def __init__(
        self, engines: EnginesFolder, name: str, threads: int | None = None, device: int = 0
    ) -> None:
        super().__init__(engines, name, threads, device)
        self._is_bf16 = self.target.precision.endswith(BF16)
        if self._is_bf16 and HIDDEN_STATES in self.specs:
            spec = self.specs[HIDDEN_STATES]
            self.specs[HIDDEN_STATES] = msgspec.structs.replace(spec, dtype="bfloat16")
        self._settings = {
            # int8 graphs name the operations that run in int8; this is for the others.
            "INFERENCE_PRECISION_HINT": BF16 if self._is_bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "NUM_STREAMS": "1",
            # Several processes must not be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if self._is_bf16:
            self._settings |= _unfused()

    @staticmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check that OpenVINO is installed and runs this precision here; see `HostBackend.check`.

        Raises:
            BackendError: the CPU lacks the instructions for it.
        """
        if target.precision.endswith(BF16) and not has_bf16():
            raise BackendError(
                f"target {name} needs a CPU with bf16 instructions, and this one has none",
                "choose another `target`, such as openvino-fp32",
            )
        _core()
        HostBackend.check(target, name, device)

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """OpenVINO raises `RuntimeError` for everything."""
        return (RuntimeError, MemoryError)

    def limits(self) -> Limits:
        """Any shape, rounded up to few sizes, so that prepared requests can be used again."""
        limits = super().limits()
        uses_amx = self.target.precision != "fp32" and _has_amx()
        step = _AMX_STEP if uses_amx else _LENGTH_STEP
        lengths = padded_sizes(limits.max_sequence, _LENGTH_STEP, _FINE_LENGTHS)
        short = () if uses_amx else padded_sizes(min(_SHORT, lengths[-1]), _SHORT_STEP, _SHORT)
        return replace(
            limits,
            group_tokens=_AMX_GROUP_TOKENS if uses_amx else limits.group_tokens,
            batch_sizes=padded_sizes(limits.max_batch, _ROW_STEP, _FINE_ROWS),
            sequence_lengths=tuple(sorted({*short, *lengths})),
            lengths_alone=padded_sizes(limits.max_sequence, step, _FINE_LENGTHS),
        )

    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> Any:
        """A tensor over an array's memory."""
        import openvino as ov

        if spec.dtype == "bfloat16":
            return ov.Tensor(array, array.shape, ov.Type.bf16)
        return ov.Tensor(array, shared_memory=True)

    def bind(self, graph: str, tensors: Mapping[str, Any]) -> Run:
        """An infer request with its tensors set."""
        compiled: Compiled = self.graph(graph)
        request = compiled.model.create_infer_request()
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)
        return partial(compiled.run, request)

    def read(self, name: str) -> Compiled:
        """A compiled model, from the cache if possible."""
        file = self._file(name)
        key = self._key(file.sha256)
        cached = self._imported(key)
        if cached is not None:
            return cached
        model = self._compile(file)
        with suppress(RuntimeError):  # then nothing is kept
            compiled_cache.write(key, model.export_model().getvalue())
        # What is read from the cache takes less memory than what was compiled.
        return self._imported(key) or Compiled(model)

    def _compile(self, file: BuiltFile | Graph) -> Any:
        import openvino as ov

        model = _core().read_model(str(self._engines.graph(file)))
        prepared = ov.preprocess.PrePostProcessor(model)
        names = {port.any_name for port in (*model.inputs, *model.outputs)}
        if self._is_bf16 and HIDDEN_STATES in names:
            prepared.input(HIDDEN_STATES).tensor().set_element_type(ov.Type.bf16)
        if self._is_bf16 and NEXT + HIDDEN_STATES in names:
            prepared.output(NEXT + HIDDEN_STATES).tensor().set_element_type(ov.Type.bf16)
        return _core().compile_model(prepared.build(), _DEVICE, self._settings)

    def _imported(self, key: str) -> Compiled | None:
        import openvino as ov

        memory = compiled_cache.read(key)
        if memory is None:
            return None
        blob = ov.Tensor(np.frombuffer(memory, np.uint8), shared_memory=True)
        try:
            model = _core().import_model(blob, _DEVICE, self._settings)
        except RuntimeError as error:
            logger.info("a compiled graph in the cache is not used: %s", first_line(error))
            return None
        compiled_cache.drop_pages(memory)  # the checksum has read them
        return Compiled(model, memory)

    def _key(self, sha256: str) -> str:
        """The name of a graph in the cache: a hash of everything that affects the compilation."""
        import openvino as ov

        core = _core()
        cpu = [
            core.get_property(_DEVICE, "FULL_DEVICE_NAME"),
            sorted(core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")),
            cpu_info().get("flags", ""),
        ]
        types = sorted((name, spec.dtype) for name, spec in self.specs.items())
        parts = [sha256, ov.__version__, cpu, self._settings, types]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def has_bf16() -> bool:
    """Whether this CPU has bf16 instructions that OpenVINO uses.

    Raises:
        MissingExtraError: OpenVINO is not installed, or damaged.
        BackendError: it is too old, or lacks its CPU plugin.
    """
    capabilities = _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    flags = cpu_info().get("flags", "").split()
    # OpenVINO also emulates bf16, which is slower than fp32.
    return "BF16" in capabilities and (not flags or "avx512_bf16" in flags or "amx_bf16" in flags)


def _has_amx() -> bool:
    return "amx_tile" in cpu_info().get("flags", "").split()


@lru_cache(1)
def _unfused() -> dict[str, str]:
    """The setting with which attention is not one kernel; empty where it is not known to help.

    In bf16, that kernel is slower than AMX is for its parts: without it, files of short texts take
    0.86 to 0.93 of the time, and single texts take as long (OpenVINO 2026.4). The setting is an
    internal one of OpenVINO, which a release may lack.
    """
    if not _has_amx():
        return {}
    import openvino as ov

    setting = {"SNIPPETS_MODE": "DISABLE"}
    number = ov.opset13.parameter([1], np.float32)
    nothing = ov.Model([ov.opset13.relu(number)], [number])
    try:
        _core().compile_model(nothing, _DEVICE, setting)
    except RuntimeError as error:
        logger.info("attention stays one kernel: %s", first_line(error))
        return {}
    return setting


def openvino_version() -> str:
    """The installed version; see `has_bf16` for the errors."""
    _core()
    import openvino as ov

    # Not that of its package, which an OpenVINO from an archive does not have.
    return str(ov.__version__).split("-")[0]


def padded_sizes(most: int, finest: int, fine_up_to: int) -> tuple[int, ...]:
    """The sizes to pad to, ascending to the largest.

    Args:
        most: the largest size.
        finest: the step up to `fine_up_to`; beyond, a step is an eighth of the size, rounded down
            to a power of two.
        fine_up_to: see `finest`.
    """
    sizes: list[int] = []
    size = 0
    while size < most:
        size += finest if size < fine_up_to else 2 ** (size.bit_length() - 4)
        sizes.append(min(size, most))
    return tuple(sizes)


@lru_cache(1)
def _core() -> Any:
    """The process-wide core; see `has_bf16` for its errors."""
    if util.find_spec("openvino") is None:
        raise MissingExtraError("OpenVINO is not installed", _INSTALL)
    try:
        import openvino as ov

        core = ov.Core()
        devices = core.available_devices
    except (ImportError, AttributeError, RuntimeError) as error:
        raise MissingExtraError(
            f"OpenVINO cannot be loaded: {first_line(error)}", f"reinstall it: {_INSTALL}"
        ) from error
    version = tuple(map(int, re.findall(r"\d+", ov.__version__)[:2]))
    if version < _OLDEST:
        raise BackendError(
            f"OpenVINO {ov.__version__} is too old; fpabee needs {_OLDEST[0]}.{_OLDEST[1]}",
            _INSTALL,
        )
    if _DEVICE not in devices:
        raise BackendError(
            f"the installed OpenVINO {ov.__version__} has no CPU plugin",
            f"reinstall it: {_INSTALL}",
        )
    return core
