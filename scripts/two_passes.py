#!/usr/bin/env python
"""Compare conversions whose texts run in int8 first with those of an earlier version.

    python scripts/two_passes.py --data DATA --work WORK --before CHECKOUT [--only mini-trec]

CHECKOUT is a checkout of fpabee before conversions had quick passes, such as version 1.0. The
classifiers and texts are those of `conversions.py`, and both versions convert the same ones, each
with its own code. A conversion certifies two targets; here all of `TARGETS` get a point with one
pass and one with two, with the same texts. The steps are

- `promise`: are promises kept? All texts that trained nothing, those of the test set included, are
  taken for all that there are. Certifying texts are drawn from them with replacement, and what they
  certify is judged on all. Of 30 other draws without replacement, those are counted that certify
  the exits of one pass, and those that certify two passes.
- `time`: all systems in rounds, each in a fresh process, in rotating order: texts in a second over
  the test file, single texts, and answers that are not those of the classifier in PyTorch and fp32.
  Ratios are medians of the ratios in the same round. OpenVINO int8 is that of
  sentence-transformers, see `systems.py`.
- `convert`: how long conversions take with 77 labels, which are the clusters of the texts of SNIPS.

Finished steps and rounds are not repeated, so the script can be stopped at any time. Results are in
WORK/two-passes, and their tables in `tables.md` there. `taskset -c 0,1 python ...` takes two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from conversions import (
    DRAWS,
    RUNS,
    Results,
    Run,
    decisions,
    logits_of,
    table_head,
    table_row,
    teach,
    texts_for,
)
from reproduce import MINILM
from systems import OTHERS, System, chain, checked, measure, read

import fpabee
from fpabee.calibration import Bound, CalibrationOptions, calibrate
from fpabee.calibration.evidence import TextEvidence
from fpabee.calibration.guarantee import Certified, certify
from fpabee.calibration.result import one_pass
from fpabee.calibration.scoring import AGREEMENT, LabelledLogits, Scorer
from fpabee.calibration.settings import exits_of
from fpabee.calibration.trace import CALIBRATION, engines_of, trace_rows
from fpabee.commands.command import exits_with_one_line
from fpabee.exporter.convert.texts import split
from fpabee.exporter.targets.builders import INT8_TARGETS
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import InputError, read_manifest, read_rows
from fpabee.runtime.artifact.quick import quick_of, quick_targets
from fpabee.runtime.files import Row
from fpabee.runtime.machine import cpu_name, usable_cores

TARGETS = ("openvino-bf16", "openvino-fp32", FP32_TARGET)
STEPS = ("promise", "time", "convert")
COMPARED = ("mini-sst2", "mini-trec", "mini-mrpc", "mini-descriptions")
SEED = 42
USUAL = Bound(changed_answers=0.01)
TWO_PASSES = f"{USUAL.point}-two-passes"
CHANGED = (1, 2)
PROMISES = 1000
PEER = next(system for system in OTHERS if system.name == "openvino-int8")
TODAY = Path(fpabee.__file__).parents[1]
CLUSTERED = "snips"
LABELS = 77
TEXTS = 5500
ENCODED = 256


def converted(source: Path, model: Path, texts: Path, engines: Path, *more: str) -> float:
    """Convert with the command of a checkout, unless that is done; returns how many seconds.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "fpabee", "convert", str(model), str(texts)]
    started = time.perf_counter()
    checked([*command, "-o", str(engines), "--quiet", *more], source=str(source))
    return time.perf_counter() - started


def certifying(texts: Path) -> list[Row]:
    """The texts that certify a conversion."""
    dealt = split(list(read_rows(texts)))
    return [dealt.units[number] for number in dealt.calibrate]


def certify_before(source: Path, engines: Path, texts: Path) -> None:
    """Certify the targets that a conversion of an earlier version left out."""
    rows = [json.dumps(_fields(row)) for row in certifying(texts)]
    file = engines.with_suffix(".certify.jsonl")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for target in TARGETS:
        if not read_manifest(engines).targets[target].operating_points:
            command = [sys.executable, "-m", "fpabee", "calibrate", str(engines), "--quiet"]
            asked = ["--data", str(file), "--changed", "1", "--target", target]
            checked([*command, *asked], source=str(source))


def _fields(row: Row) -> dict[str, str]:
    content = row.content
    texts = (content,) if isinstance(content, str) else content
    return dict(zip(("text", "text_pair"), texts, strict=False))


