"""Every target by its name, and what builds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.agreement import Logits
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import BuiltFile, Graph, Target
from ...runtime.backends.cuda import extra
from ...runtime.backends.tensorrt import MODULES
from ...runtime.encoding import Text
from ...runtime.errors import BackendError, FpabeeError, MissingExtraError
from ...runtime.machine import cuda_device, require
from ...runtime.progress import Progress
from ...runtime.targets import backend_class
from ..staging import replacing, unique_name
from .backends import ONNXRUNTIME, OPENVINO, RTX, TENSORRT, version_of
from .check import exact_logits
from .plans import PlanOptions
from .tensorrt import build_plans, plans_record

FP16 = "fp16"
INT8_FOLDER = "targets/int8"
"""The place in an engines folder of the int8 graphs, which several targets run."""


class Workbench:
    """What the builds of one call share.

    Args:
        engines: the folder, as it is written.
        texts: texts like those to classify; may be empty.
        plans: how TensorRT plans are built.
        progress: called with (what, done, total).

    Attributes:
        places: folders in which files were written.
    """

    def __init__(
        self,
        engines: EnginesFolder,
        texts: Sequence[Text],
        plans: PlanOptions,
        progress: Progress,
    ) -> None:
        self.engines = engines
        self.texts = texts
        self.plans = plans
        self.progress = progress
        self.places: set[Path] = set()
        self._int8_files: dict[str, BuiltFile] | None = None

    @cached_property
    def exact(self) -> tuple[list[Text], Logits] | None:
        """The first 2,000 texts and their logits in fp32; None without texts."""
        return exact_logits(self.engines, self.texts) if self.texts else None

    def int8_files(self) -> dict[str, BuiltFile]:
        """The int8 graphs: made from the texts, once for all targets; without texts, those there.

        Raises:
            InputError: there are too few texts, and the folder has no int8 graphs.
            VerificationError: a graph could not be quantized.
        """
        if self._int8_files is None:
            self._int8_files = self._make_int8_files()
        return self._int8_files

    def _make_int8_files(self) -> dict[str, BuiltFile]:
        if not self.texts:
            for target in self.engines.manifest.targets.values():
                if target.precision.startswith("int8") and target.files:
                    return target.files
        require("quantize")
        from .int8 import quantize

        protos = quantize(self.engines, self.texts, self.progress)
        graphs = self.write_graphs(INT8_FOLDER, protos)
        return {
            name: BuiltFile(
                file=graph.file,
                sha256=graph.sha256,
                onnx_sha256=self.engines.manifest.graphs[name].sha256,
            )
            for name, graph in graphs.items()
        }

    def fp16_graphs(self) -> None:
        """Let the folder have graphs in fp16, which are checked before they are written.

        Raises:
            VerificationError: values overflow, or too many labels or exits change.
            ModelError: a weight does not fit into fp16.
        """
        if FP16 in self.engines.manifest.precisions and not self.texts:
            return
        require("graphs")
        from .fp16 import lowered_graphs

        protos = lowered_graphs(self.engines, self.exact, self.progress)
        graphs = self.write_graphs(f"onnx/{FP16}", protos)
        precisions = {**self.engines.manifest.precisions, FP16: graphs}
        changed = self.engines.with_manifest(precisions=precisions)

        def is_current(_: str, target: Target) -> bool:
            sources = changed.manifest.graphs_of(target)
            files = target.files.items()
            return all(file.onnx_sha256 == sources[name].sha256 for name, file in files)

        # Older plans were built from other graphs.
        self.engines = changed.keep_targets(is_current)

    def write_graphs(self, place: str, protos: Mapping[str, Any]) -> dict[str, Graph]:
        """Write graphs under names of their own, so that what the manifest names stays true.

        Args:
            place: a folder in the engines folder.
            protos: each an `onnx.ModelProto`, by the names of the graphs.

        Returns:
            Their records, by the same names.
        """
        from ..onnx_file import write_graph

        graphs = {}
        with replacing(self.place(place)) as new:
            for name, proto in protos.items():
                graph = write_graph(new / name, "", proto)
                file = unique_name(name, graph.sha256, ".onnx")
                (new / name).rename(new / file)
                graphs[name] = msgspec.structs.replace(graph, file=f"{place}/{file}")
        return graphs

    def place(self, relative: str) -> Path:
        """A folder of the engines folder to write files to, which exists from now on."""
        folder = self.engines.path / relative
        folder.mkdir(parents=True, exist_ok=True)
        self.places.add(folder)
        return folder


@dataclass(frozen=True)
class Builder(ABC):
    """Builds one target.

    Attributes:
        backend: the library that runs it.
        precision: the precision in which it runs.
        needs: what it needs, for the list of targets.
    """

    backend: str
    precision: str
    needs: str

    @property
    def name(self) -> str:
        """What one types to build it. Plans of TensorRT then also have the name of their GPU."""
        return f"{self.backend}-{self.precision}"

    @abstractmethod
    def why_not(self) -> FpabeeError | None:
        """Why this machine cannot build it; None: it can."""

    @abstractmethod
    def build(self, bench: Workbench) -> Target:
        """Build it.

        Returns:
            The record of the target, without what is measured.

        Raises:
            FpabeeError: it cannot be built from this folder.
        """

    def judged(self, bench: Workbench) -> tuple[Sequence[Text], Logits] | None:
        """The texts to check it on besides the reference texts, and their logits in fp32."""
        return bench.exact


@dataclass(frozen=True)
class _Cpu(Builder):
    """Runs the fp32 graphs, or those in int8, on a CPU of this kind."""

    def why_not(self) -> FpabeeError | None:
        try:
            target = self._record({})
            backend_class(target).check(target, target.name)
        except FpabeeError as error:
            return error
        return None

    def build(self, bench: Workbench) -> Target:
        return self._record({})

    def _record(self, files: dict[str, BuiltFile]) -> Target:
        return Target(
            backend=self.backend,
            precision=self.precision,
            graph_precision="fp32",
            versions={self.backend: version_of(self.backend)},
            files=files,
            tolerance=None,
        )


@dataclass(frozen=True)
class _Int8(_Cpu):
    """Graphs that NNCF quantized; heads, and what is not quantized, stay in floating point."""

    def build(self, bench: Workbench) -> Target:
        return self._record(bench.int8_files())

    def judged(self, bench: Workbench) -> tuple[Sequence[Text], Logits] | None:
        """Texts that gave the ranges do not judge the result."""
        from .int8 import gives_ranges

        if bench.exact is None:
            return None
        texts, logits = bench.exact
        places = [place for place in range(len(texts)) if not gives_ranges(place)]
        return [texts[place] for place in places], logits[:, places]


@dataclass(frozen=True)
class _CudaProvider(Builder):
    """ONNX Runtime runs the fp16 graphs on a CUDA device, for which no plan is needed."""

    @property
    def name(self) -> str:
        return f"{super().name}-cuda"

    def why_not(self) -> FpabeeError | None:
        return None

    def build(self, bench: Workbench) -> Target:
        bench.fp16_graphs()
        return Target(backend=ONNXRUNTIME, precision=FP16, device="cuda", tolerance=None)


@dataclass(frozen=True)
class _Plans(Builder):
    """Plans of TensorRT, for the GPU of this machine, or of TensorRT for RTX, for any."""

    def why_not(self) -> FpabeeError | None:
        module = MODULES[self.backend]
        if util.find_spec(module) is None:
            return MissingExtraError(
                f"{module} is not installed", f"pip install 'fpabee[{extra(self.backend)}]'"
            )
        if util.find_spec("polygraphy") is None:  # on a Jetson, TensorRT comes without the extra
            return MissingExtraError("polygraphy is not installed", "pip install polygraphy")
        if self.backend == TENSORRT and cuda_device().error:
            return BackendError(
                f"TensorRT builds on the GPU that runs the plans, and here {cuda_device().error}",
                "build on the device that runs it",
            )
        return None

    def build(self, bench: Workbench) -> Target:
        if self.precision == FP16:
            bench.fp16_graphs()
        target = plans_record(bench.engines, self.backend, self.precision, bench.plans)
        home = bench.place(f"targets/{target.name}")
        files = build_plans(bench.engines, target, bench.plans, home, bench.progress)
        return msgspec.structs.replace(target, files=files)


_RTX_NEEDS = "TensorRT for RTX; no GPU"
_TENSORRT_NEEDS = "TensorRT and the GPU that will run it"

BUILDERS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        _Cpu(OPENVINO, "fp32", "OpenVINO"),
        _Cpu(OPENVINO, "bf16", "OpenVINO and a CPU with bf16 instructions"),
        _Int8(ONNXRUNTIME, "int8", "texts, NNCF and a CPU with VNNI instructions"),
        _Int8(OPENVINO, "int8", "the same, and OpenVINO"),
        _Int8(OPENVINO, "int8-bf16", "the same, and bf16 instructions for the rest"),
        _CudaProvider(ONNXRUNTIME, FP16, "nothing; it runs on a GPU, without plans"),
        _Plans(RTX, FP16, _RTX_NEEDS),
        _Plans(RTX, "fp32", _RTX_NEEDS),
        _Plans(TENSORRT, FP16, _TENSORRT_NEEDS),
        _Plans(TENSORRT, "fp32", _TENSORRT_NEEDS),
    )
}
"""What builds each target, by what one types. `onnxruntime-fp32` comes with every export."""
