#!/usr/bin/env python
"""One part of `scripts/gpu_check`, in a process of its own.

    python scripts/gpu_check_parts.py plans base fp16 --models FOLDER --results FILE

Appends one JSON object to FILE for each thing that is measured, so that nothing is lost if the
process dies. The models have random weights, whose labels mean nothing but whose speed is that of
trained ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import click
from gpu_check_measure import (
    Emit,
    Run,
    Skipped,
    Times,
    emit_throughput,
    exact_rows,
    interleaved,
    measure,
)
from gpu_check_polygraphy import judge
from gpu_check_table import TOKENS

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.exact import FP32_TARGET
from fpabee.exporter.merge import write_one_graph
from fpabee.exporter.precision.formats import INT8
from fpabee.exporter.staging import staging
from fpabee.exporter.targets.options import RTX, RTX_CAPABILITIES, TENSORRT, PlanOptions
from fpabee.exporter.targets.tensorrt import TIMING_CACHE, unavailable_reason
from fpabee.runtime import (
    Engine,
    FpabeeError,
    MissingExtraError,
    VerificationError,
    read_manifest,
)
from fpabee.runtime.agreement import REQUIREMENTS
from fpabee.runtime.artifact.folder import is_engines_folder
from fpabee.runtime.backends.cuda_probe import cuda_device
from fpabee.runtime.encoding import EncodedRow, padded_inputs, padding_values

ROOT = Path(__file__).parents[1]
SIZES = {
    "minilm": {"layers": 6, "width": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"layers": 12, "width": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
LONGEST = 128
TEST_PACKAGES = ("pytest", "hypothesis", "filelock", "onnx", "torch", "transformers")
FILE_TEXTS = 2000
INT8_TEXTS = 64
# Single texts are timed at these lengths only, and each profile makes a build longer.
PLANS = PlanOptions(batch=(1, 8, 32), sequence=(16, TOKENS[1], LONGEST), one_row_lengths=TOKENS)


def tests(root: Path, emit: Emit) -> None:
    """The tests marked `gpu` of a checkout; only files that have any, as others need more packages.

    Raises:
        CalledProcessError: a test failed.
    """
    missing = [name for name in TEST_PACKAGES if util.find_spec(name) is None]
    if missing:
        raise Skipped(f"the tests need {', '.join(missing)}")
    files = (root / "tests").rglob("test_*.py")
    marked = [str(path) for path in files if "pytest.mark.gpu" in path.read_text("utf-8")]
    # A warning of a library on this machine, which nobody has seen before, must not fail a test.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default"]
    command += ["-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *marked], cwd=root, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    emit(what="tests", summary=(done.stdout.strip().splitlines() or ["no output"])[-1])
    done.check_returncode()


def make_models(folder: Path, size: str, emit: Emit) -> None:
    """The model of a size, its engines folder `chain`, and `one` with all layers in one segment."""
    chain, one = folder / "chain", folder / "one"
    if is_engines_folder(one) and INT8 in read_manifest(one).precisions:
        raise Skipped("the model was made before")
    sys.path.insert(0, str(ROOT))
    from tests.conftest import WORDS, make_model

    from fpabee.exporter import ExportOptions, export

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(size)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(FILE_TEXTS)]
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    calibration = folder / "int8.txt"
    calibration.write_text("\n".join(texts[:INT8_TEXTS]), encoding="utf-8")
    make_model("bert", folder / "model", max_position_embeddings=LONGEST, **SIZES[size])
    export(folder / "model", chain, ExportOptions(force=True))
    add_targets(chain, AddTargetsOptions(fp16=True, backends=()))
    try:
        add_targets(chain, AddTargetsOptions(int8=True, calibration_data=calibration, backends=()))
    except FpabeeError as error:
        emit(what="not measured", variant=INT8, reason=error.message)
    with staging(one) as new:
        write_one_graph(chain, new)


def plans(folder: Path, precision: str, emit: Emit) -> None:
    """Build plans of TensorRT, or of TensorRT for RTX, and measure them."""
    backend = plan_backend()
    if precision not in read_manifest(folder / "chain").precisions:
        raise Skipped(f"the model has no {precision} graphs")
    options = AddTargetsOptions(
        fp16=precision == "fp16",
        int8=precision == INT8,
        backends=(backend,),
        plans=replace(PLANS, compute_capabilities=(cuda_device().compute_capability,)),
        jobs=max(1, (os.cpu_count() or 2) // 2),
    )
    targets: list[str] = []
    # Each plan of the chain is kept with its timings if the part is stopped. The one large plan is
    # kept only if it is done, so it comes last, and begins with the timings of the same layers.
    for name in ("chain", "one"):
        started = time.perf_counter()
        targets += add_targets(folder / name, options).built
        emit(what="build", variant=name, seconds=round(time.perf_counter() - started, 1))
        cache = folder / "chain" / "targets" / targets[0] / TIMING_CACHE
        if name == "chain" and cache.is_file():
            home = folder / "one" / "targets" / targets[0]
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(cache, home)
    problem = judge(folder, targets[0], emit)
    measure(folder, targets[0], emit)
    if problem:
        raise VerificationError(problem, "send us this report")


def plan_backend() -> str:
    """TensorRT, or else TensorRT for RTX.

    Raises:
        Skipped: neither can build and run plans here.
    """
    reasons = []
    for backend in (TENSORRT, RTX):
        error = unavailable_reason(backend)
        capability = cuda_device().compute_capability
        if error is not None:
            reasons.append(error.message)
        elif backend == RTX and capability not in RTX_CAPABILITIES:
            reasons.append(f"TensorRT for RTX does not support compute capability {capability}")
        else:
            return backend
    raise Skipped("; ".join(reasons))


def pytorch(folder: Path, how: str, emit: Emit) -> None:
    """Measure the model at full depth in PyTorch in fp16: `eager` or `compiled`."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped(f"PyTorch {torch.__version__} finds no GPU that it supports")
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    with Engine.load(folder / "one", FP32_TARGET) as engine:
        units = {tokens: exact_rows(engine, texts, tokens) for tokens in TOKENS}
        run = torch_run(folder / "model", padding_values(engine.manifest.tokenizer), how)
        for tokens, batches in units.items():
            first = Times()
            first.add(run, batches[0])
            emit(what="first call", variant=how, tokens=tokens, ms=round(first.clock[0] * 1e3, 2))
            times = interleaved({how: run}, batches)[how]
            emit(what="latency", variant=how, tokens=tokens, **times.summary())
        emit(what="load", variant=how, mib=round(torch.cuda.max_memory_reserved() / 2**20, 1))
        if how == "compiled":  # it would be compiled again for every shape of the file
            return

        def whole_file() -> list[Any]:
            rows = sorted(engine.encode(texts), key=len)
            batches = [rows[start : start + 32] for start in range(0, len(rows), 32)]
            return [answer for batch in batches for answer in run(batch)]

        emit_throughput(how, whole_file, emit)


