#!/usr/bin/env python
"""Compare ways to rank documents faster: fewer layers for all of them, or for some.

    python scripts/rerankers.py --data DATA --work WORK [--only teach]

A reranker of six layers is trained with plain sentence-transformers code, on the queries that
`package_queries.py` wrote to DATA. The alternative that everybody has is the same encoder, cut to
its first layers before the same training. The six layers are converted as well, with the queries of
`train` and `certify`, so that the best three change in at most 5 % of new queries. A rule for 1 %
is certified on the queries of `certify` afterwards. Queries have the scores of BM25, with which the
conversion is a system of its own.
WORK/rerankers gets the models and what was found with the queries of `test`: the best documents of
each system in `best.json`, the times of rounds in `times.json`, and in `table.md` how good the best
documents are (MRR@10; a query whose description BM25 did not find counts as 0), in how many queries
the best three are those of the six layers in PyTorch, and how long a query takes. `promises.json`
says how many of 200 promises were broken that were certified on queries drawn from `test`, for
which `test` is the whole world. Systems are timed in turns, and nothing else should run on the
machine then. The training needs `sentence-transformers[train]`. The encoder is found as in
`reproduce.py`. Finished steps are not repeated, so the script can be stopped at any time.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from conversions import (
    ROUNDS,
    Results,
    as_graph,
    graph_runner,
    table_head,
    table_row,
)
from fine_tune import BATCH
from numpy.typing import NDArray
from reproduce import MINILM, backbone_of
from torch.utils.data import BatchSampler, SequentialSampler

from fpabee.calibration import Bound
from fpabee.calibration.evidence import QueryEvidence
from fpabee.calibration.guarantee import certify
from fpabee.calibration.query_logits import QueryLogits, errors_near_top, stops_of
from fpabee.calibration.ranking import Queries
from fpabee.commands.command import exits_with_one_line
from fpabee.exporter.convert import ConvertOptions, convert
from fpabee.exporter.training.workflow import has_fast_bf16
from fpabee.runtime import Engine, ExitRule, Query, read_queries
from fpabee.runtime.artifact.exits import exits_of
from fpabee.runtime.machine import cpu_name, usable_cores

LAYERS = 6
CUTS = (4, 3)
CHANGED = 5
STRICTER = 1
TARGETS = ("onnxruntime-fp32", "openvino-bf16")
QUERIES = 4500
NEGATIVES = 4
EPOCHS = 1
LEARNING_RATE = 1e-4
MAX_LENGTH = 128
POOL = 50 * BATCH
SEED = 42

STEPS = ("teach", "convert", "rank", "time", "promise")
PROMISES = 200
CERTIFYING = 300
FOR_ERRORS = 100
RANKS = 10
TOP = 3
TIMED = 40
REFERENCE = f"pytorch-{LAYERS}-layers"
BASELINE = f"onnxruntime-{LAYERS}-layers"

Ranker = Callable[[Query], list[int]]
"""Returns the places of the documents of a query, best first."""


def part_of(data: Path, part: str) -> Path:
    """The file of a part of the dataset."""
    return data / "packages" / f"{part}.jsonl.gz"


def right_of(query: Query) -> int | None:
    """The place of the right document, if it is among those that BM25 found."""
    place: int | None = query.fields["right"]
    return place


def pairs(
    queries: Sequence[Query], length: Callable[[dict[str, Any]], int]
) -> list[dict[str, Any]]:
    """The training pairs of a reranker: right documents, and some other candidates for each.

    Args:
        queries: those without a right document are left out.
        length: the number of tokens of a pair.

    Returns:
        Pairs in batches of similar length, because a batch is padded to its longest text.
    """
    choose = random.Random(SEED)
    rows: list[dict[str, Any]] = []
    usable = [(query, place) for query in queries if (place := right_of(query)) is not None]
    for query, right in usable[:QUERIES]:
        wrong = [place for place in range(len(query.documents)) if place != right]
        for place in [right, *choose.sample(wrong, NEGATIVES)]:
            label = float(place == right)
            rows.append({"query": query.text, "document": query.documents[place], "label": label})
    choose.shuffle(rows)
    batches: list[list[dict[str, Any]]] = []
    for start in range(0, len(rows), POOL):
        pool = sorted(rows[start : start + POOL], key=length)
        batches += [pool[first : first + BATCH] for first in range(0, len(pool), BATCH)]
    choose.shuffle(batches)
    return [row for batch in batches for row in batch]


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """Batches in the order of the rows."""
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def teach(layers: int, data: Path, work: Path) -> Path:
    """Train a reranker from the first layers of the encoder; returns its folder."""
    folder = work / "rerankers" / f"{MINILM}-packages-{layers}-layers"
    if (folder / "config.json").is_file():
        return folder
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    # On a CPU, dropout takes as long as the layers. One epoch needs none.
    config = {
        "num_hidden_layers": layers,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    model = CrossEncoder(
        backbone_of(MINILM, work),
        num_labels=1,
        max_length=MAX_LENGTH,
        device="cpu",
        config_kwargs=config,
        model_kwargs={"attn_implementation": "eager"},
    )

    def length(row: dict[str, Any]) -> int:
        texts = (row["query"], row["document"])
        return len(model.tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)["input_ids"])

    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=0.1,
        batch_sampler=in_order,
        bf16=has_fast_bf16(),
        use_cpu=True,
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        seed=SEED,
    )
    CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs([*read_queries(part_of(data, "teach"))], length)),
        loss=BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(NEGATIVES))),
    ).train()
    model.save_pretrained(str(folder))
    return folder


def as_found(query: Query) -> list[int]:
    """The order of BM25."""
    return list(range(len(query.documents)))


def pytorch_ranker(model: Path) -> Ranker:
    """A reranker in sentence-transformers and fp32."""
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(model), device="cpu")

    def rank(query: Query) -> list[int]:
        # The sigmoid of sentence-transformers would round large scores to equal ones.
        raw = torch.nn.Identity()
        documents = [*query.documents]
        ranked = encoder.rank(query.text, documents, activation_fn=raw, show_progress_bar=False)
        return [int(each["corpus_id"]) for each in ranked]

    return rank


def graph_ranker(model: Path, file: Path, openvino: bool) -> Ranker:
    """A reranker as one graph, on padded batches of documents that were sorted by length."""
    predict = graph_runner(model, file, openvino)

    def rank(query: Query) -> list[int]:
        documents = query.documents
        by_length = sorted(range(len(documents)), key=lambda place: len(documents[place]))
        scores = np.empty(len(documents), np.float32)
        scores[by_length] = predict([query.pairs[place] for place in by_length])[:, 0]
        order: list[int] = np.argsort(-scores, kind="stable").tolist()
        return order

    return rank


def graph_rankers(models: dict[int, Path], work: Path) -> dict[str, Ranker]:
    """The rerankers by their number of layers, in ONNX Runtime and in OpenVINO."""
    rankers: dict[str, Ranker] = {}
    for layers, model in models.items():
        file = as_graph(model, work / "graphs" / model.name)
        rankers[f"onnxruntime-{layers}-layers"] = graph_ranker(model, file, openvino=False)
        rankers[f"openvino-{layers}-layers"] = graph_ranker(model, file, openvino=True)
    return rankers


def converted(model: Path, data: Path, work: Path) -> Path:
    """The engines of a reranker that promises `CHANGED`; returns their folder."""
    engines = work / "rerankers" / f"engines-changed-{CHANGED}"
    if not (engines / "manifest.json").is_file():
        bound = Bound(changed_answers=CHANGED / 100)
        options = ConvertOptions(bound=bound, train_texts=part_of(data, "train"), top=TOP)
        result = convert(model, part_of(data, "certify"), engines, options)
        click.echo(json.dumps([str(each) for each in result.rankings]), err=True)
    return engines


def engine_rankers(
    folder: Path, stricter: dict[str, ExitRule], stack: ExitStack
) -> dict[str, Ranker]:
    """The converted reranker on the targets where its promise was certified.

    Args:
        folder: the engines.
        stricter: the rule of each target that promises `STRICTER`.
        stack: closes the engines.
    """
    rankers: dict[str, Ranker] = {}
    for target in TARGETS:
        engine = Engine.load(folder, target)
        stack.enter_context(engine)
        if engine.operating_point is not None:
            name = f"fpabee-{target}-changed-{CHANGED}"
            rankers[name] = partial(ranked_by, engine, with_scores=False)
            rankers[f"{name}-with-scores"] = partial(ranked_by, engine, with_scores=True)
        if target in stricter:
            engine = Engine.load(folder, target, rule=stricter[target])
            stack.enter_context(engine)
            name = f"fpabee-{target}-changed-{STRICTER}"
            rankers[name] = partial(ranked_by, engine, with_scores=False)
    return rankers


def traced(
    engines: Path, target: str, queries: Sequence[Query], reference: NDArray[np.float32] | None
) -> QueryLogits:
    """The logits of a target for queries.

    Args:
        engines: the converted reranker.
        target: which one runs.
        queries: the queries.
        reference: `[rows]` float32, the logits of the reranker; None: those of the last exit.
    """
    with Engine.load(engines, target) as engine:
        pairs = [pair for query in queries for pair in query.pairs]
        logits = engine.trace(pairs).logits[..., 0]
        own = logits[-1] if reference is None else reference
        exits = exits_of(engine.manifest)
        return Queries(queries, own).traced(logits, exits, engine.core.first_stage)


def stricter_rules(engines: Path, data: Path) -> dict[str, dict[str, Any]]:
    """The rule of each target that promises `STRICTER`; none where nothing can be promised.

    The first queries of `certify` give the errors, and the others certify.
    """
    queries = [*read_queries(part_of(data, "certify"))]
    exact = traced(engines, TARGETS[0], queries, None)
    bound = Bound(changed_answers=STRICTER / 100)
    rules = {}
    for target in TARGETS:
        world = traced(engines, target, queries, exact.reference)
        errors = errors_near_top(world.take(np.arange(FOR_ERRORS)), TOP)
        rest = world.take(np.arange(FOR_ERRORS, len(world)))
        certified = certify(QueryEvidence(rest, errors, TOP), bound)
        click.echo(f"{target}, at most {STRICTER} %: {certified}", err=True)
        if certified.rule is not None:
            rules[target] = certified.rule.to_dict()
    return rules


def ranked_by(engine: Engine, query: Query, with_scores: bool) -> list[int]:
    """The order of an engine, perhaps with the scores of BM25; early documents come last."""
    scores = query.scores if with_scores else None
    ranking = engine.rank(query.text, query.documents, scores=scores, all=True)
    return [each.index for each in ranking]


def broken_promises(world: QueryLogits, changed: int) -> dict[str, Any]:
    """How many promises are broken, if these queries are all that there are.

    Args:
        world: the queries, from which those that certify are drawn, with replacement.
        changed: of the queries may change, in percent.
    """
    errors = errors_near_top(world, TOP)
    bound = Bound(changed_answers=changed / 100)
    draw = np.random.default_rng(SEED)
    broken = 0
    depths: list[float] = []
    for _ in range(PROMISES):
        drawn = world.take(draw.integers(0, len(world), CERTIFYING))
        certified = certify(QueryEvidence(drawn, errors, TOP), bound)
        assert certified.rule is not None
        stops = stops_of(certified.rule, world, TOP)
        broken += bool(stops.changed.mean() > changed / 100)
        depths.append(float(stops.exits.mean()))
    return {"broken": broken, "promises": PROMISES, "mean_exit": statistics.mean(depths)}


def best_documents(ranker: Ranker, queries: Sequence[Query]) -> list[list[int]]:
    """The places of the best documents of each query, best first."""
    return [ranker(query)[:RANKS] for query in queries]


def quality(
    best: list[list[int]], reference: list[list[int]], rights: Sequence[int | None]
) -> dict[str, float]:
    """The MRR of a system, and the share of queries with the best documents of the reference."""
    reciprocal = [
        1 / (1 + mine.index(right)) if right in mine else 0.0
        for mine, right in zip(best, rights, strict=True)
    ]
    same = [{*mine[:TOP]} == {*theirs[:TOP]} for mine, theirs in zip(best, reference, strict=True)]
    return {"mrr": statistics.mean(reciprocal), "same_top": statistics.mean(same)}


def times(rankers: dict[str, Ranker], queries: Sequence[Query]) -> dict[str, dict[str, Any]]:
    """The times of systems for queries, one by one, in rounds in which they take turns.

    Returns:
        By the name of the system, a list with one number for each round: the `median` and the
        99th percentile, `p99`, of milliseconds for a query, and documents in a second,
        `documents_per_s`.
    """
    rounds: dict[str, dict[str, Any]] = {
        name: {"median": [], "p99": [], "documents_per_s": []} for name in rankers
    }
    documents = sum(len(query.documents) for query in queries)
    for number in range(ROUNDS + 1):
        for name, ranker in rankers.items():
            seconds = [_seconds(ranker, query) for query in queries]
            if number > 0:  # The first round prepares shapes.
                mine = rounds[name]
                mine["median"].append(1e3 * statistics.median(seconds))
                mine["p99"].append(1e3 * float(np.quantile(seconds, 0.99)))
                mine["documents_per_s"].append(documents / sum(seconds))
    return rounds


def _seconds(ranker: Ranker, query: Query) -> float:
    started = time.perf_counter()
    ranker(query)
    return time.perf_counter() - started


def table(
    best: dict[str, list[list[int]]],
    rounds: dict[str, dict[str, Any]],
    rights: Sequence[int | None],
) -> Iterator[str]:
    """The table of the systems, as Markdown. Ratios are medians of the ratios of rounds."""
    yield from table_head(
        "system",
        f"MRR@{RANKS}",
        f"same top {TOP}",
        "ms for a query, median",
        "99th percentile",
        "documents a second",
        "times faster, queries",
        "documents",
    )
    for name, mine in best.items():
        figures = quality(mine, best[REFERENCE], rights)
        cells = [f"{figures['mrr']:.3f}", f"{figures['same_top']:.1%}"]
        if taken := rounds.get(name):
            base = rounds[BASELINE]
            queries = map(truediv, base["median"], taken["median"])
            documents = map(truediv, taken["documents_per_s"], base["documents_per_s"])
            cells += [f"{statistics.median(numbers):.0f}" for numbers in taken.values()]
            cells += [f"{statistics.median(ratios):.2f}" for ratios in (queries, documents)]
        empty = [""] * (7 - len(cells))
        yield table_row(f"`{name}`", *cells, *empty)


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(STEPS), default=STEPS)
@exits_with_one_line
def main(data: Path, work: Path, only: tuple[str, ...]) -> None:
    """Train rerankers, find and time their best documents, and write the table."""
    folder = work / "rerankers"
    models = {layers: teach(layers, data, work) for layers in (LAYERS, *CUTS)}
    engines = converted(models[LAYERS], data, work) if {*STEPS[1:]} & {*only} else Path()
    queries = [*read_queries(part_of(data, "test"))]
    best = Results(folder / "best.json")
    rounds = Results(folder / "times.json")
    promises = Results(folder / "promises.json")
    stricter: dict[str, ExitRule] = {}
    if {"rank", "time"} & {*only}:
        rules = promises.once(f"rules-{STRICTER}", lambda: stricter_rules(engines, data))
        stricter = {target: ExitRule.from_dict(rule) for target, rule in rules.items()}
    stack = ExitStack()
    if "rank" in only:
        rankers = {REFERENCE: pytorch_ranker(models[LAYERS])}
        rankers["bm25"] = as_found
        rankers |= graph_rankers(models, work) | engine_rankers(engines, stricter, stack)
        for name, ranker in rankers.items():
            best.once(name, partial(best_documents, ranker, queries))
    if "time" in only:
        some = queries[:: max(1, len(queries) // TIMED)]
        systems = graph_rankers(models, work) | engine_rankers(engines, stricter, stack)
        rounds.once("rounds", lambda: times(systems, some))
    stack.close()
    if "promise" in only:
        world = traced(engines, TARGETS[0], queries, None)
        for each in (CHANGED, STRICTER):
            promises.once(f"changed-{each}", partial(broken_promises, world, each))
    head = f"{cpu_name()}, {usable_cores()} cores"
    lines = table(best.known, rounds.known.get("rounds", {}), [*map(right_of, queries)])
    (folder / "table.md").write_text("\n".join([head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
