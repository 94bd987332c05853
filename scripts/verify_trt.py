#!/usr/bin/env python
"""Compare a target's TensorRT plans with ONNX Runtime, graph by graph, through Polygraphy.

    python scripts/verify_trt.py engines/ --target tensorrt-fp16-sm89

Needs a GPU that the plans are for, and `pip install polygraphy`. Each graph reads what the chain
gives it for the reference texts. Prints one line for each call of a graph; the exit code is 1 if
one of them misses the tolerance.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from fpabee.runtime import FpabeeError, Manifest, read_manifest
from fpabee.runtime.artifact.folder import verified, verified_graph
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.onnxruntime_session import cpu_session
from fpabee.runtime.backends.stepping import steps
from fpabee.runtime.backends.tensorrt import TensorRtBackend
from fpabee.runtime.encoding import TextEncoder, padded_batches, padding_values

LENGTH = 32
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1, "int8": 5e-1}


def compare(folder: Path, manifest: Manifest, target_name: str, rows: int) -> bool:
    """Print the largest difference of each graph; returns whether all are within tolerance."""
    target = manifest.targets[target_name]
    TensorRtBackend.check(target, target_name)
    if target.backend == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    def open_session(name: str) -> Any:
        graph = manifest.graphs[name]
        return cpu_session(verified_graph(folder, graph.file, graph.sha256))

    texts, _ = read_reference(folder, manifest)
    encoded = TextEncoder(folder, manifest.tokenizer, LENGTH).encode(texts[:rows])
    batches = padded_batches(encoded, padding_values(manifest.tokenizer), rows)
    passed = True
    for step in steps(manifest, batches, open_session):
        graph, file = manifest.graphs_in(target.precision)[step.graph], target.files[step.graph]
        inputs = {spec.name: _array(step.inputs[spec.name], spec.dtype) for spec in graph.inputs}
        plan = BytesFromPath(str(verified(folder, file.file, file.sha256)))
        with TrtRunner(EngineFromBytes(plan)) as runner:
            found = runner.infer(inputs)
        worst = max(
            float(np.abs(_float32(found[name]) - value).max())
            for name, value in step.outputs.items()
        )
        good = worst <= TOLERANCE[target.precision]
        passed &= good
        click.echo(f"{step.graph}: {worst:.2e} {'ok' if good else 'TOO LARGE'}")
    return passed


def _array(value: Any, dtype: str) -> Any:
    """An input in the type of a plan; bfloat16, which NumPy lacks, as a tensor of PyTorch."""
    if dtype != "bfloat16":
        return value.astype(dtype)
    import torch

    return torch.from_numpy(value).to(torch.bfloat16)


def _float32(value: Any) -> Any:
    """An output as float32, whether it is an array or a tensor."""
    return np.asarray(value.float() if hasattr(value, "float") else value, np.float32)


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A TensorRT target of the folder.")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True)
def main(engines: Path, target: str, rows: int) -> None:
    """Compare the plans of a target of ENGINES with ONNX Runtime."""
    try:
        manifest = read_manifest(engines)
        if target not in manifest.targets or not manifest.targets[target].files:
            raise click.UsageError(f"{target} is not a TensorRT target of {engines}")
        passed = compare(engines, manifest, target, rows)
    except FpabeeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
