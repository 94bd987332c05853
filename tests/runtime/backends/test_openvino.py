"""OpenVINO: what is missing on a machine, and its cache of compiled graphs."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import Budget, read_manifest
from fpabee.runtime.backends import compiled_cache, openvino
from fpabee.runtime.backends.base import Bucket
from fpabee.runtime.backends.host import HostBackend
from fpabee.runtime.engine import Engine
from fpabee.runtime.errors import BackendError, MissingExtraError, first_line
from fpabee.runtime.groups import Group
from fpabee.runtime.targets import open_backend

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


@pytest.fixture
def fresh_core() -> Iterator[None]:
    """The next call looks for OpenVINO again."""
    openvino._core.cache_clear()
    yield
    openvino._core.cache_clear()


def check(folder: Path) -> None:
    with Engine.load(folder, TARGET) as engine:
        engine.check()


def test_without_openvino_the_error_names_the_extra(
    folder: Path, fresh_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match="not installed") as error:
        Engine.load(folder, TARGET)
    assert "fpabee[openvino]" in error.value.hint


@pytest.mark.parametrize(
    ("version", "devices", "message"),
    [
        ("2024.6.0-17404-4c0f47d2335", ["CPU"], "too old"),
        ("2026.4.1", ["GPU"], "no CPU plugin"),
        ("2026.4.1", None, "cannot be loaded"),
    ],
)
def test_an_openvino_that_cannot_be_used_is_refused(
    folder: Path,
    fresh_core: None,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    devices: list[str] | None,
    message: str,
) -> None:
    def core() -> SimpleNamespace:
        if devices is None:
            raise RuntimeError("plugins.xml is missing\nand more")
        return SimpleNamespace(available_devices=devices)

    monkeypatch.setitem(
        sys.modules, "openvino", SimpleNamespace(__version__=version, Core=core, __spec__="any")
    )
    with pytest.raises(BackendError, match=message) as error:
        Engine.load(folder, TARGET)
    assert "fpabee[openvino]" in error.value.hint


def test_a_cpu_without_bf16_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_openvino(folder, "bf16")
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": "avx2 avx512f"})
    with pytest.raises(BackendError, match="bf16 instructions") as error:
        Engine.load(folder, "openvino-bf16")
    assert "openvino-fp32" in error.value.hint


def test_the_next_process_loads_from_the_cache(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(folder)
    files = sorted(cache.iterdir())
    assert len(files) == len(read_manifest(folder).graphs)

    def refuse(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(openvino.OpenVinoBackend, "_compile", refuse)
    check(folder)
    assert sorted(cache.iterdir()) == files


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
        found = compiled_cache.read(path.name)
        assert found is not None
        assert len(found) > 1000


def test_without_a_cache_everything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # where no folder can be made, even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check(folder)


def test_without_a_home_directory_everything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users of containers may have no entry in the list of users."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    check(folder)
    assert not (tmp_path / "~").exists()


def test_a_cache_that_can_only_be_read_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(folder)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(openvino.OpenVinoBackend, "_compile", lambda *_: 1 / 0)
    check(folder)


@pytest.mark.parametrize(
    ("problem", "hint"), [("bad_alloc", "enough free memory"), ("odd", "export the model again")]
)
def test_a_request_that_cannot_be_made_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problem: str, hint: str
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(f"Exception from src/inference: {problem}")

    with Engine.load(folder, TARGET) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(openvino.OpenVinoBackend, "bind", refuse)
            with pytest.raises(BackendError, match="OpenVINO failed in segment 1 on 1") as error:
                engine.predict(TEXTS[:1])
        assert hint in error.value.hint
        engine.check()


def test_the_reason_of_an_error_is_said() -> None:
    """OpenVINO begins with where in its source the error was noticed."""
    import openvino as ov

    model = ov.Tensor(np.zeros(50, np.uint8))
    with pytest.raises(RuntimeError, match=r"^Exception from src") as error:
        ov.Core().import_model(model, "CPU", {})
    assert first_line(error.value).startswith("[CPU] Cannot import compiled blob")


def test_lack_of_memory_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    with Engine.load(folder, TARGET) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("fpabee.runtime.backends.host._aligned", refuse)
            with pytest.raises(BackendError, match=r"no room for \w+ of shape \(1, ") as error:
                engine.predict(TEXTS[:1])
        assert "enough free memory" in error.value.hint
        engine.check()


def test_a_graph_that_cannot_be_kept_runs(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> bytes:
        raise RuntimeError("cannot be exported")

    monkeypatch.setattr(openvino, "_exported", refuse)
    check(folder)
    assert not cache.exists()


def test_a_process_may_change_its_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with Engine.load(folder.name, TARGET) as engine:
        monkeypatch.chdir("/")
        engine.check()


def test_an_engines_folder_is_only_read(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    check(folder)
    folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


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
        backend: Any = open_backend(folder, read_manifest(folder), TARGET, None)
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
    backend: Any = open_backend(folder, read_manifest(folder), "openvino-bf16", None)
    model = backend.graph("segment_02").model
    assert model.input("hidden_states").element_type.get_type_name() == "bf16"
    assert model.output("next_hidden_states").element_type.get_type_name() == "bf16"
    backend.close()


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


def test_threads_share_an_engine(folder: Path) -> None:
    with Engine.load(folder, TARGET, threads=1) as engine:
        expected = engine.trace(TEXTS).logits
        model = engine._backend.graph("segment_01").model
        assert [model.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")] == [
            1,
            1,
        ]
        with ThreadPoolExecutor(4) as pool:
            traces = list(pool.map(engine.trace, [TEXTS] * 80))
    for trace in traces:
        assert abs(trace.logits - expected).max() <= 1e-5


def test_a_shared_block_is_compiled_once_and_late_segments_when_needed(
    engine_copy: Callable[..., Path], cache: Path
) -> None:
    folder = engine_copy("albert", "albert")
    add_openvino(folder, "fp32")
    with Engine.load(folder, TARGET) as engine:
        engine.predict(TEXTS, max_exit=1)
        first = set(engine._backend._loaded)
        assert first < set(engine.manifest.graphs)
        engine.predict(TEXTS, full_depth=True)
        blocks = [name for name in engine.manifest.segments[1].calls if name in first]
        assert len(blocks) == 1


def test_lengths_are_multiples_of_eight_and_few_for_long_texts() -> None:
    assert openvino.steps(20, 8, 512) == (8, 16, 20)
    steps = openvino.steps(8192, 8, 512)
    assert steps[:3] == (8, 16, 24)
    assert steps[-1] == 8192
    assert len(steps) < 100
    wider = [after / before for before, after in pairwise(steps[7:])]
    assert max(wider) <= 1.125


def test_rows_are_padded_to_few_batch_sizes(folder: Path) -> None:
    assert openvino.steps(21, 1, 16) == (*range(1, 17), 18, 20, 21)
    with Engine.load(folder, TARGET) as engine:
        limits = engine._backend.limits()
        assert [limits.bucket(rows, 8).batch for rows in (8, 17, 33)] == [8, 18, 36]
        alone = [engine.predict([text], full_depth=True)[0].logits for text in TEXTS]
        for number, prediction in enumerate(engine.predict(TEXTS * 9 + TEXTS[:1], full_depth=True)):
            assert prediction.logits == pytest.approx(alone[number % 2], abs=1e-5)


@pytest.mark.parametrize(("flags", "length"), [("avx2", 24), ("avx2 amx_tile", 32)])
def test_with_amx_a_row_alone_is_padded_to_multiples_of_16(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: str, length: int
) -> None:
    add_openvino(folder, "int8")  # it runs the fp32 graphs, so that answers can be compared
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": flags})
    texts = ["the plot " * 8, "the music " * 8, "the"]
    with Engine.load(folder, "openvino-int8") as engine:
        rows, runner = engine.encode(texts), engine.runner(Budget(exit=3))
        assert len(rows[0]) == 18
        expected = engine.trace(texts, rule=Budget(exit=3)).logits[1]
        with engine.chain() as chain:
            assert chain.limits.bucket(1, 18) == Bucket(1, 24)
            groups = [
                Group.of(np.array([number]), [row], runner, math.inf, engine.limits)
                for number, row in enumerate(rows)
            ]
            for group in groups:
                chain.step(group)
            joined, *others = groups
            assert joined.hidden is not None
            assert joined.hidden.bucket == Bucket(1, length)
            # Rows that were alone are joined in a shape that may be shorter.
            monkeypatch.setattr(HostBackend, "joins", True)
            chain.join(joined, others)
            assert joined.hidden.bucket == Bucket(3, 24)
            found = chain.step(joined)
        assert found is not None
        assert found.logits == pytest.approx(expected, abs=1e-5)
        alone = [engine.predict([text], full_depth=True)[0].logits for text in texts]
        together = engine.predict(texts, full_depth=True)
    assert [one.logits for one in together] == [pytest.approx(one, abs=1e-5) for one in alone]
