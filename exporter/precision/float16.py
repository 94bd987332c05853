"""Write an engines folder's graphs in fp16.

Before, it is checked that the model still gives the same labels and exits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from onnx import TensorProto

from ...runtime.agreement import Agreement
from ...runtime.artifact.manifest import Manifest, TensorSpec
from ...runtime.encoding import Text
from ...runtime.progress import Progress, silent
from ..onnx_file import load_graphs, write_graph
from ..staging import replacing
from .emulation import check_emulated
from .formats import FP16
from .lowering import lower


def add_fp16(
    folder: Path, manifest: Manifest, texts: Sequence[Text] = (), progress: Progress = silent
) -> tuple[Manifest, Agreement]:
    """Check fp16 and write the graphs in it to `onnx/fp16/`.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        texts: more texts to check with than those of `reference.npz`, of which 2,000 are used.
        progress: called with (what, done, total).

    Returns:
        The manifest with the new graphs, and how closely they agree with the fp32 model.

    Raises:
        VerificationError: values overflow, or too many labels or exits change.
        ModelError: a weight does not fit into fp16.
    """
    protos = load_graphs(folder, manifest.graphs)
    hint = "use the targets in fp32 of this model"
    return add_lowered(folder, manifest, FP16, protos, texts, hint, progress)


def add_lowered(
    folder: Path,
    manifest: Manifest,
    precision: str,
    protos: Mapping[str, Any],
    texts: Sequence[Text],
    hint: str,
    progress: Progress,
) -> tuple[Manifest, Agreement]:
    """Check graphs in fp16 and write them. They replace earlier ones only when all are written.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        precision: what the manifest calls them.
        protos: the graphs by name, each an `onnx.ModelProto`.
        texts: more texts to check with, see `check_emulated`.
        hint: what to do if labels or exits change.
        progress: called with (what, done, total).
    """
    agreement = check_emulated(folder, manifest, precision, protos, texts, hint, progress)
    place = f"onnx/{precision}"

    def typed(specs: Sequence[TensorSpec], values: Iterable[Any]) -> list[TensorSpec]:
        return [
            msgspec.structs.replace(spec, dtype="float16")
            if value.type.tensor_type.elem_type == TensorProto.FLOAT16
            else spec
            for spec, value in zip(specs, values, strict=True)
        ]

    graphs = {}
    with replacing(folder / place) as temporary:
        for number, (name, proto) in enumerate(protos.items()):
            progress(f"{precision} {name}", number, len(protos))
            lowered, exact = lower(proto), manifest.graphs[name]
            graphs[name] = write_graph(
                temporary / f"{name}.onnx",
                f"{place}/{name}.onnx",
                lowered,
                typed(exact.inputs, lowered.graph.input),
                typed(exact.outputs, lowered.graph.output),
            )
    precisions = {**manifest.precisions, precision: graphs}
    return msgspec.structs.replace(manifest, precisions=precisions), agreement