def certify_today(model: Path, engines: Path, texts: Path) -> None:
    """Certify each target with one pass and with two, unless the conversion has done so."""
    rows = certifying(texts)
    reference, _ = logits_of(model, [row.content for row in rows])
    for target in TARGETS:
        usual = not read_manifest(engines).targets[target].operating_points
        for has_quick, name in (
            (False, one_pass(USUAL.point)),
            (True, USUAL.point if usual else TWO_PASSES),
        ):
            if point_of(engines, target, has_quick) is None:
                options = CalibrationOptions(
                    goals={name: USUAL},
                    metric=AGREEMENT,
                    target=target,
                    quick_target=quick_target(engines, target) if has_quick else None,
                )
                calibrate(engines, rows, options, reference=reference)


def choices(engines: Path) -> dict[str, str]:
    """The target of the quick pass of each target that a conversion certified, if it has one."""
    manifest = read_manifest(engines)
    return {
        name: ", ".join(quick_targets(manifest, name))
        for name, target in manifest.targets.items()
        if target.operating_points
    }


def point_of(engines: Path, target: str, has_quick: bool) -> str | None:
    """The point of a target with one pass, or with two; None: there is none."""
    points = read_manifest(engines).targets[target].operating_points
    names = [name for name in points if (quick_of(points[name]) is not None) == has_quick]
    return names[0] if names else None


def quick_target(engines: Path, target: str) -> str:
    """The target of the quick passes of a target: where there is none yet, the fastest in int8."""
    manifest = read_manifest(engines)
    own = quick_targets(manifest, target)
    if not own:
        library = manifest.targets[target].backend
        speeds = {
            name: each.relative_speed or 0.0
            for name, each in manifest.targets.items()
            if name in INT8_TARGETS and each.backend == library
        }
        return max(speeds, key=speeds.__getitem__)
    return next(iter(own))


def systems(before: Path, today: Path, source: Path) -> Iterator[System]:
    """Both conversions on all targets, and the peer."""
    for target in TARGETS:
        points = read_manifest(before).targets[target].operating_points
        if points:
            (point,) = points
            yield chain(f"before {target}", before, target, point, source=source)
        for words, has_quick in (("one pass", False), ("two passes", True)):
            name = point_of(today, target, has_quick)
            if name is not None:
                yield chain(f"{words} {target}", today, target, name)
    yield PEER


def measure_rounds(
    asked: Sequence[System], inputs: dict[str, Any], rounds: int, results: Results, work: Path
) -> None:
    """Measure the rounds that are missing."""
    for number in range(1, rounds + 1):
        first = number % len(asked)
        for system in (*asked[first:], *asked[:first]):
            results.once(f"{number} {system.name}", partial(measure, system, inputs, work))


