"""A double of TensorRT's builder, for machines where TensorRT itself cannot build.

It reads the ONNX file, and checks what TensorRT 10.3 to 11 require: strongly typed networks, a
profile for every input, and a timing cache of the same version.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

from .tensorrt import FakeTensorRt

BuilderFlag = enum.Enum("BuilderFlag", ["TF32"])


class FakeNetwork:
    """A parsed graph."""

    proto: Any = None


class FakeTimingCache:
    """The names of graphs that a version of the library has timed."""

    def __init__(self, content: bytes, version: str) -> None:
        self.version, timed = json.loads(content or json.dumps([version, []]))
        self.timed = set(timed)

    def serialize(self) -> bytes:
        return json.dumps([self.version, sorted(self.timed)]).encode()


class FakeProfile:
    """The shapes of each input."""

    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, typical: Any, high: Any) -> None:
        assert all(isinstance(shape, tuple) for shape in (low, typical, high))
        self.shapes[name] = (low, typical, high)


class FakeConfig:
    """The configuration of a build by a version of the library."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.profiles: list[FakeProfile] = []
        self.flags: set[Any] = {BuilderFlag.TF32}
        self.cache: FakeTimingCache | None = None
        self.hardware_compatibility_level: Any = None
        self.profiling_verbosity: Any = None
        self.max_aux_streams = -1

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> FakeTimingCache | None:
        try:
            return FakeTimingCache(content, self._version)
        except ValueError:
            return None

    def set_timing_cache(self, cache: FakeTimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.version != self._version:
            return False
        self.cache = cache
        return True


class FakeParser:
    """Reads ONNX files."""

    num_errors = 0

    def __init__(self, network: FakeNetwork, logger: Any) -> None:
        self._network = network
        self._error = ""

    def get_error(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: self._error)

    def parse_from_file(self, path: str) -> bool:
        try:
            self._network.proto = onnx.load(path)
        except Exception as error:  # noqa: BLE001 - protobuf's own
            self.num_errors, self._error = 1, str(error)
            return False
        self._network.proto.graph.doc_string = Path(path).stem
        return True


class FakeBuilder:
    """Builds plans.

    Args:
        trt: the module.
        configs: the configuration of every build is added here.
    """

    def __init__(self, trt: FakeTensorRt, configs: list[FakeConfig]) -> None:
        self._trt = trt
        self._configs = configs

    def create_network(self, flags: int) -> FakeNetwork:
        assert flags == 1 << CreationFlag.STRONGLY_TYPED, "a network of version 10 is weakly typed"
        return FakeNetwork()

    def create_builder_config(self) -> FakeConfig:
        return FakeConfig(self._trt.__version__)

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes:
        inputs = {value.name for value in network.proto.graph.input}
        assert config.profiles
        assert all(profile.shapes.keys() == inputs for profile in config.profiles)
        assert config.cache is not None
        name = network.proto.graph.doc_string
        config.cache.timed.add(name)
        self._configs.append(config)
        return f"plan of {name} by the double".encode().ljust(96, b".")


class CreationFlag(enum.IntEnum):
    """As in TensorRT 10.3."""

    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


def builder_parts(configs: list[FakeConfig]) -> dict[str, Any]:
    """The names in a module that building uses, as in TensorRT 10.3."""
    return {
        "NetworkDefinitionCreationFlag": CreationFlag,
        "BuilderFlag": BuilderFlag,
        "HardwareCompatibilityLevel": enum.Enum("HardwareCompatibilityLevel", ["AMPERE_PLUS"]),
        "OnnxParser": FakeParser,
        "configs": configs,
    }
