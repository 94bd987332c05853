#!/usr/bin/env python
"""Compare a target's TensorRT plans with ONNX Runtime, graph by graph, through Polygraphy.

    python scripts/verify_trt.py engines/ --target tensorrt-fp16-sm89

Needs the GPU that the plans are for, and `pip install polygraphy`. Inputs are what the chain
feeds each graph on the reference texts, so every graph sees real values. Prints one line a
graph; exit code 1 if one misses the tolerance.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import numpy as np

from fpabee.calibration.activations import graph_inputs
from fpabee.runtime import FpabeeError
from fpabee.runtime.artifact.folder import read_manifest, verified, verified_graph
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.tensorrt import TensorRtBackend
from fpabee.runtime.encoding import TextEncoder

LENGTH = 32
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1}


def compare(folder: Path, target_name: str, rows: int) -> bool:
    """Print the largest difference of each graph; whether all are within tolerance."""
    manifest = read_manifest(folder)
    target = manifest.targets[target_name]
    TensorRtBackend.check(target, target_name)
    if target.backend == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    from onnxruntime import InferenceSession
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    texts, _ = read_reference(folder, manifest)
    encoded = TextEncoder(folder, manifest.tokenizer, LENGTH).encode(texts[:rows])
    feeds = graph_inputs(folder, manifest, encoded, batch=rows)
    passed = True
    for name, graph in manifest.graphs.items():
        low = {spec.name: spec.dtype for spec in manifest.graphs_in(target.precision)[name].inputs}
        fp32 = verified_graph(folder, graph.file, graph.sha256)
        session = InferenceSession(str(fp32), providers=["CPUExecutionProvider"])
        outputs = [spec.name for spec in graph.outputs]
        expected = dict(zip(outputs, session.run(outputs, feeds[name][0]), strict=True))
        inputs = {key: value.astype(low[key]) for key, value in feeds[name][0].items()}
        file = target.files[name]
        plan = BytesFromPath(str(verified(folder, file.file, file.sha256)))
        with TrtRunner(EngineFromBytes(plan)) as runner:
            found = runner.infer(inputs)
        worst = max(
            float(np.abs(np.asarray(found[key], np.float32) - value).max())
            for key, value in expected.items()
        )
        good = worst <= TOLERANCE[target.precision]
        passed &= good
        click.echo(f"{name}: {worst:.2e} {'ok' if good else 'TOO LARGE'}")
    return passed


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A TensorRT target of the folder.")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True)
def main(engines: Path, target: str, rows: int) -> None:
    """Compare the plans of a target of ENGINES with ONNX Runtime."""
    try:
        manifest = read_manifest(engines)
        if target not in manifest.targets or not manifest.targets[target].files:
            raise click.UsageError(f"{target} is no TensorRT target of {engines}")
        passed = compare(engines, target, rows)
    except FpabeeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
