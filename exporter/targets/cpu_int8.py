"""int8 for CPUs: one set of graphs that ONNX Runtime and OpenVINO both run.

NNCF quantizes with the user's own texts. Heads, and what is not quantized, stay in fp32. If the
CPU has bf16 instructions, OpenVINO runs these parts in bf16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...runtime.artifact.manifest import BuiltFile, Manifest, Target
from ...runtime.backends.openvino import rest_precision
from ...runtime.encoding import Text, TextEncoder
from ...runtime.progress import Progress
from ..onnx_file import serialized
from ..staging import replacing
from .backends import INT8, OPENVINO, unavailable_reason, version_of
from .check import Checked, check_target, exact_logits
from .int8 import quantize, split_texts

INT8_FOLDER = "targets/cpu-int8"
"""The place in an engines folder of the int8 graphs that both backends run."""


def add_cpu_int8(
    folder: Path,
    manifest: Manifest,
    backends: Sequence[str],
    texts: Sequence[Text],
    progress: Progress,
) -> tuple[Manifest, list[Checked]]:
    """Quantize the graphs to `targets/cpu-int8/`, and add the targets that run them.

    Older graphs stay until `drop_unused_graphs`. If no target passes, older targets stay as well.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the targets is returned, not written.
        backends: the libraries that are to run them. Those of older targets are among them, also
            if they cannot run here.
        texts: at least 32 texts like those that will be classified. Of the first 512, every other
            one gives the ranges. The result is compared with fp32 on the rest.
        progress: called with (what, done, total).

    Returns:
        The manifest with the targets that passed, and what was found of each.

    Raises:
        InputError: too few texts.
        VerificationError: a graph could not be quantized.
    """
    ranges, others = split_texts(texts)
    more = exact_logits(folder, manifest, [*others, *texts[len(ranges) + len(others) :]])
    encoded = TextEncoder(folder, manifest.tokenizer).encode(ranges)
    quantized = quantize(folder, manifest, encoded, "smooth", progress)
    place, found, changed = folder / INT8_FOLDER, [], manifest
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    try:
        with replacing(place) as temporary:
            for name, proto in quantized.items():
                content = serialized(proto, name)
                sha256 = hashlib.sha256(content).hexdigest()
                # Another name for other content: the manifest of an older target stays true.
                file = f"{name}-{sha256[:8]}.onnx"
                (temporary / file).write_bytes(content)
                files[name] = BuiltFile(
                    file=f"{INT8_FOLDER}/{file}",
                    sha256=sha256,
                    onnx_sha256=manifest.graphs[name].sha256,
                )
        for backend in backends:
            name, runs = f"{backend}-{INT8}", unavailable_reason(backend) is None
            old = manifest.targets.get(name)
            if not runs and old is not None and old.files == files:
                continue  # an older target with the same graphs stays valid on other machines
            target = Target(
                backend=backend,
                precision=INT8,
                graph_precision="fp32",
                rest_precision=rest_precision() if backend == OPENVINO and runs else "",
                versions={backend: version_of(backend)} if runs else {},
                files=files,
                tolerance=None,
            )
            changed, checked = check_target(folder, changed, name, target, progress, more)
            found.append(checked)
    finally:
        passed = any(checked.agreement for checked in found)
        if not passed:
            drop_unused_graphs(folder, manifest)
    return (changed if passed else manifest), found


def drop_unused_graphs(folder: Path, manifest: Manifest) -> None:
    """Delete the int8 graphs for CPUs that no target runs any more.

    Args:
        folder: the engines folder.
        manifest: its manifest, which must be written already.
    """
    used = {folder / f.file for target in manifest.targets.values() for f in target.files.values()}
    place = folder / INT8_FOLDER
    for path in place.glob("*.onnx"):
        if path not in used:
            path.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
