"""Does a graph with the rule inside give the logits and exits of the segments?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.artifact.manifest import ATTENTION_BIAS, LOGITS, Manifest
from ...runtime.backends.onnxruntime import cpu_session, session_options
from ...runtime.check import (
    EXPORT_LIMIT,
    REQUIREMENTS,
    Logits,
    logit_differences,
    logit_sizes,
)
from ...runtime.encoding import Arrays, EncodedRow, padded_batches, padding_values
from ...runtime.errors import CheckError
from ...runtime.exit_0 import ExitZero
from ...runtime.rules.measures import Integers
from ...runtime.rules.rules import ExitRule, ThresholdRule
from ...runtime.rules.words import rule_in_words
from ..onnx_file import chain_logits
from .cases import Cases
from .graph import EXIT, MASK
from .rules import as_inputs, settings_of

_BATCH = 16
# Smaller tensors, such as the settings, lie in the graph in any case.
_LEAST_BESIDE = 1024
# Texts that are kept to check the file with, and how much their logits may differ elsewhere without
# another exit.
_KEPT = 4
_ROUNDING = 10 * EXPORT_LIMIT
# How far the sums of a rule may be off in a plan, which computes them in float32.
_ROUNDING_IN_32_BITS = 64 * float(np.finfo(np.float32).eps)
# Most of the texts, as a share, whose exit rounding may decide.
_MOST_TIES = 0.02
# Thresholds that are tried besides those of the rule lie between these quantiles of its scores.
_QUANTILES = ((0.2, 0.4), (0.6, 0.8))


def logits_of_segments(
    manifest: Manifest,
    protos: Mapping[str, Any],
    before: Sequence[ExitZero],
    rows: Sequence[EncodedRow],
    precision: str,
) -> Logits:
    """The logits `[exits, rows, labels]` of a chain of graphs, in ONNX Runtime.

    Args:
        manifest: says how segments call the graphs.
        protos: the graphs by name, each an `onnx.ModelProto`.
        before: the exits before layer 1, at most one.
        rows: at least one.
        precision: of the graphs.
    """
    options = _options(precision)
    batches = padded_batches(rows, padding_values(manifest.tokenizer), _BATCH)
    logits = chain_logits(
        manifest, batches, lambda name: cpu_session(protos[name].SerializeToString(), options)
    )
    return np.concatenate([*(exit_0(rows)[None] for exit_0 in before), logits])


def check_single_graph(
    model: ir.Model,
    rule: ExitRule,
    cases: Cases,
    precision: str,
    file: Path,
    is_large: bool,
) -> tuple[int, float]:
    """Run the graph with the rule and with two other thresholds, and write it with the rule.

    Args:
        model: the graph.
        rule: the rule.
        cases: what to run, and the logits of the segments.
        precision: of the graph.
        file: where to write it.
        is_large: whether its weights are written beside it, where every runtime looks for them.

    Returns:
        For how many rows, at most, a score is so close to a threshold that rounding decides; their
        exits are not compared. The largest difference of a logit, see `logit_differences`.

    Raises:
        CheckError: logits or exits differ, or too many exits cannot be compared.
    """
    # ONNX Runtime does not round to fp16 between graphs that one segment calls, as in ALBERT.
    most_ties = 1.0 if precision == "fp16" else _MOST_TIES
    required = EXPORT_LIMIT if precision == "fp32" else REQUIREMENTS[precision].tie
    manifest = cases.manifest
    rows = cases.rows
    rules = [rule]  # the last, so that the file keeps it
    if isinstance(rule, ThresholdRule):
        others = _other_thresholds(cases.scores(rule))
        rules = [*(msgspec.structs.replace(rule, threshold=other) for other in others), rule]
    difference = 0.0
    ties = 0
    for each in rules:
        settings = settings_of(each, manifest.task, manifest.exits)
        for name, value in settings.items():
            if name in model.graph.initializers:  # one segment decides nothing
                model.graph.initializers[name].const_value = ir.tensor(value, name=name)
        beside = f"{file.name}_data" if is_large else None
        ir.save(model, file, external_data=beside, size_threshold_bytes=_LEAST_BESIDE)
        logits, exits = _run(file, cases, as_inputs(settings), _options(precision))
        differences = logit_differences(logits, cases.answers(exits))
        difference = float(np.maximum(difference, differences.max()))  # NaN stays NaN
        rounding = max(difference, _ROUNDING_IN_32_BITS)
        close = cases.near_ties(each, rounding * logit_sizes(cases.expected))
        own_ties = int(close.sum())
        ties = max(ties, own_ties)
        wrong = int(((exits != cases.exits(each)) & ~close).sum())
        if wrong or not difference <= required:
            raise CheckError(
                f"the graph does not agree with its segments, with {rule_in_words(each)}, on "
                f"{len(rows)} texts: logits differ by {difference:.1e} "
                f"of their size (at most {required:.0e} allowed), and {wrong} exits differ",
                "pack another target",
            )
        if each is rule and own_ties > max(cases.tied_together, most_ties * len(rows)):
            raise CheckError(
                f"the graph cannot be compared with its segments: {own_ties} of {len(rows)} texts "
                f"are too close to a threshold of {rule_in_words(each)} (at most {most_ties:.0%} "
                "allowed)",
                "pack another operating point or target",
            )
    return ties, difference


def texts_to_keep(model: ir.Model, rule: ExitRule, cases: Cases, precision: str) -> dict[str, Any]:
    """A few texts as one batch, and what the graph gives for them, to check it on other machines.

    Args:
        model: the graph.
        rule: the rule.
        cases: what the graph was checked on. Texts whose exit depends on rounding are avoided, and
            then the batch with the most different exits and lengths is taken, as it shows most.
        precision: of the graph.

    Returns:
        `texts`, their `inputs` by name, `logits` and `exits`, and by which `tolerance` logits may
        differ, in types that JSON has.
    """

    def preference(batch: Cases) -> tuple[int, int, int]:
        ties = batch.near_ties(rule, _ROUNDING * logit_sizes(batch.expected))
        lengths = {len(row) for row in batch.rows}
        return int(ties.sum()), -len({*batch.exits(rule).tolist()}), -len(lengths)

    tolerance = _ROUNDING * logit_sizes(cases.expected)
    batches = cases.batches_to_keep(_KEPT, rule, tolerance)
    batch = min(map(cases.take, batches), key=preference)
    (arrays,) = _inputs(batch)
    exits = batch.exits(rule)
    logits = batch.answers(exits)
    names = [str(value.name) for value in model.graph.inputs]
    return {
        "texts": batch.texts,
        "inputs": {name: arrays[name].tolist() for name in names if name in arrays},
        "logits": logits.tolist(),
        "exits": exits.tolist(),
        "tolerance": REQUIREMENTS[precision].tie * float(logit_sizes(logits).max()),
    }


def _inputs(cases: Cases) -> Iterator[Arrays]:
    """The inputs of a graph by name, in batches of unequal rows."""
    padding = padding_values(cases.manifest.tokenizer)
    for arrays in padded_batches(cases.rows, padding, cases.batch):
        mask = arrays.pop(ATTENTION_BIAS)[:, 0, 0] == 0
        yield arrays | {MASK: mask.astype(np.int64)}


def _other_thresholds(scores: NDArray[np.float64]) -> list[float]:
    """Thresholds that decide differently, each in the widest gap between neighbouring scores.

    Args:
        scores: of all rows and exits; those that are not finite do not count.
    """
    distinct = np.unique(scores[np.isfinite(scores)])
    chosen = []
    for quantiles in _QUANTILES:
        first, last = (int(quantile * len(distinct)) for quantile in quantiles)
        near = distinct[first : last + 2]
        if len(near) > 1:
            widest = int(np.diff(near).argmax())
            chosen.append(float(near[widest : widest + 2].mean()))
    return chosen


def _options(precision: str) -> Any:
    """How graphs of a precision are run for the comparison.

    Those in fp16 are for GPUs. Here, optimizations would leave out some of their rounding.
    """
    import onnxruntime

    options = session_options()
    if precision == "fp16":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _run(
    file: Path,
    cases: Cases,
    settings: Mapping[str, NDArray[Any]],
    options: Any,
) -> tuple[Logits, Integers]:
    """The logits `[rows, labels]` and exits `[rows]` of a graph, in batches of unequal rows.

    Args:
        file: the graph.
        cases: what to run.
        settings: of the rule by name, for a graph that has them as inputs.
        options: of the session.
    """
    import onnxruntime

    # With all optimizers, as others will run it.
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    answers = []
    for arrays in _inputs(cases):
        values = {**arrays, **settings}
        answers.append(session.run([LOGITS, EXIT], {name: values[name] for name in names}))
    logits = np.concatenate([logits for logits, _ in answers])
    exits = np.concatenate([exits for _, exits in answers])
    return logits, exits