def simulations(
    model: Path, texts: Path, engines: Path, test: Path
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The functions that count `promise`, by the names of the exact target and of the promise."""
    dealt = split(list(read_rows(texts)))
    own = [dealt.units[number] for number in (*dealt.calibrate, *dealt.report)]
    taught = {dealt.units[number].content for number in dealt.taught}
    rows = [*own, *(row for row in read_rows(test) if row.content not in taught)]
    labels = read_manifest(engines).task.labels
    count = len(dealt.calibrate)
    for target in (FP32_TARGET, "openvino-bf16"):
        worlds: list[LabelledLogits] = []

        def traced(target: str = target, worlds: list[LabelledLogits] = worlds) -> None:
            """The logits of one pass, and of both."""
            if not worlds:
                reference, _ = logits_of(model, [row.content for row in rows])
                names = (target, quick_target(engines, target))
                with engines_of(engines, *names) as (engine, quick):
                    for before in (None, quick):
                        logits = trace_rows(
                            engine, rows, engines / CALIBRATION, labels=False, quick=before
                        )
                        worlds.append(replace(logits, reference=reference))

        for percent in CHANGED:
            bound = Bound(changed_answers=percent / 100)

            def judge(
                bound: Bound = bound,
                traced: Callable[[], None] = traced,
                worlds: list[LabelledLogits] = worlds,
            ) -> dict[str, Any]:
                traced()
                drawn = certified_draws(worlds[0], worlds[1], labels, bound, count)
                return broken_promises(worlds[1], labels, bound, count) | drawn

            yield f"{target} {percent}", judge


def choice(rows: LabelledLogits, labels: Sequence[str], bound: Bound) -> Certified:
    """The setting that rows certify."""
    return certify(TextEvidence(Scorer(rows, AGREEMENT), labels), bound)


def broken_promises(
    world: LabelledLogits, labels: Sequence[str], bound: Bound, count: int
) -> dict[str, Any]:
    """How many promises are broken, if these rows are all that there are.

    Args:
        world: the logits of both passes.
        labels: of the model.
        bound: what is promised.
        count: how many rows certify.
    """
    draw = np.random.default_rng(SEED)
    changed = Scorer(world, AGREEMENT).changed
    losses: list[float] = []
    in_doubt: list[float] = []
    for _ in range(PROMISES):
        seen = world.take(draw.integers(0, len(world), count))
        certified = choice(seen, labels, bound)
        if certified.rule is not None and certified.certificate is not None:
            stops = exits_of(certified.rule, world)
            losses.append(float(changed[world.at(stops)].mean()))
            in_doubt.append(float((stops == world.exits[-1]).mean()))
    assert bound.changed_answers is not None
    return {
        "rows": len(world),
        "certifying": count,
        "certified": len(losses),
        "broken": sum(loss > bound.changed_answers for loss in losses),
        "changed": statistics.mean(losses) if losses else None,
        "in_doubt": statistics.mean(in_doubt) if in_doubt else None,
    }


def certified_draws(
    one: LabelledLogits, two: LabelledLogits, labels: Sequence[str], bound: Bound, count: int
) -> dict[str, int]:
    """How many draws certify one pass, two passes, and both.

    Args:
        one: the logits of one pass.
        two: those of both passes.
        labels: of the model.
        bound: what is promised.
        count: how many rows certify.
    """
    outcomes = []
    for seed in range(DRAWS):
        numbers = np.random.default_rng(seed).permutation(len(one))[:count]
        both = (choice(rows.take(numbers), labels, bound) for rows in (one, two))
        outcomes.append([each.certificate is not None for each in both])
    first, second = np.array(outcomes).T
    return {
        "one_pass": int(first.sum()),
        "two_passes": int(second.sum()),
        "both": int((first & second).sum()),
    }


def with_clusters(data: Path, place: Path, encoder: str) -> None:
    """Write a dataset whose labels are clusters of the mean of the tokens of an encoder."""
    import gzip

    import torch
    from fine_tune import tokenized
    from sklearn.cluster import KMeans
    from transformers import AutoModel, AutoTokenizer

    parts = {part: read(str(data / CLUSTERED), part)[0] for part in ("train", "dev", "test")}
    texts = [text for some in parts.values() for text in some]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model: Any = AutoModel.from_pretrained(encoder).eval()
    means = []
    with torch.inference_mode():
        for start in range(0, len(texts), ENCODED):
            batch = tokenized(tokenizer, texts[start : start + ENCODED])
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(**batch).last_hidden_state * mask
            means.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1)))
    clusters = iter(KMeans(LABELS, random_state=SEED).fit_predict(torch.cat(means).numpy()))
    place.mkdir(parents=True, exist_ok=True)
    for part, some in parts.items():
        with gzip.open(place / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
            for text in some:
                file.write(json.dumps({"text": text, "label": f"c{next(clusters)}"}) + "\n")


def time_conversions(data: Path, work: Path, source: Path, results: Results, rounds: int) -> None:
    """Time conversions of texts with many labels, in turns."""
    from reproduce import backbone_of

    place = work / "two-passes"
    run = Run(MINILM, "clusters", 3)
    if not (place / run.data / "test.jsonl.gz").is_file():
        with_clusters(data, place / run.data, backbone_of(MINILM, work))
    model = teach(run, SEED, place, work)
    texts = texts_for(run, SEED, TEXTS, place, work)
    kinds = {
        "before": (source, ()),
        "today without int8": (TODAY, ("--no-int8",)),
        "today": (TODAY, ()),
    }
    for number in range(1, rounds + 1):
        for name, (code, more) in kinds.items():
            engines = place / f"clusters-{name.replace(' ', '-')}"
            results.once(
                f"{number} {name}",
                partial(converted, code, model, texts, engines, "--force", *more),
            )


def promise_table(every: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of simulated calibrations and draws."""
    yield from table_head(
        "texts",
        "exact target",
        "promised, at most",
        "all texts",
        "certify",
        f"certified, of {PROMISES}",
        "broken",
        "changed, mean",
        "in doubt, mean",
        f"certified of {DRAWS} draws: one pass",
        "two passes",
        "both",
    )
    for name, known in every.items():
        for what, row in known.items():
            target, percent = what.split()
            yield table_row(
                name,
                f"`{target}`",
                f"{percent} %",
                f"{row['rows']:,}",
                f"{row['certifying']:,}",
                f"{row['certified']}",
                f"{row['broken']} ({row['broken'] / max(1, row['certified']):.1%})",
                *(f"{row[key]:.2%}" if row[key] is not None else "" for key in _SHARES),
                *(f"{row[key]}" for key in ("one_pass", "two_passes", "both")),
            )


_SHARES = ("changed", "in_doubt")


def speed_table(name: str, known: dict[str, Any]) -> Iterator[str]:
    """The rounds of a classifier."""
    by_system: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in known.items():
        number, _, system = key.partition(" ")
        by_system.setdefault(system, {})[number] = row
    rows = next(iter(known.values()))["rows"]
    yield f"\n### {name}: {rows:,} texts, {max(map(len, by_system.values()))} rounds"
    yield from table_head(
        "system",
        "layers",
        "in doubt",
        "changed",
        "texts a second",
        "times before",
        "times the peer",
        "one text: mean ms",
        "median",
        "99th percentile",
        "mean, share of before",
        "99th percentile",
        "MiB",
    )
    for system, rounds in by_system.items():
        before = by_system.get(f"before {system.rpartition(' ')[2]}", {})

        def median(key: str, rounds: dict[str, dict[str, Any]] = rounds) -> float:
            return float(statistics.median(row[key] for row in rounds.values()))

        def ratio(
            other: dict[str, dict[str, Any]],
            key: str,
            rounds: dict[str, dict[str, Any]] = rounds,
        ) -> str:
            shared = [rounds[each][key] / other[each][key] for each in rounds.keys() & other.keys()]
            return f"{statistics.median(shared):.2f}" if shared else ""

        layers = next(iter(rounds.values()))["layers"]
        yield table_row(
            system,
            "" if layers is None else f"{layers:.2f}",
            "" if layers is None else f"{median('in_doubt') / rows:.1%}",
            f"{median('changed'):.0f}",
            f"{median('rows_per_s'):,.0f}",
            ratio(before, "rows_per_s"),
            ratio(by_system.get(PEER.name, {}), "rows_per_s"),
            *(f"{median(key):.2f}" for key in ("mean_ms", "median_ms", "p99_ms")),
            *(ratio(before, key) for key in ("mean_ms", "p99_ms")),
            f"{median('memory_mib'):.0f}",
        )


def convert_table(known: dict[str, float]) -> Iterator[str]:
    """How long conversions took."""
    yield from table_head("conversion", "seconds", "rounds")
    kinds: dict[str, list[float]] = {}
    for key, seconds in known.items():
        kinds.setdefault(key.partition(" ")[2], []).append(seconds)
    for name, each in kinds.items():
        yield table_row(name, f"{statistics.median(each):.0f}", ", ".join(f"{s:.0f}" for s in each))


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--before", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice([*RUNS]), default=COMPARED)
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), default=STEPS)
@click.option("--rounds", default=5)
@exits_with_one_line
def main(
    data: Path,
    work: Path,
    before: Path,
    only: tuple[str, ...],
    steps: tuple[str, ...],
    rounds: int,
) -> None:
    """Convert, simulate and measure what is missing, and write the tables."""
    source = before / "src"
    if not source.is_dir():
        raise InputError(f"{before} has no folder src", "give a checkout of fpabee as `--before`")
    place = work / "two-passes"
    place.mkdir(parents=True, exist_ok=True)
    (work / "conversions").mkdir(exist_ok=True)
    promises = {}
    timed = {}
    for name in only:
        run = RUNS[name]
        model = teach(run, SEED, data, work)
        texts = texts_for(run, SEED, None, data, work)
        folders = [place / f"{name}-{SEED}-{version}" for version in ("before", "today")]
        made = Results(place / f"{name}-conversions.json")
        made.once("before", partial(converted, source, model, texts, folders[0]))
        made.once("today", partial(converted, TODAY, model, texts, folders[1]))
        made.once("chosen", partial(choices, folders[1]))
        made.once("points before", partial(certify_before, source, folders[0], texts))
        made.once("points today", partial(certify_today, model, folders[1], texts))
        kept = Results(place / f"{name}-promises.json")
        if "promise" in steps:
            test = data / run.data / "test.jsonl.gz"
            for what, judge in simulations(model, texts, folders[1], test):
                kept.once(what, judge)
        promises[name] = kept.known
        speeds = Results(place / f"{name}-rounds.json")
        if "time" in steps:
            answers = place / f"{name}-decisions.json"
            if not answers.is_file():
                own = decisions(model, read(str(data / run.data), "test")[0])
                answers.write_text(json.dumps([sorted(each) for each in own]), encoding="utf-8")
            inputs = {
                "classifier": str(model),
                "model": str(model),
                "decisions": str(answers),
                "data": str(data / run.data),
            }
            asked = list(systems(folders[0], folders[1], source))
            measure_rounds(asked, inputs, rounds, speeds, work)
        timed[name] = speeds.known
    seconds = Results(place / "seconds.json")
    if "convert" in steps:
        time_conversions(data, work, source, seconds, rounds=2)
    lines = [f"{cpu_name()}, {usable_cores()} threads", *promise_table(promises)]
    for name, known in timed.items():
        if known:
            lines += speed_table(name, known)
    lines += convert_table(seconds.known)
    (place / "tables.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
