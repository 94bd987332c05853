"""The packed graph as one TensorRT plan, and what an application must know of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import onnx_ir as ir

from ...runtime.artifact.folder import sha256_of
from ...runtime.artifact.manifest import Shapes, Target, TensorSpec
from ..targets.backends import RTX
from ..targets.plan_worker import PlanRequest
from ..targets.plans import profile_of
from ..targets.tensorrt import build_in_worker

PLAN = "model.plan"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan, as `fpabee.json` describes it.

    Attributes:
        file: its name.
        sha256: its hash.
        onnx: the name of the graph that it was built from.
        onnx_sha256: the hash of that graph.
        versions: of the library that built it, and that can run it.
        compute_capabilities: the GPUs that it is for.
        built_on: the GPU that built it, as in `Target`; unset with TensorRT for RTX.
        shapes: the smallest, typical and largest number of rows and tokens.
        inputs: what it reads: tokens, and the settings of the rule.
        outputs: what it gives.
    """

    file: str
    sha256: str
    onnx: str
    onnx_sha256: str
    versions: dict[str, str]
    compute_capabilities: tuple[str, ...]
    built_on: str | msgspec.UnsetType = msgspec.UNSET
    shapes: Shapes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build_plan(model: ir.Model, graph: Path, target: Target) -> Plan:
    """Build a plan beside its graph.

    Args:
        model: the graph.
        graph: the file that holds it.
        target: the record of a target of plans, see `plans_record`. Its profiles become one, so
            that an application need not choose between them.

    Raises:
        BackendError: it could not be built.
    """
    first = target.profiles[0]
    longest = max(shapes.sequence.max for shapes in target.profiles)
    sequence = msgspec.structs.replace(first.sequence, max=longest)
    shapes = Shapes(batch=first.batch, sequence=sequence)
    inputs = _specs(model.graph.inputs)
    path = graph.with_name(PLAN)
    with TemporaryDirectory() as temporary:
        request = PlanRequest(
            onnx=str(graph),
            plan=str(path),
            timing_cache=str(Path(temporary, "timing.cache")),
            profiles=[{spec.name: profile_of(spec, shapes) for spec in inputs}],
            compute_capabilities=target.compute_capabilities if target.backend == RTX else (),
        )
        build_in_worker(request, target, path.name)
    return Plan(
        file=path.name,
        sha256=sha256_of(path),
        onnx=graph.name,
        onnx_sha256=sha256_of(graph),
        versions=target.versions,
        compute_capabilities=target.compute_capabilities,
        built_on=target.built_on,
        shapes=shapes,
        inputs=inputs,
        outputs=_specs(model.graph.outputs),
    )


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """The names, types and shapes of inputs or outputs."""
    described = []
    for value in values:
        assert value.dtype is not None
        assert value.shape is not None
        sizes = [size if isinstance(size, int) else size.value for size in value.shape]
        described.append({"name": value.name, "dtype": value.dtype.numpy().name, "shape": sizes})
    return msgspec.convert(described, tuple[TensorSpec, ...])
