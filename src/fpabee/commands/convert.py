"""`fpabee-convert`: a classifier or reranker and texts become an engines folder."""

from __future__ import annotations

import logging
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click

from ..exporter.convert.early import check_inputs
from ..exporter.convert.options import Conversion, ConvertOptions
from ..exporter.convert.places import check_places
from ..exporter.exit_config import Pooling
from ..exporter.paths import check_apart, check_new, resolved
from ..exporter.unfinished import partial_of
from ..runtime.machine import require
from ..runtime.tasks.kinds import CLASSIFICATION
from . import options, promises
from .command import READING, command
from .console import echo, echo_wrapped, hide_bars_of_hub, step_progress
from .points import KINDS, Shown

_SEEN = {
    Pooling.MEAN: "the mean of the tokens",
    Pooling.FIRST: "the first token",
    Pooling.BOTH: "the mean and the first token",
}


@command(
    examples="""
fpabee-convert my-classifier texts.jsonl -o engines/
fpabee-convert my-classifier texts.csv --changed 0.5 --force
fpabee-convert my-guard texts.txt --missed 2 --threshold attack=0.7
fpabee-convert my-reranker queries.jsonl --top 10 --changed 5
""",
    panels={
        "Texts and the classifier": "--group-column --max-length --problem-type",
        "Guarantee and machine": "--confidence --threads",
        **READING,
    },
)
@click.argument("classifier", help="Trained classifier or reranker: a folder, or an id on the hub.")
@click.argument(
    "texts",
    type=options.PATH,
    help="Texts like those to classify, in any format of fpabee-run, without labels. Use texts "
    "that the classifier was not trained on. For a reranker, lines of JSON with query and "
    "documents.",
)
@options.path("-o --output", "Folder to write. Default: engines.", "DIR")
@options.number(
    "--changed changed_answers",
    "At most X % of the decisions differ from the classifier's. Default: 1, unless something else "
    "is promised. Of a reranker, at most X % of the queries have another top N. Default: 5.",
)
@options.count("--top", "The best N documents of a query are promised. Default: 10.")
@options.number("--missed", "Of the texts that the classifier flags, at most X % are not flagged.")
@options.number("--false-alarms", "Of the others, at most X % are flagged.")
@promises.thresholds
@options.path(
    "--train-texts",
    "Other texts, which only train, such as those of the classifier's own training. Then nine "
    "tenths of TEXTS certify.",
)
@options.path("--adapter", "PEFT adapter to merge into the classifier.", "DIR")
@options.flag(
    "--int8/--no-int8",
    "Whether texts run in int8 first where that takes less time, and those in doubt again in full.",
    default=True,
)
@options.path("--single-file", "Also write one ONNX file with the exits and the rule.", "DIR")
@options.flag("--force", "Replace an existing engines folder.")
@options.quiet
@options.as_json
@promises.confidence
@options.option(
    "--group-column",
    "NAME",
    "Field that names what belongs together, such as a dialogue. One text of each group certifies, "
    "and the promise is about one text of each new group.",
)
@options.count(
    "--max-length",
    "Number of tokens to which longer texts are truncated. Default: what the classifier supports.",
)
@options.choice(
    "--problem-type", "TYPE", "Task of a classifier that does not name it.", CLASSIFICATION
)
@options.threads
@options.columns
def main(
    classifier: str,
    texts: Path,
    output: Path | None,
    thresholds: tuple[str, ...],
    confidence: float | None,
    single_file: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make CLASSIFIER faster without labels, with a guarantee on its decisions.

    Its weights stay. Exits and a bag of words learn to predict what it predicts on half of TEXTS.
    Most other texts certify that at most 1 % of its decisions change on new texts; the rest are
    only measured. An interrupted conversion continues when the same command is given again.

    A model with one label is a reranker: a document that cannot reach the top N of its query leaves
    early, and at most 5 % of new queries have another top N.
    """
    shares = promises.taken_shares(settings)
    # What is promised otherwise depends on the task, which the model names.
    options.only_with("thresholds", shares, "--changed, --missed or --false-alarms")
    bound = promises.bound_of(shares, thresholds, confidence) if shares else None
    if confidence is not None:
        settings["confidence"] = confidence / 100
    reading = options.read_options(settings)
    with options.wrong_usage():
        wanted = msgspec.convert(settings | {"reading": reading}, ConvertOptions)
    wanted = replace(wanted, bound=bound)
    folder = output or Path("engines")
    require("export")
    hide_bars_of_hub(quiet)
    # All that can be known before the slow imports.
    target = check_places(classifier, texts, folder, wanted)
    if single_file is not None:
        for place in (target, partial_of(target)):
            check_apart(place, [resolved(single_file)], "single_file")
        check_new(resolved(single_file), [target], "single_file")
    check_inputs(classifier, texts, wanted)
    if quiet:
        logging.getLogger("fpabee.exporter").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    from ..exporter.convert.workflow import convert
    from ..exporter.single_file import pack

    # Its bars and warnings are about weights that are not used.
    of_transformers: Any = transformers_logging
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    with step_progress(quiet) as progress:
        result = convert(classifier, texts, folder, wanted, progress)
    # Now, because the folder is there, even if it cannot be packed.
    if as_json:
        click.echo(msgspec.json.encode(to_dict(result)).decode())
    else:
        _show(result)
        echo(f"next: fpabee-run {shlex.join([str(result.folder), str(texts)])}")
    if single_file is not None:
        with step_progress(quiet) as progress:
            pack(result.folder, single_file, progress=progress)
        if not as_json:
            echo(f"one file: {single_file}")


def _show(result: Conversion) -> None:
    """The result in plain words."""
    train, choose, calibrate, report = (f"{count:,}" for count in result.parts)
    shown = _shown(result)
    results = getattr(result, shown.results)
    what = shown.unit
    others = f", and {result.train_texts:,} train {what}" if result.train_texts else ""
    distinct = f"{result.texts:,} of them distinct"
    echo(f"{result.folder}: made with {result.rows:,} {what}, {distinct}{others}")
    echo_wrapped(
        f"{train} trained exits, {choose} chose the best, {calibrate} certified them; the other "
        f"{report} decided nothing"
    )
    shown.show(results, result.default_target)
    certificates = [point.certificate for each in results for point in each.points]
    promises.say_condition(certificates, what)
    if result.texts < result.rows and result.traffic is not None:
        changed = f"{100 * result.traffic:.2f} % of the answers change"
        echo_wrapped(f"counted as often as they occur, {changed}")
    if result.accuracy is not None:
        classifier, converted = result.accuracy
        echo(f"accuracy: {converted:.4f}; that of the classifier: {classifier:.4f}")
    echo_wrapped(f"heads: {_heads(result)}")
    for warning in result.warnings:
        echo_wrapped(f"warning: {warning}")


def _shown(result: Conversion) -> Shown[Any]:
    """How the results are shown: in the way of the kind of model that has any."""
    return next(kind for kind in KINDS.values() if getattr(result, kind.results))


def _heads(result: Conversion) -> str:
    """The heads of the exits, and how they agree with the classifier."""
    form = result.chosen.form
    agreement = ", ".join(f"{100 * share:.0f}" for share in result.chosen.agreement)
    agrees = _shown(result).agreement.format(agreement)
    layer = f"a hidden layer of {form.width}" if form.width else "linear"
    every = "" if form.every == 1 else f" after every {form.every} layers"
    seen = f"{form.queries} weighted means of the tokens" if form.queries else _SEEN[form.pooling]
    return f"{layer} on {seen}{every}; {agrees}"


def to_dict(result: Conversion) -> dict[str, Any]:
    """The result for JSON."""
    content = {field.name: getattr(result, field.name) for field in fields(result)}
    results = {
        kind.results: [kind.to_dict(each) for each in getattr(result, kind.results)]
        for kind in KINDS.values()
    }
    return content | {"folder": str(result.folder)} | results