def torch_run(model_dir: Path, padding: dict[str, float], how: str, device: str = "cuda") -> Run:
    """The model in fp16: from tokenized rows to the logits of the last exit."""
    import torch

    from fpabee.exporter.checkpoint import load_checkpoint
    from fpabee.exporter.model import token_weights

    model = load_checkpoint(model_dir, attention="sdpa").half().to(device)
    embeddings, blocks, heads = model.parts

    def forward(ids: Any, types: Any, bias: Any) -> Any:
        weights = token_weights(bias)
        hidden, carried = embeddings(ids, types)
        for block in blocks:
            hidden = block(hidden, bias, **carried)
        return heads[-1](hidden, weights)

    call = forward
    if how == "compiled":
        call = torch.compile(forward, mode="reduce-overhead", dynamic=False)

    def run(rows: Sequence[EncodedRow]) -> Any:
        arrays = (torch.from_numpy(value) for value in padded_inputs(rows, padding).values())
        ids, types, bias = (array.to(device, non_blocking=True) for array in arrays)
        with torch.inference_mode():
            return call(ids, types, bias.half()).float().cpu().numpy()

    return run


def run_part(part: str, size: str, how: str, models: Path, emit: Emit) -> None:
    """Run a part by its name.

    Raises:
        Skipped: it cannot run here.
    """
    if part == "tests":
        return tests(ROOT, emit)
    folder = models / size
    if part == "model":
        return make_models(folder, size, emit)
    if not is_engines_folder(folder / "one"):
        raise Skipped(f"the model {size} was not made")
    if part == "onnxruntime":
        return measure(folder, f"onnxruntime-{how}-cuda", emit)
    return {"plans": plans, "pytorch": pytorch}[part](folder, how, emit)


@click.command()
@click.argument("part", type=click.Choice(("tests", "model", "plans", "onnxruntime", "pytorch")))
@click.argument("size", type=click.Choice(tuple(SIZES)), required=False, default="minilm")
@click.argument("how", required=False, default="")
@click.option("--models", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), required=True)
def main(part: str, size: str, how: str, models: Path, results: Path) -> None:
    """Run one PART of the check."""

    def emit(**result: Any) -> None:
        if part != "tests":
            result = {"size": size, "runs_on": f"{part} {how}".strip()} | result
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")

    # A few labels of random weights are nearly ties, and a lower precision changes them.
    lenient = {name: replace(r, labels=0.9, exits=0.5) for name, r in REQUIREMENTS.items()}
    try:
        with mock.patch.dict(REQUIREMENTS, lenient):
            run_part(part, size, how, models, emit)
    except (Skipped, MissingExtraError, ImportError) as error:
        emit(skipped=str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"pytest ended with code {error.returncode}")


if __name__ == "__main__":
    main()
