"""Does a graph with the rule inside give the logits and exits of the segments?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import (
    ATTENTION_BIAS,
    LOGITS,
    TokenizerSpec,
)
from ...runtime.backends.onnxruntime import session_options
from ...runtime.check import (
    EXPORT_LIMIT,
    REQUIREMENTS,
    Logits,
    exits_near_ties,
    logit_differences,
    logit_sizes,
)
from ...runtime.encoding import EncodedRow, Text, padded_batches, padding_values
from ...runtime.errors import CheckError
from ...runtime.rules.measures import Integers
from ...runtime.rules.rules import ExitRule, ThresholdRule
from ...runtime.rules.runner import Simulation, simulate
from ...runtime.rules.words import rule_in_words
from ..targets.backends import ONNXRUNTIME
from ..targets.check import engine_of
from .graph import EXIT, MASK
from .rules import settings_of

_BATCH = 16
# Smaller tensors, such as the settings, lie in the graph in any case.
_LEAST_BESIDE = 1024
# Most of the texts, as a share, whose exit rounding may decide.
_MOST_TIES = 0.02
# Thresholds that are tried besides those of the rule: quantiles of its scores on the texts.
_QUANTILES = (0.3, 0.7)


def check_single_graph(
    engines: EnginesFolder,
    target: str,
    rule: ExitRule,
    model: ir.Model,
    file: Path,
    texts: Sequence[Text],
    is_large: bool,
) -> tuple[int, int, float]:
    """Run the graph with the rule and with two other thresholds, and write it with the rule.

    Args:
        engines: the engines folder, without exit 0 if the graph has none.
        target: the target whose graphs it was made from.
        rule: the rule.
        model: the graph.
        file: where to write it.
        texts: what to run.
        is_large: whether its weights are written beside it, where every runtime looks for them.

    Returns:
        How many texts were run. For how many of them, at most, a score is so close to a threshold
        that rounding decides; their exits are not compared. The largest difference of a logit,
        see `logit_differences`.

    Raises:
        CheckError: logits or exits differ, or too many exits cannot be compared.
    """
    manifest = engines.manifest
    built = manifest.targets[target]
    # Those of OpenVINO, too, run in ONNX Runtime here.
    here = msgspec.structs.replace(built, backend=ONNXRUNTIME)
    with engine_of(engines.with_target(target, here), target, rule) as engine:
        rows = engine.core.encode(texts)
        trace = engine.trace(texts)
    required = REQUIREMENTS["int8"].tie if built.precision == "int8" else EXPORT_LIMIT
    first = trace.first_exit
    task = manifest.task

    def simulated(rule: ExitRule) -> Simulation:
        thresholds = task.label_thresholds
        return simulate(trace.logits, rule, task.problem_type, thresholds, first)

    rules = [rule]  # the last, so that the file keeps it
    scores = simulated(rule).scores
    scores = scores[np.isfinite(scores)]
    if isinstance(rule, ThresholdRule) and len(scores):
        others = np.quantile(scores, _QUANTILES).tolist()
        rules = [*(msgspec.structs.replace(rule, threshold=other) for other in others), rule]
    difference = 0.0
    ties = 0
    for each in rules:
        for name, value in settings_of(each, task, manifest.exits).items():
            if name in model.graph.initializers:  # one segment decides nothing
                model.graph.initializers[name].const_value = ir.tensor(value, name=name)
        beside = f"{file.name}_data" if is_large else None
        ir.save(model, file, external_data=beside, size_threshold_bytes=_LEAST_BESIDE)
        logits, exits = _run(file, rows, manifest.tokenizer)
        expected = simulated(each).exits
        same = trace.logits[exits - first, np.arange(len(rows))]
        difference = float(
            np.maximum(difference, logit_differences(logits, same).max())
        )  # NaN stays NaN
        close = exits_near_ties(
            trace.logits, each, task, difference * logit_sizes(trace.logits), first
        )
        ties = max(ties, int(close.sum()))
        wrong = int(((exits != expected) & ~close).sum())
        if wrong or not difference <= required or ties > max(1, _MOST_TIES * len(rows)):
            raise CheckError(
                f"the graph does not agree with the segments of {target}, with "
                f"{rule_in_words(each)}, on {len(rows)} texts: logits differ by {difference:.1e} "
                f"of their size (at most {required:.0e} allowed), {wrong} exits differ, and {ties} "
                f"are too close to a threshold to compare (at most {_MOST_TIES:.0%} allowed)",
                "pack another target; if it is the exits that are too close, export again with "
                "more `texts`, on which the file is checked as well",
            )
    return len(rows), ties, difference


def _run(
    file: Path, rows: Sequence[EncodedRow], tokenizer: TokenizerSpec
) -> tuple[Logits, Integers]:
    """The logits `[rows, labels]` and exits `[rows]` of a graph, in batches of unequal rows."""
    import onnxruntime

    # With all optimizations, as others will run it.
    session = onnxruntime.InferenceSession(
        file, session_options(), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]
    found = []
    for arrays in padded_batches(rows, padding_values(tokenizer), _BATCH):
        arrays[MASK] = (arrays[ATTENTION_BIAS][:, 0, 0] == 0).astype(np.int64)
        found.append(session.run([LOGITS, EXIT], {name: arrays[name] for name in names}))
    logits, exits = (np.concatenate(each) for each in zip(*found, strict=True))
    return logits, exits
