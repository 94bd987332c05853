"""Pack an engines folder into one ONNX file, in a folder that other libraries read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from onnx import checker, external_data_helper
from tokenizers import Tokenizer

from ...runtime.artifact.folder import check_outside, read_manifest, verified
from ...runtime.artifact.manifest import CLASSIFIER_NAME, Graph, Manifest
from ...runtime.artifact.reference import read_reference
from ...runtime.encoding import Text
from ...runtime.errors import EXPORT_AGAIN, ArtifactError, BackendError
from ...runtime.exit_0 import ExitZero
from ...runtime.progress import Progress, silent
from ...runtime.targets import rule_of, target_of
from ..onnx_file import load_graphs
from ..staging import resolved, staging
from ..targets.backends import INT8
from .exit_0 import PairMarks
from .graph import TYPES, single_graph
from .hub_files import Packed, write_files
from .verify import verify

# Protobuf refuses 2 GiB; the nodes need little of it.
_MOST_BYTES = 2**31 - 2**26


def pack(
    engines: str | Path,
    output: str | Path,
    target: str | None = None,
    operating_point: str | None = None,
    for_transformers_js: bool = False,
    verify_data: Sequence[Text] = (),
    progress: Progress = silent,
) -> Packed:
    """Write a model with its exits and a rule as one ONNX graph, in a folder of its own.

    Before the folder appears, the graph runs the reference texts with the rule and with two other
    thresholds: its logits must be those of the segments, and its exits those of `simulate`.

    Args:
        engines: an engines folder.
        output: the folder to write, which must not exist yet, or be empty.
        target: a target for CPUs in fp32 or int8, whose graphs are packed; default: the default
            target.
        operating_point: one of the target's; default: its default point, or if it has none the
            default rule of the folder.
        for_transformers_js: whether the graph is `onnx/model.onnx`, or in int8
            `onnx/model_quantized.onnx`, instead of `model.onnx`.
        verify_data: more texts to verify with.
        progress: called with (what, done, total).

    Returns:
        What was packed.

    Raises:
        ArtifactError: the engines folder is damaged, or the output folder exists.
        BackendError: the folder has no such target, or it does not run ONNX graphs in fp32 or int8.
        RuleError: the target has no such point, or its rule cannot be a graph.
        VerificationError: the graph does not agree with the segments; nothing is written.

    Example:
        ```python
        from fpabee.exporter.single_file import pack

        packed = pack("engines/", "classifier/", target="onnxruntime-fp32")
        print(packed.file, packed.rule, packed.max_logit_difference)
        ```
    """
    source, place = Path(engines), resolved(output)
    check_outside(place)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ArtifactError(f"{output} exists already", "give another folder as `output`")
    manifest = read_manifest(source)
    name = target_of(source, manifest, target or manifest.default_target)
    graphs = _graphs(manifest, name)
    if CLASSIFIER_NAME not in manifest.files:
        raise ArtifactError(f"{source} has no {CLASSIFIER_NAME}", EXPORT_AGAIN)
    point, rule = rule_of(source, manifest, name, operating_point)
    reference, _ = read_reference(source, manifest)
    exit_0, no_exit_0 = _exit_0(source, manifest)
    separators = exit_0[1].texts if exit_0 else ()
    if manifest.targets[name].rest_precision not in ("", "fp32"):
        point = None  # what was measured holds for other logits than those of the file
    if no_exit_0:
        manifest, point = msgspec.structs.replace(manifest, exit_0=None), None
        rule = msgspec.structs.replace(rule, exit_0_threshold=None)
    progress("pack", 0, 2)
    proto = single_graph(load_graphs(source, graphs), manifest, rule, exit_0)
    is_large = sum((source / graph.file).stat().st_size for graph in graphs.values()) > _MOST_BYTES
    with staging(place) as folder:
        file = Path("model.onnx")
        if for_transformers_js:
            is_int8 = manifest.targets[name].precision == INT8
            file = Path("onnx", "model_quantized.onnx" if is_int8 else file)
        (folder / file).parent.mkdir(exist_ok=True)
        if is_large:
            _move_weights(proto, folder / file)
        progress("verify", 1, 2)
        every = (*reference, *verify_data)
        rows = [text for text in every if not _looks_like_a_pair(text, separators)]
        found = verify(source, manifest, name, rule, proto, folder / file, rows)
        checker.check_model(folder / file)
        exits = manifest.exits
        packed = Packed(place / file, name, point, rule, exits, no_exit_0, len(rows), *found)
        inputs = [each.name for each in proto.graph.input]
        write_files(source, folder, manifest, packed, inputs, is_large)
    return packed


def _graphs(manifest: Manifest, name: str) -> dict[str, Graph]:
    """The graphs of a target that runs them on CPUs, in a precision that every runtime has."""
    fit = [
        each
        for each, target in manifest.targets.items()
        if target.precision in ("fp32", INT8) and not target.on_gpu
    ]
    if name not in fit:
        raise BackendError(
            f"target {name} does not run ONNX graphs in fp32 or int8, so they cannot be packed",
            f"choose a `target` from {', '.join(fit)}" if fit else EXPORT_AGAIN,
        )
    return manifest.graphs | {
        each: msgspec.structs.replace(manifest.graphs[each], file=file.file, sha256=file.sha256)
        for each, file in manifest.targets[name].files.items()
    }


def _exit_0(source: Path, manifest: Manifest) -> tuple[tuple[ExitZero, PairMarks] | None, str]:
    """Exit 0 and how it recognises second texts; or why it cannot be inside."""
    exit_0 = ExitZero.load(source, manifest)
    if exit_0 is None:
        return None, ""
    spec = manifest.tokenizer
    tokenizer = Tokenizer.from_file(str(verified(source, spec.file, spec.sha256)))
    read = {each.name for graph in manifest.graphs.values() for each in graph.inputs}
    marks = PairMarks.of(tokenizer, TYPES in read)
    if marks is None:
        return None, "no token types or separators say where the second text of a pair begins"
    return (exit_0, marks), ""


def _looks_like_a_pair(text: Text, separators: Sequence[str]) -> bool:
    """Whether exit 0 of the graph finds a second text that begins in the midst of a text."""
    return any(
        token in part
        for token in separators
        for part in (text if isinstance(text, tuple) else (text,))
    )


def _move_weights(proto: Any, file: Path) -> None:
    """Write the weights beside the graph, where every runtime looks for them."""
    location = f"{file.name}_data"
    external_data_helper.convert_model_to_external_data(proto, location=location)
    external_data_helper.write_external_data_tensors(proto, str(file.parent))
