"""The model repository for Triton, and its model over a double of Triton's Python module."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest

from fpabee.runtime import BackendError, Engine, FPabee
from fpabee.runtime.artifact.folder import read_manifest, write_manifest
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.triton import write_repository

from ...doubles import triton as double
from ..running import Run, check_refused
from ..test_engine import TEXTS as _TEXTS

TEXTS = [text for text in _TEXTS if isinstance(text, str)]
PAIRS = [f"{text} music" for text in TEXTS]


def config_of(folder: Path) -> str:
    return (folder / "config.pbtxt").read_text("utf-8")


def parameters_of(folder: Path) -> dict[str, str]:
    found = re.findall(
        r'parameters { key: "(\w+)" value { string_value: (".*") }', config_of(folder)
    )
    return {key: json.loads(value) for key, value in found}


@contextmanager
def loaded(folder: Path, **args: str) -> Iterator[Any]:
    """The model in a folder, as Triton would make it."""
    module = importlib.import_module("fpabee.runtime.serving.triton_model")
    model = module.TritonPythonModel()
    settings = {key: {"string_value": value} for key, value in parameters_of(folder).items()}
    model.initialize(
        {
            "model_config": json.dumps({"parameters": settings}),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_kind": "CPU",
            **args,
        }
    )
    yield model
    model.finalize()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    double.install(monkeypatch)


def test_the_command_writes_a_repository(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    serve: Run,
    tmp_path: Path,
) -> None:
    engines, repository = engine_copy(), tmp_path / "repository"
    set_points(engines, fast=FPabee(threshold=3.0))
    (engines / "calibration").mkdir()
    options = ["--operating-point", "fast", "--threads", "2", "--max-rows", "9"]

    done = serve(engines, "--triton", repository, "--name", "intents", *options)

    folder = repository / "intents"
    assert (done.code, done.err) == (0, f"wrote {folder}\n")
    copied = {path.name for path in (folder / "1" / "engines").iterdir()}
    assert copied == {path.name for path in engines.iterdir()} - {"calibration"}
    assert parameters_of(folder) == {
        "target": "onnxruntime-fp32",
        "operating_point": "fast",
        "threads": "2",
        "max_rows": "9",
    }
    assert "max_batch_size: 9\n" in config_of(folder)
    assert 'output { name: "SCORE" data_type: TYPE_FP32 dims: 1 }' in config_of(folder)
    assert "kind: KIND_CPU" in config_of(folder)
    check_refused(
        serve(engines, "--triton", repository, "--name", "intents"), "already exists", "--name"
    )


def test_a_target_on_a_gpu_gets_a_gpu(engine_copy: Callable[..., Path], tmp_path: Path) -> None:
    engines = engine_copy("mpnet")
    manifest = read_manifest(engines)
    cpu = manifest.targets[manifest.default_target]
    gpu = msgspec.structs.replace(cpu, backend="tensorrt")
    targets = {**manifest.targets, "tensorrt-fp32": gpu}
    write_manifest(engines, msgspec.structs.replace(manifest, targets=targets))

    folder = write_repository(engines, tmp_path / "r", "m", target="tensorrt-fp32", max_rows=9)

    assert "max_batch_size: 9\n" in config_of(folder)  # more texts would never be queued
    assert "kind: KIND_GPU" in config_of(folder)
    assert 'output { name: "LABEL" data_type: TYPE_STRING dims: 5 }' in config_of(folder)


def test_a_copy_that_fails_leaves_nothing(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="space"):
        write_repository(bert, tmp_path, "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("pairs", [False, True])
def test_answers_are_those_of_predict(
    family: str, pairs: bool, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = write_repository(engines[family], tmp_path, "m", threads=1, max_length=24)
    inputs: dict[str, Any] = {"TEXT": TEXTS, **({"TEXT_PAIR": PAIRS} if pairs else {})}
    with Engine.load(engines[family], max_length=24) as engine, loaded(folder) as model:
        texts: Any = list(zip(TEXTS, PAIRS, strict=True)) if pairs else TEXTS
        expected = engine.predict(texts)
        requests = [double.Request(inputs), double.Request(inputs, {"max_exit": 1})]
        model.execute(requests)
        found, capped = (request.result() for request in requests)

    for number, row in enumerate(expected):
        labels = [label for label in found["LABEL"][number] if label]
        assert labels == list(row.labels)
        scores = found["SCORE"][number][: len(labels)]
        np.testing.assert_allclose(scores, row.scores, atol=1e-5)
        np.testing.assert_allclose(found["PROBABILITIES"][number], row.probabilities, atol=1e-5)
        assert (found["EXIT"][number, 0], found["LAYER"][number, 0]) == (row.exit, row.layer)
        assert found["TRUNCATED"][number, 0] == row.truncated
    types = {tensor.name: tensor.array.dtype for tensor in found.tensors}
    assert (types["SCORE"], types["EXIT"], types["TRUNCATED"]) == (np.float32, np.int32, np.bool_)
    declared = re.findall(r'output { name: "(\w+)" .* dims: (\d+) }', config_of(folder))
    shapes = {tensor.name: tensor.array.shape for tensor in found.tensors}
    assert {name: (len(TEXTS), int(size)) for name, size in declared} == shapes
    assert set(capped["EXIT"].ravel()) == {1}


@pytest.mark.usefixtures("triton", "short_target")
def test_texts_longer_than_the_target_takes_are_truncated(bert: Path, tmp_path: Path) -> None:
    with loaded(write_repository(bert, tmp_path, "m")) as model:
        model.execute([request := double.Request({"TEXT": ["rain " * 20, "sun"]})])
        assert request.result()["TRUNCATED"].tolist() == [[True], [False]]


@pytest.mark.usefixtures("triton")
def test_errors_have_the_code_of_their_kind(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = {"TEXT": ["rain"]}
    codes = double.TritonError
    cases = [
        (double.Request({"TEXT_PAIR": ["rain"]}), codes.INVALID_ARG, "TEXT is missing"),
        (double.Request({"TEXT": [b"\xff"]}), codes.INVALID_ARG, "not UTF-8"),
        (double.Request(rows, {"max_exit": 9}), codes.INVALID_ARG, "max_exit is 9"),
        (double.Request(rows, {"deadline_ms": "x"}), codes.INVALID_ARG, "deadline_ms is 'x'"),
        (double.Request({"TEXT": ["rain"] * 9}), codes.UNAVAILABLE, "of at most 8 rows"),
    ]
    folder = write_repository(bert, tmp_path, "m", max_rows=8)
    with loaded(folder) as model:
        model.execute([request for request, _, _ in cases])
        for request, code, says in cases:
            error = request.result().error
            assert error is not None
            assert error.code is code
            assert says in str(error)

        for failure in (BackendError("the device is gone"), RuntimeError("secret")):
            monkeypatch.setattr(Scheduler, "classify", Mock(side_effect=failure))
            model.execute([request := double.Request(rows)])
            error = request.result().error
            assert error is not None
            assert error.code is codes.INTERNAL
            assert "secret" not in str(error)


@pytest.mark.usefixtures("triton")
def test_a_client_that_leaves_and_a_model_that_is_unloaded(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a client that has left do not run; requests that have begun are answered."""
    opened = threading.Event()
    step = Scheduler._step

    def waits(scheduler: Scheduler, chain: Any) -> None:
        assert opened.wait(20)
        step(scheduler, chain)

    folder = write_repository(bert, tmp_path, "m")
    with loaded(folder) as model:
        monkeypatch.setattr(Scheduler, "_step", waits)
        left = double.Request({"TEXT": ["rain"] * 3}, left=lambda: True)
        stays = double.Request({"TEXT": ["sun"]})
        model.execute([left, stays])
        error = left.result().error
        assert error is not None
        assert error.code is double.TritonError.CANCELLED
        assert not stays.answered.is_set()
        threading.Timer(0.2, opened.set).start()
    assert stays.result()["EXIT"].shape == (1, 1)
    assert model._engine.tally.rows == 1


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("visible", "used"), [(None, "1"), ("5,7", "7")])
def test_each_instance_sees_its_own_gpu(
    visible: str | None, used: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    folder = write_repository(bert, tmp_path, "m")
    with loaded(folder, model_instance_kind="GPU", model_instance_device_id="1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == used
