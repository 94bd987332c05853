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

from ...calibration.progress import Progress
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import ENGINES_CONTENT, BuiltFile, Graph, Target
from ...runtime.backends.cuda import packages
from ...runtime.backends.tensorrt import MODULES
from ...runtime.check import Logits
from ...runtime.encoding import Text
from ...runtime.errors import BackendError, FpabeeError, InputError, MissingExtraError
from ...runtime.machine import cuda_device, require
from ...runtime.targets import backend_class
from ..staging import replacing, unique_name
from .backends import ONNXRUNTIME, OPENVINO, RTX, TENSORRT, version_of
from .check import exact_logits
from .plans import PlanOptions
from .tensorrt import build_plans, plans_record

FP16 = "fp16"
INT8 = "int8"
INT8_FOLDER = f"targets/{INT8}"
"""The place in an engines folder of the int8 graphs, which several targets run."""

# Every other one of the first texts gives int8 ranges, up to so many.
_LEAST_TEXTS = 32
_MOST_RANGES = 256


class Workbench:
    """The settings and intermediate results that the builds of one call share.

    Args:
        engines: the folder, as it is written.
        texts: texts like those to classify; may be empty.
        plans: how TensorRT plans are built.
        progress: called with (what, done, total).
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
        self._graphs: dict[str, dict[str, Graph] | FpabeeError] = {}
        self._folders: set[Path] = set()

    @cached_property
    def exact(self) -> tuple[list[Text], Logits] | None:
        """The first 2,000 texts and their fp32 logits, see `exact_logits`; None without texts."""
        return exact_logits(self.engines, self.texts, self.progress) if self.texts else None

    def graphs(self, precision: str) -> dict[str, Graph]:
        """New graphs in a precision, which are made once for all targets.

        Args:
            precision: `fp16` or `int8`.

        Returns:
            The records of the graphs, by name.

        Raises:
            FpabeeError: they cannot be made, or change too many answers. This, too, is found once.
        """
        if precision not in self._graphs:
            try:
                self._graphs[precision] = self._make_graphs(precision)
            except FpabeeError as error:
                self._graphs[precision] = error
        graphs = self._graphs[precision]
        if isinstance(graphs, FpabeeError):
            raise graphs
        return graphs

    def _make_graphs(self, precision: str) -> dict[str, Graph]:
        """Make and write the graphs, see `graphs`."""
        if precision == INT8:
            require("quantize")
            from .int8 import quantize

            ranges = [text for number, text in enumerate(self.texts) if gives_ranges(number)]
            return self._write(INT8_FOLDER, quantize(self.engines, ranges, self.progress))
        require("graphs")
        from .fp16 import lowered_graphs

        protos = lowered_graphs(self.engines, self.exact, self.progress)
        return self._write(f"onnx/{precision}", protos)

    def _write(self, relative: str, protos: Mapping[str, Any]) -> dict[str, Graph]:
        """Write graphs under names of their own, so that what the manifest names stays true.

        Args:
            relative: the folder for them, in the engines folder.
            protos: each an `onnx.ModelProto`, by the name of the graph.

        Returns:
            Their records, by name.

        Raises:
            ModelError: a graph is larger than protobuf allows.
        """
        from ..onnx_file import write_graph

        graphs = {}
        with replacing(self.folder(relative)) as new:
            for name, proto in protos.items():
                graph = write_graph(new / name, "", proto)
                file = unique_name(name, graph.sha256, ".onnx")
                (new / name).rename(new / file)
                graphs[name] = msgspec.structs.replace(graph, file=f"{relative}/{file}")
        return graphs

    def folder(self, relative: str) -> Path:
        """A folder in the engines folder for files of targets, which exists from now on."""
        folder = self.engines.path / relative
        folder.mkdir(parents=True, exist_ok=True)
        self._folders.add(folder)
        return folder

    def drop_unused_files(self) -> None:
        """Delete our graphs and plans that the manifest does not name, where files were written."""
        root = self.engines.path
        named = {root / file for file, _ in self.engines.hashes()}
        for folder in self._folders:
            for path in (*folder.glob("*.onnx"), *folder.glob("*.plan")):
                is_ours = ENGINES_CONTENT.fullmatch(path.relative_to(root).as_posix())
                if path not in named and is_ours:
                    path.unlink()
            for empty in (folder, folder.parent):
                if not any(empty.iterdir()):
                    empty.rmdir()


def check_enough_texts(count: int, what: str = "different texts") -> None:
    """Refuse to quantize with too few texts.

    Args:
        count: how many there are.
        what: what messages call them.

    Raises:
        InputError: how many are needed.
    """
    if count < _LEAST_TEXTS:
        raise InputError(
            f"int8 needs at least {_LEAST_TEXTS} {what}, but there are {count}",
            "give a few hundred texts like those to classify as `texts`",
        )


def gives_ranges(number: int) -> bool:
    """Whether the text of a number, from 0, gives int8 ranges; the others check the result."""
    return number < 2 * _MOST_RANGES and number % 2 == 0


@dataclass(frozen=True)
class Builder(ABC):
    """Builds one target.

    Attributes:
        backend: the library that runs it.
        precision: the precision in which it runs.
        needs: what it needs to be built and run, briefly, for the list of targets.
        device: what it is for, if that is part of its name.
    """

    backend: str
    precision: str
    needs: str
    device: str = ""

    @property
    def name(self) -> str:
        """The name to build it by. Plans of TensorRT then also have the name of their GPU."""
        return "-".join(filter(None, (self.backend, self.precision, self.device)))

    @abstractmethod
    def why_not(self) -> FpabeeError | None:
        """Why this machine cannot build it; None: it can."""

    def quantizes(self, engines: EnginesFolder, texts: Sequence[Text]) -> bool:
        """Whether graphs of a folder are quantized with some texts to build it."""
        return False

    @abstractmethod
    def build(self, bench: Workbench) -> tuple[EnginesFolder, Target]:
        """Build it.

        Returns:
            The folder with the graphs that it runs, which is not written, and without targets that
            other graphs were built into; and the record of the target, without what is measured.

        Raises:
            FpabeeError: it cannot be built from this folder.
        """

    def more_texts(self, bench: Workbench) -> tuple[Sequence[Text], Logits] | None:
        """The texts to check it on besides the reference texts, and their logits in fp32."""
        return bench.exact


@dataclass(frozen=True)
class _Cpu(Builder):
    """Runs the fp32 graphs on the CPU, perhaps in a lower precision."""

    def why_not(self) -> FpabeeError | None:
        try:
            target = self._record({})
            backend_class(target).check(target, target.name)
        except FpabeeError as error:
            return error
        return None

    def build(self, bench: Workbench) -> tuple[EnginesFolder, Target]:
        return bench.engines, self._record({})

    def _record(self, files: dict[str, BuiltFile]) -> Target:
        """The record of the target.

        Args:
            files: what was built, by the name of the graph; empty: it runs the fp32 graphs.

        Raises:
            FpabeeError: the library cannot run on this machine.
        """
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
    """Runs graphs that NNCF quantized; heads, and what is not quantized, stay in floating point.

    The graphs are made from texts. Without texts, they are those of another target of the folder.
    """

    def quantizes(self, engines: EnginesFolder, texts: Sequence[Text]) -> bool:
        return bool(texts) or not _int8_files(engines)

    def build(self, bench: Workbench) -> tuple[EnginesFolder, Target]:
        engines = bench.engines
        if not self.quantizes(engines, bench.texts):
            return engines, self._record(_int8_files(engines))
        files = {
            name: BuiltFile(
                file=graph.file,
                sha256=graph.sha256,
                onnx_sha256=engines.manifest.graphs[name].sha256,
            )
            for name, graph in bench.graphs(INT8).items()
        }
        return engines, self._record(files)

    def more_texts(self, bench: Workbench) -> tuple[Sequence[Text], Logits] | None:
        """Texts that gave the ranges do not check the result."""
        if bench.exact is None:
            return None
        texts, logits = bench.exact
        numbers = [number for number in range(len(texts)) if not gives_ranges(number)]
        return [texts[number] for number in numbers], logits[:, numbers]


def _int8_files(engines: EnginesFolder) -> dict[str, BuiltFile]:
    """The int8 graphs of a folder, by name; empty if it has none."""
    for target in engines.manifest.targets.values():
        if target.precision.startswith(INT8) and target.files:
            return target.files
    return {}


@dataclass(frozen=True)
class _CudaProvider(Builder):
    """ONNX Runtime runs the fp16 graphs on a CUDA device, for which no plan is needed."""

    def why_not(self) -> FpabeeError | None:
        try:
            require("graphs")
        except FpabeeError as error:
            return error
        return None

    def build(self, bench: Workbench) -> tuple[EnginesFolder, Target]:
        engines = _with_fp16_graphs(bench)
        target = Target(
            backend=self.backend, precision=self.precision, device=self.device, tolerance=None
        )
        return engines, target


@dataclass(frozen=True)
class Plans(Builder):
    """Plans of TensorRT, for the GPU of this machine, or of TensorRT for RTX, for any."""

    def why_not(self) -> FpabeeError | None:
        """A library that is missing, or the GPU; see `Builder`."""
        module = MODULES[self.backend]
        if util.find_spec(module) is None:
            return MissingExtraError(
                f"{module} is not installed", f"pip install {packages(self.backend)}"
            )
        if util.find_spec("polygraphy") is None:  # on a Jetson, TensorRT comes without the extra
            return MissingExtraError("polygraphy is not installed", "pip install polygraphy")
        if self.backend == TENSORRT and cuda_device().error:
            return BackendError(
                f"TensorRT builds on the GPU that runs the plans, and here {cuda_device().error}",
                "build on the device that runs it",
            )
        return None

    def build(self, bench: Workbench) -> tuple[EnginesFolder, Target]:
        """Build a plan of each graph; see `Builder`."""
        engines = _with_fp16_graphs(bench) if self.precision == FP16 else bench.engines
        target = plans_record(engines, self.backend, self.precision, bench.plans)
        home = bench.folder(f"targets/{target.name}")
        files = build_plans(engines, target, bench.plans, home, bench.progress)
        return engines, msgspec.structs.replace(target, files=files)


def _with_fp16_graphs(bench: Workbench) -> EnginesFolder:
    """The folder with graphs in fp16, without plans that were built from other graphs.

    Graphs that the folder has are made again if there are texts, to check them on these.

    Raises:
        FpabeeError: the graphs cannot be made, or change too many answers.
    """
    engines = bench.engines
    if FP16 in engines.manifest.precisions and not bench.texts:
        return engines
    precisions = {**engines.manifest.precisions, FP16: bench.graphs(FP16)}
    changed = engines.with_manifest(precisions=precisions)

    def is_current(_: str, target: Target) -> bool:
        sources = changed.manifest.graphs_of(target)
        files = target.files.items()
        return all(file.onnx_sha256 == sources[name].sha256 for name, file in files)

    return changed.keep_targets(is_current)


BUILDERS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        _Cpu(OPENVINO, "fp32", "OpenVINO"),
        _Cpu(OPENVINO, "bf16", "OpenVINO, a CPU with bf16"),
        _Int8(ONNXRUNTIME, INT8, "texts, NNCF, a CPU with VNNI"),
        _Int8(OPENVINO, INT8, "texts, NNCF, VNNI, OpenVINO"),
        _Int8(OPENVINO, f"{INT8}-bf16", "texts, NNCF, VNNI, OpenVINO, bf16"),
        _CudaProvider(ONNXRUNTIME, FP16, "the package onnx; it runs on a GPU", "cuda"),
        Plans(RTX, FP16, "TensorRT for RTX"),
        Plans(TENSORRT, FP16, "TensorRT and its GPU"),
    )
}
"""The builder of each target, by its name. `onnxruntime-fp32` comes with every export."""

OPENVINO_TARGETS = ("openvino-fp32", "openvino-bf16")
"""The targets that need no files of their own."""

INT8_TARGETS = ("onnxruntime-int8", "openvino-int8", "openvino-int8-bf16")

FP16_TARGETS = ("onnxruntime-fp16-cuda", "tensorrt-rtx-fp16", "tensorrt-fp16")


def builder_of(name: str) -> Builder:
    """The builder of a target.

    Raises:
        InputError: nothing builds a target of this name.
    """
    if name not in BUILDERS:
        here = ", ".join(buildable([*BUILDERS]))
        raise InputError(f"there is no target {name!r} to build", f"this machine can build {here}")
    return BUILDERS[name]


def buildable(names: Sequence[str]) -> list[str]:
    """Those of some targets that this machine can build.

    If it can build none, the first one is returned, so that its refusal says why.
    """
    here = [name for name in names if BUILDERS[name].why_not() is None]
    return here or [names[0]]


def check_buildable(names: Sequence[str]) -> None:
    """Refuse targets of which this machine can build none.

    Raises:
        FpabeeError: why it cannot build the first one.
    """
    problem = BUILDERS[buildable(names)[0]].why_not()
    if problem is not None:
        raise problem
