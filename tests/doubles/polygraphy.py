"""A double of Polygraphy's runner, which runs the graphs behind plans with ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fpabee.exporter.targets.plans import profile_of
from fpabee.runtime.backends.onnxruntime import cpu_session

from .tensorrt import Plan


def serve_polygraphy(
    patch: pytest.MonkeyPatch, find: Callable[[bytes], Plan | None], difference: float
) -> None:
    """Let the double be imported.

    Args:
        patch: undoes it.
        find: finds a plan by its bytes.
        difference: is added to the logits.
    """

    class Runner:
        """`TrtRunner`, as far as it is used."""

        def __init__(
            self, engine: Plan, optimization_profile: int, allocation_strategy: str
        ) -> None:
            assert allocation_strategy == "runtime"
            self._plan, self._profile = engine, engine.profiles[optimization_profile]
            self._outputs: dict[str, Any] = {}

        def __enter__(self) -> Runner:
            self._session = cpu_session(self._plan.onnx.read_bytes())
            return self

        def infer(self, feed: dict[str, Any]) -> dict[str, Any]:
            for spec in self._plan.graph.inputs:
                low, _, high = profile_of(spec, self._profile)
                shape = feed[spec.name].shape
                assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            names = [output.name for output in self._session.get_outputs()]
            values = self._session.run(names, feed)
            self._outputs = dict(zip(names, values, strict=True))
            self._outputs["logits"] += np.float32(difference)
            return self._outputs

        def __exit__(self, *error: object) -> None:
            for output in self._outputs.values():  # the memory is used again
                output.fill(-1)

    modules: dict[str, dict[str, Any]] = {
        "polygraphy": {},
        "polygraphy.exception": {"PolygraphyException": RuntimeError},
        "polygraphy.backend": {},
        "polygraphy.backend.common": {"BytesFromPath": lambda path: Path(path).read_bytes()},
        "polygraphy.backend.trt": {"EngineFromBytes": find, "TrtRunner": Runner},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
