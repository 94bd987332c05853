"""OpenVINO: what is missing on a machine, and its cache of compiled graphs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fpabee.runtime import read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import compiled_cache, openvino
from fpabee.runtime.backends.buffers import Bucket
from fpabee.runtime.engine import Engine
from fpabee.runtime.errors import BackendError, first_line
from fpabee.runtime.targets import open_backend

from ...closeness import assert_exported
from ...doubles.openvino import add_openvino

pytest.importorskip("openvino")

TEXTS = ["the plot is not good but the music is", "turn the lights on"]
TARGET = "openvino-fp32"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fpabee" / "compiled"


@pytest.fixture
def folder(engine_copy: Callable[..., Path], cache: Path) -> Path:
    path = engine_copy()
    add_openvino(path, "fp32")
    return path


def check(folder: Path) -> None:
    with Engine.load(folder, TARGET) as engine:
        engine.check()


@pytest.mark.parametrize(
    ("version", "devices", "message"),
    [
        (None, None, "not installed"),
        ("2024.6.0-17404-4c0f47d2335", ["CPU"], "too old"),
        ("2026.4.1", ["GPU"], "no CPU plugin"),
        ("2026.4.1", None, "cannot be loaded"),
    ],
)
def test_an_openvino_that_cannot_be_used_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    devices: list[str] | None,
    message: str,
) -> None:
    core = Mock(side_effect=None if devices else RuntimeError("plugins.xml is missing\nand more"))
    core.return_value.available_devices = devices
    module = SimpleNamespace(__version__=version, Core=core, __spec__="any") if version else None
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setattr(openvino, "_core", openvino._core.__wrapped__)
    with pytest.raises(BackendError, match=rf"{message}.*\[openvino\]"):
        Engine.load(folder, TARGET)


@pytest.mark.parametrize("is_read_only", [False, True])
def test_the_next_process_loads_from_the_cache(
    is_read_only: bool, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written into the engines folder."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    check(folder)
    files = sorted(cache.iterdir())
    assert len(files) == len(read_manifest(folder).graphs)
    refuse = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    if is_read_only:
        monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(openvino.OpenVinoBackend, "_compile", refuse)
    check(folder)
    assert sorted(cache.iterdir()) == files
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        lambda content: bytes(50) + zlib.crc32(bytes(50)).to_bytes(4, "big"),
    ],
    ids=["empty", "cut", "changed", "with a right checksum"],
)
def test_a_damaged_cache_is_written_again(
    folder: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    check(folder)
    files = sorted(cache.iterdir())
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    check(folder)
    assert sorted(cache.iterdir()) == files
    for path in files:
        content = path.read_bytes()[:-4]
        checksum = path.read_bytes()[-4:]
        assert len(content) > 1000
        assert checksum == zlib.crc32(content).to_bytes(4, "big")


@pytest.mark.parametrize("lacking", ["a folder", "a home directory", "what can be exported"])
def test_without_a_cache_everything_runs(
    lacking: str, folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if lacking == "a folder":
        (tmp_path / "file").touch()  # where no folder can be made, even by root
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif lacking == "a home directory":  # as some users of containers
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        refuse = Mock(side_effect=RuntimeError("cannot be exported"))
        monkeypatch.setattr("openvino.CompiledModel.export_model", refuse)
    check(folder)
    assert not cache.exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("place", "problem", "says"),
    [
        ("openvino.OpenVinoBackend.bind", RuntimeError("src: bad_alloc"), "enough free memory"),
        (
            "openvino.OpenVinoBackend.bind",
            RuntimeError("src: odd"),
            "export or convert the model again",
        ),
        ("host._aligned", MemoryError(), r"no room for \w+ of shape \(1, .*enough free memory"),
    ],
)
def test_a_segment_that_cannot_be_prepared_is_one_error(
    place: str, problem: Exception, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(folder, TARGET) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(f"fpabee.runtime.backends.{place}", Mock(side_effect=problem))
            with pytest.raises(BackendError, match=says):
                engine.predict(TEXTS[:1])
        engine.check()


def test_the_reason_of_an_error_is_said() -> None:
    """OpenVINO begins with where in its source the error was noticed."""
    import openvino as ov

    model = ov.Tensor(np.zeros(50, np.uint8))
    with pytest.raises(RuntimeError, match=r"^Exception from src") as error:
        ov.Core().import_model(model, "CPU", {})
    assert first_line(error.value).startswith("[CPU] ")


def test_a_process_may_change_its_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with Engine.load(folder.name, TARGET) as engine:
        monkeypatch.chdir("/")
        engine.check()


def test_a_cache_that_is_full_loses_its_oldest_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_cache, "_MOST_BYTES", 30)
    for number in range(4):
        compiled_cache.write(f"key{number}", b"content...")
    assert compiled_cache.read("key0") is None
    found = compiled_cache.read("key3")
    assert found is not None
    assert bytes(found) == b"content..."


def test_another_instruction_set_or_version_is_another_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        backend: Any = open_backend(EnginesFolder.read(folder), TARGET, None)
        return str(backend._key("0" * 64))

    first = key()
    assert key() == first
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "cpu_info", lambda: {"flags": "avx2"})
        assert key() != first
    monkeypatch.setattr("openvino.__version__", "2027.0.0")
    assert key() != first


def test_an_openvino_without_its_package_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version("openvino")
    monkeypatch.setattr(metadata, "version", lambda _: 1 / 0)
    assert openvino.openvino_version() == version


@pytest.mark.skipif(not openvino.has_bf16(), reason="this CPU has no bf16")
def test_hidden_states_are_handed_on_in_bf16(folder: Path) -> None:
    add_openvino(folder, "bf16")
    backend: Any = open_backend(EnginesFolder.read(folder), "openvino-bf16", None)
    model = backend.graph("segment_02").model
    assert model.input("hidden_states").element_type.get_type_name() == "bf16"
    assert model.output("next_hidden_states").element_type.get_type_name() == "bf16"
    backend.close()


@pytest.mark.parametrize(
    ("flags", "known", "expected"),
    [
        ("avx512_bf16 amx_tile", True, {"SNIPPETS_MODE": "DISABLE"}),
        ("avx512_bf16", True, {}),
        ("avx512_bf16 amx_tile", False, {}),
    ],
)
def test_attention_is_one_kernel_unless_its_parts_are_faster(
    flags: str, known: bool, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": flags})
    if not known:
        refusal = RuntimeError("Unsupported property SNIPPETS_MODE by CPU plugin.")
        core = SimpleNamespace(compile_model=Mock(side_effect=refusal))
        monkeypatch.setattr(openvino, "_core", lambda: core)
    assert openvino._unfused.__wrapped__() == expected


def test_two_processes_may_compile_at_the_same_time(folder: Path, cache: Path) -> None:
    code = (
        "import sys; from fpabee.runtime.engine import Engine\n"
        f"print(Engine.load(sys.argv[1], {TARGET!r}).check().passed)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert process.communicate() == ("True\n", "")
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_shared_block_is_compiled_once_and_late_segments_when_needed(
    engine_copy: Callable[..., Path], cache: Path
) -> None:
    folder = engine_copy("albert", "albert")
    add_openvino(folder, "fp32")
    with Engine.load(folder, TARGET, check=False) as engine:
        engine.predict(TEXTS, max_exit=1)
        first = set(engine.core.backend._loaded)
        assert first < set(engine.manifest.graphs)
        engine.predict(TEXTS, full_depth=True)
        blocks = [name for name in engine.manifest.segments[1].calls if name in first]
        assert len(blocks) == 1


def test_lengths_and_rows_are_padded_to_few_sizes(folder: Path) -> None:
    assert openvino.padded_sizes(20, 8, 512) == (8, 16, 20)
    assert openvino.padded_sizes(21, 1, 16) == (*range(1, 17), 18, 20, 21)
    steps = openvino.padded_sizes(8192, 8, 512)
    assert (steps[:3], steps[-1]) == ((8, 16, 24), 8192)
    assert len(steps) < 100
    assert max(after / before for before, after in pairwise(steps[7:])) <= 1.125
    with Engine.load(folder, TARGET) as engine:
        assert [engine.core.limits.bucket(rows, 8).batch for rows in (8, 17, 33)] == [8, 18, 36]
        alone = [engine.predict([text], full_depth=True)[0] for text in TEXTS]
        for number, answer in enumerate(engine.predict(TEXTS * 9 + TEXTS[:1], full_depth=True)):
            assert_exported(answer.logits, alone[number % 2].logits)


@pytest.mark.parametrize(
    ("flags", "length", "in_group"),
    [("avx2", 24, 20), ("avx2 amx_tile", 32, 24)],
    ids=["without AMX", "with AMX"],
)
def test_short_rows_are_padded_as_the_cpu_runs_them_fastest(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    length: int,
    in_group: int,
) -> None:
    add_openvino(folder, "int8")  # it runs the fp32 graphs, so that answers can be compared
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": flags})
    texts = ["the plot " * 8, "the music " * 8]
    with Engine.load(folder, "openvino-int8") as engine:
        assert engine.core.limits.bucket(1, 18, alone=True) == Bucket(1, length)
        assert engine.core.limits.bucket(1, 18) == Bucket(1, in_group)
        assert engine.core.limits.bucket(1, 33) == Bucket(1, 40)
        expected = engine.trace(texts).logits
        for number, text in enumerate(texts):
            found = engine.trace([text])
            assert found.lengths.tolist() == [18]
            assert_exported(found.logits[:, 0], expected[:, number])
