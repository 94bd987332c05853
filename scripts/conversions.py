#!/usr/bin/env python
"""Convert classifiers without labels, and test what comes out on rows that chose nothing.

    python scripts/conversions.py --data DATA --work WORK [--only mini-trec]

Each classifier is fine-tuned with plain Transformers code on half of the training rows. The other
half and dev, without their labels, are the texts of the conversion, which promises at most 1 %
changed answers: those that differ from the answers of the classifier in PyTorch and fp32. It
certifies the exact targets, in fp32 and perhaps bf16. With `--int8`, each of them gets a quick pass
in int8 where that takes less time, and the promise is about both passes together; these results are
kept apart. Beside it, there are conversions of fewer texts, of 1,000 texts and up to 4,000 others
that only train, without altered texts, and with linear heads; exit 0 alone, with all layers for the
texts that it does not answer; and an encoder that was cut to its first half before the same
training. With `--times`, conversions are timed against the classifier as one graph in ONNX Runtime
and OpenVINO, in turns; nothing else should run on the machine then.

Which texts certify is chance, and the layers that a conversion saves vary with it. So the same
heads are also certified with 30 random draws from all texts that trained nothing, those of the test
set included, and tested on what was not drawn.

DATA holds a folder for each dataset, with train, dev and test as `.jsonl.gz`; `descriptions.py`
makes one of longer texts. Encoders are found as in `reproduce.py`. Finished steps are not repeated,
so the script can be stopped at any time. Results are stored in WORK/conversions, and their tables
in `tables.md` there; those of `scripts/results/convert.md` come from it.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from operator import eq, ne, truediv
from pathlib import Path
from typing import Any
from unittest import mock

import click
import msgspec
import numpy as np
import torch
from fine_tune import BATCH, fine_tune, tokenized
from numpy.typing import NDArray
from reproduce import MINILM, MPNET, backbone_of
from systems import Text, read
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fpabee.calibration import Bound
from fpabee.calibration.evidence import TextEvidence
from fpabee.calibration.guarantee import certify
from fpabee.calibration.scoring import AGREEMENT, Scorer
from fpabee.calibration.settings import exits_of
from fpabee.calibration.trace import trace_rows
from fpabee.commands.command import exits_with_one_line
from fpabee.commands.convert import to_dict
from fpabee.exporter.convert import ConvertOptions, convert, heads
from fpabee.exporter.convert.classification import Classification
from fpabee.exporter.convert.options import Form
from fpabee.exporter.convert.texts import split
from fpabee.exporter.exit_config import Pooling
from fpabee.runtime import Budget, Engine
from fpabee.runtime.files import read_rows
from fpabee.runtime.machine import cpu_name, usable_cores

FP32 = "onnxruntime-fp32"
LINEAR = "linear heads"
WITHOUT_ALTERED = "without altered texts"
DRAWS = 30
OTHERS = "1000 and others"
OTHER_TEXTS = 4000
HALF = "half the layers"
SINGLE = 200
MOST = 1000
ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """Classifiers of one kind.

    Attributes:
        backbone: which encoder is fine-tuned.
        data: folder of the dataset.
        epochs: of the fine-tuning.
        lr: its learning rate.
        seeds: one for each classifier.
        sizes: how many texts further conversions of the first classifier get.
        rows: at most so many training rows are used.
        max_length: the fine-tuning cuts texts to so many tokens.
    """

    backbone: str
    data: str
    epochs: int
    lr: float = 5e-5
    seeds: tuple[int, ...] = (42,)
    sizes: tuple[int, ...] = ()
    rows: int = 13_000
    max_length: int = 128


RUNS = {
    "mini-trec": Run(MINILM, "trec", 5, seeds=(42, 43, 44), sizes=(1000,)),
    "mini-snips": Run(MINILM, "snips", 1, sizes=(1000, 3000)),
    "mini-sst2": Run(MINILM, "sst2", 3, seeds=(42, 43, 44), sizes=(1000, 3000)),
    "mini-mrpc": Run(MINILM, "mrpc", 4),
    "mini-mixsnips": Run(MINILM, "mixsnips", 2),
    "mpnet-sst2": Run(MPNET, "sst2", 2, lr=3e-5),
    "mini-descriptions": Run(MINILM, "descriptions", 5, max_length=192),
}


def teach(run: Run, seed: int, data: Path, work: Path, layers: int | None = None) -> Path:
    """Fine-tune a classifier as anybody would; returns its folder."""
    name = f"{run.backbone}-{run.data}-{seed}" + (f"-{layers}-layers" if layers else "")
    folder = work / "classifiers" / name
    if (folder / "config.json").is_file():
        return folder
    texts, labels = read(str(data / run.data), "train")
    rows, _ = halves(run, seed, len(texts))
    fine_tune(
        backbone_of(run.backbone, work),
        [texts[row] for row in rows],
        [labels[row] for row in rows],
        folder,
        epochs=run.epochs,
        lr=run.lr,
        seed=seed,
        max_length=run.max_length,
        layers=layers,
    )
    return folder


def halves(run: Run, seed: int, count: int) -> tuple[list[int], list[int]]:
    """The numbers of the training rows for the classifier, and of those for its conversion."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    numbers = numbers[: run.rows]
    return numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]


def texts_for(run: Run, seed: int, size: int | None, data: Path, work: Path) -> Path:
    """The texts of a conversion, without labels."""
    folder = str(data / run.data)
    train = read(folder, "train")[0]
    dev = read(folder, "dev")[0]
    texts = [*(train[number] for number in halves(run, seed, len(train))[1]), *dev]
    if size is not None:
        texts = random.Random(seed).sample(texts, size)
    file = work / "conversions" / f"{run.data}-{seed}-{size or 'all'}.jsonl"
    write_texts(texts, file)
    return file


def other_texts(run: Run, seed: int, taken: Path, data: Path, work: Path) -> Path:
    """Up to 4,000 texts that only train: of the conversion first, then of the classifier's own."""
    train = read(str(data / run.data), "train")[0]
    own, others = halves(run, seed, len(train))
    known = {row.content for row in read_rows(taken)}
    texts = [train[number] for number in (*others, *own)]
    chosen = [text for text in dict.fromkeys(texts) if text not in known][:OTHER_TEXTS]
    file = taken.with_name(f"{taken.stem}-others.jsonl")
    write_texts(chosen, file)
    return file


def write_texts(texts: Sequence[Text], file: Path) -> None:
    """Write texts or pairs without labels, in lines of JSON."""
    parts = [(text,) if isinstance(text, str) else text for text in texts]
    rows = [dict(zip(("text", "text_pair"), each, strict=False)) for each in parts]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def logits_of(model: Path, texts: Sequence[Text]) -> tuple[NDArray[np.float32], Any]:
    """The logits `[texts, labels]` of a classifier in PyTorch and fp32, and its configuration."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        parts = [
            classifier(**tokenized(tokenizer, texts[start : start + BATCH])).logits
            for start in range(0, len(texts), BATCH)
        ]
    return torch.cat(parts).numpy(), classifier.config


def decisions(model: Path, texts: Sequence[Text]) -> list[set[str]]:
    """The labels that a classifier decides for."""
    logits, config = logits_of(model, texts)
    single = config.problem_type == "single_label_classification"
    chosen = logits == logits.max(axis=1, keepdims=True) if single else logits > 0
    return [{config.id2label[int(number)] for number in np.flatnonzero(row)} for row in chosen]


def run_conversion(
    model: Path, texts: Path, engines: Path, others: Path | None = None, int8: bool = False
) -> dict[str, Any]:
    """The result of a conversion, and the seconds of CPU that it took."""
    started = time.process_time()
    result = convert(model, texts, engines, ConvertOptions(train_texts=others, int8=int8))
    seconds = time.process_time() - started
    content: dict[str, Any] = msgspec.to_builtins(to_dict(result))
    return content | {"cpu_s": seconds}


def with_linear_heads(
    model: Path, texts: Path, engines: Path, int8: bool = False
) -> dict[str, Any]:
    """The same conversion, but all heads are linear and see the mean of the tokens."""
    with mock.patch.object(heads, "form_for", return_value=Form(Pooling.MEAN)):
        return run_conversion(model, texts, engines, int8=int8)


def without_altered(model: Path, texts: Path, engines: Path, int8: bool = False) -> dict[str, Any]:
    """The same conversion, but exits learn from the texts only."""
    with mock.patch.object(Classification, "learns_from_altered", False):
        return run_conversion(model, texts, engines, int8=int8)


def drawn(
    model: Path, texts: Path, engines: Path, data: Path, others: Path | None = None
) -> dict[str, float]:
    """The average savings and changes of heads, if other texts certify them, see above."""
    train_units = None if others is None else list(read_rows(others))
    dealt = split(list(read_rows(texts)), train_units=train_units)
    untaught = [dealt.units[number] for number in (*dealt.calibrate, *dealt.report)]
    every = [*untaught, *read_rows(data / "test.jsonl.gz")]
    with Engine.load(engines, FP32) as engine:
        labels = engine.manifest.task.labels
        layers = np.array(engine.manifest.exit_layers, float)
        traced = trace_rows(engine, every, engines / "calibration", False)
    reference, _ = logits_of(model, [row.content for row in every])
    traced = replace(traced, reference=reference)
    results = []
    for seed in range(DRAWS):
        order = np.random.default_rng(seed).permutation(len(every))
        seen = traced.take(order[: len(dealt.calibrate)])
        new = traced.take(order[len(dealt.calibrate) :])
        bound = Bound(changed_answers=0.01)
        rule = certify(TextEvidence(Scorer(seen, AGREEMENT), labels), bound).rule
        at = new.at(exits_of(rule or Budget(exit=traced.exits[-1]), new))
        saved = 1 - layers[at[0]].mean() / layers[-1]
        results.append((saved, Scorer(new, AGREEMENT).changed[at].mean()))
    saved, changed = np.mean(results, axis=0)
    return {"saved": float(saved), "changed": float(changed)}


def exit_0_alone(model: Path, texts: Path, engines: Path, data: Path) -> dict[str, Any]:
    """Exit 0 answers texts of which it is certain, under the same promise; one graph the others."""
    dealt = split(list(read_rows(texts)))
    calibrate = [dealt.units[number] for number in dealt.calibrate]
    measured = []
    with Engine.load(engines, FP32) as engine:
        labels = engine.manifest.task.labels
        layers = engine.manifest.exit_layers
        for some in (calibrate, list(read_rows(data / "test.jsonl.gz"))):
            traced = trace_rows(engine, some, engines / "calibration", False)
            logits, _ = logits_of(model, [row.content for row in some])
            kept = traced.logits[[0, -1]]
            measured.append(replace(traced, logits=kept, reference=logits))
    costs = np.array([[0.0], [layers[-1]]])
    seen, test = measured
    test_costs = np.broadcast_to(costs, test.logits.shape[:2])
    bound = Bound(changed_answers=0.01)
    rule = certify(TextEvidence(Scorer(seen, AGREEMENT), labels), bound).rule
    at = test.at(exits_of(rule or Budget(exit=1), test))
    changed = int(Scorer(test, AGREEMENT).changed[at].sum())
    return {"saved": float(1 - test_costs[at].mean() / layers[-1]), "changed": changed}


def on_test(
    engines: Path,
    target: str,
    texts: Sequence[Text],
    teacher: list[set[str]],
    right: list[set[str]],
) -> dict[str, Any]:
    """How a target does on a test set, against the classifier and against the labels."""
    with Engine.load(engines, target) as engine:
        answers = engine.predict(list(texts))
        layers = engine.manifest.exit_layers[-1]
    mine = [set(answer.labels) for answer in answers]
    saved = 1 - statistics.mean(answer.layer for answer in answers) / layers
    return compared(mine, teacher, right) | {"saved": saved}


def compared(
    mine: list[set[str]], teacher: list[set[str]], right: list[set[str]]
) -> dict[str, float]:
    """Changed answers and accuracy of decisions."""
    return {
        "changed": sum(map(ne, mine, teacher)),
        "accuracy": statistics.mean(map(eq, mine, right)),
    }


def as_graph(model: Path, place: Path) -> Path:
    """The classifier as one ONNX graph."""
    file = place / "model.onnx"
    if not file.is_file():
        place.mkdir(parents=True, exist_ok=True)
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            model, attn_implementation="eager"
        )
        example = dict(tokenized(AutoTokenizer.from_pretrained(model), ["one text", "two"]))
        # The exporter names inputs in the order of the function that takes them.
        names = [name for name in signature(classifier.forward).parameters if name in example]
        axes = {name: {0: "rows", 1: "tokens"} for name in names}
        torch.onnx.export(
            classifier.eval(), (), str(file), kwargs=example, input_names=names,
            output_names=["logits"], dynamic_axes=axes | {"logits": {0: "rows"}}, dynamo=False,
        )  # fmt: skip
    return file


def graph_runner(
    model: Path, file: Path, openvino: bool
) -> Callable[[Sequence[Text]], NDArray[np.float32]]:
    """A model as one graph: its logits `[texts, labels]`, on padded batches in their order."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    run: Callable[[dict[str, NDArray[np.int64]]], Any]
    if openvino:
        import openvino as ov

        run = ov.compile_model(str(file), "CPU")
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        run = partial(session.run, None)

    def predict(texts: Sequence[Text]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = tokenized(tokenizer, texts[start : start + BATCH])
            parts.append(run({name: value.numpy() for name, value in batch.items()})[0])
        return np.concatenate(parts)

    return predict


def times(
    model: Path, engines: Path, targets: Sequence[str], graph: Path, texts: Sequence[Text]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of systems by name in rounds: for single texts the median, for the file the whole."""
    systems: dict[str, Callable[[Sequence[Text]], object]] = {
        "graph-onnxruntime": graph_runner(model, graph, openvino=False),
        "graph-openvino": graph_runner(model, graph, openvino=True),
    }
    with ExitStack() as stack:
        for target in targets:
            systems[target] = stack.enter_context(Engine.load(engines, target)).predict
        seconds: dict[str, dict[str, list[float]]] = {
            name: {"single": [], "file": []} for name in systems
        }
        singles = texts[:: max(1, len(texts) // SINGLE)]
        for _ in range(ROUNDS + 1):
            for name, predict in systems.items():
                alone = [_seconds(predict, [text]) for text in singles]
                seconds[name]["single"].append(statistics.median(alone))
                seconds[name]["file"].append(_seconds(predict, texts))
    # The first round prepares shapes.
    return {name: {kind: each[1:] for kind, each in of.items()} for name, of in seconds.items()}


def _seconds(predict: Callable[[Sequence[Text]], object], texts: Sequence[Text]) -> float:
    started = time.perf_counter()
    predict(texts)
    return time.perf_counter() - started


class Results:
    """The results of one classifier, in a file.

    Args:
        file: where it is stored.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """The result of this name, which `find` makes unless it is known."""
        if name not in self.known:
            self.known[name] = find()
            self.file.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
            click.echo(f"{self.file.stem}, {name}: {json.dumps(self.known[name])[:300]}", err=True)
        return self.known[name]


def study(
    run: Run, seed: int, data: Path, work: Path, timed: bool, int8: bool, results: Results
) -> None:
    """Everything about one classifier that is not known yet."""
    model = teach(run, seed, data, work)
    texts, labels = read(str(data / run.data), "test")
    right = [set(each) for each in labels]
    teacher = decisions(model, texts)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    results.once(
        "classifier",
        lambda: {"accuracy": statistics.mean(map(eq, teacher, right)), "rows": len(right)},
    )

    def converted(
        name: str,
        size: int | None,
        make: Callable[[Path, Path, Path], dict[str, Any]],
        others: Path | None = None,
    ) -> Path:
        engines = work / "conversions" / f"{results.file.stem}-{name}"
        unlabelled = texts_for(run, seed, size, data, work)
        conversion = results.once(name, lambda: make(model, unlabelled, engines))
        for each in conversion["targets"]:
            target = each["target"]
            test = partial(on_test, engines, target, texts, teacher, right)
            results.once(f"{name} {target}", test)
        average = partial(drawn, model, unlabelled, engines, data / run.data, others)
        results.once(f"{name} drawn", average)
        return engines

    plain = partial(run_conversion, int8=int8)
    engines = converted("all", None, plain)
    unlabelled = texts_for(run, seed, None, data, work)
    results.once("exit 0 alone", lambda: exit_0_alone(model, unlabelled, engines, data / run.data))
    if seed == run.seeds[0]:
        for size in run.sizes:
            converted(str(size), size, plain)
        if 1000 in run.sizes:
            others = other_texts(run, seed, texts_for(run, seed, 1000, data, work), data, work)
            converted(OTHERS, 1000, partial(plain, others=others), others)
        converted(LINEAR, None, partial(with_linear_heads, int8=int8))
        converted(WITHOUT_ALTERED, None, partial(without_altered, int8=int8))
        cut = decisions(teach(run, seed, data, work, layers // 2), texts)
        results.once(HALF, lambda: compared(cut, teacher, right) | {"saved": 0.5})
    if timed:
        graph = as_graph(model, work / "graphs" / results.file.stem)
        targets = [each["target"] for each in results.known["all"]["targets"]]
        results.once("times", lambda: times(model, engines, targets, graph, texts[:MOST]))


def tables(every: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The results of classifiers by name, as Markdown."""
    heads_of = []
    times_of = []
    draws = []
    kept_by = {}
    yield from table_head(
        "classifier",
        "conversion",
        "texts",
        "target",
        "certified",
        "saved, report",
        "saved, test",
        "answers changed on test",
        "accuracy",
        "classifier",
        "CPU time",
    )
    for name, results in every.items():
        for key, made in results.items():
            kept = {}
            for each in made.get("targets", ()):
                point = each["points"][0]
                saved = 1 - point["held_out"]["mean_depth"] / made["exit_layers"][-1]
                certified = "yes" if point["certificate"] else "no"
                kept[each["target"]] = f"{saved:.1%}" if point["certificate"] else "no"
                yield table_row(
                    name,
                    key,
                    f"{made['texts']:,}",
                    f"`{each['target']}`",
                    certified,
                    f"{saved:.1%}",
                    *_tested(results, results[f"{key} {each['target']}"]),
                    f"{made['cpu_s']:.0f} s" if "cpu_s" in made else "",
                )
            if kept:
                kept_by[name, key] = kept
            if chosen := made.get("chosen"):
                heads_of.append((name, key, *_form(chosen)))
            if average := results.get(f"{key} drawn"):
                draws.append((name, key, f"{average['saved']:.1%}", f"{average['changed']:.2%}"))
        for key in ("exit 0 alone", HALF):
            if key in results:
                yield table_row(name, key, "", "", "", "", *_tested(results, results[key]), "")
        rounds = results.get("times", {})
        for system, mine in rounds.items():
            ratios = [
                statistics.median(map(truediv, rounds["graph-onnxruntime"][kind], mine[kind]))
                for kind in ("single", "file")
            ]
            times_of.append((name, f"`{system}`", *(f"{ratio:.2f}" for ratio in ratios)))
    targets = list(dict.fromkeys(target for kept in kept_by.values() for target in kept))
    names = (f"`{target}`: saved" for target in targets)
    yield from table_head("classifier", "conversion", *names)
    for about, kept in kept_by.items():
        yield table_row(*about, *(kept.get(target, "") for target in targets))
    if draws:
        heading = f"saved in `{FP32}`, mean of {DRAWS} draws"
        yield from table_head("classifier", "conversion", heading, "answers changed")
        yield from (table_row(*cells) for cells in draws)
    yield from table_head("classifier", "conversion", "heads", "agreement of exits 1, 2, ... in %")
    yield from (table_row(*cells) for cells in heads_of)
    if times_of:
        yield from table_head("classifier", "system", "times faster, texts one by one", "file")
        yield from (table_row(*cells) for cells in times_of)


def table_head(*cells: str) -> tuple[str, ...]:
    """The first lines of a table in Markdown, after an empty one."""
    return "", table_row(*cells), table_row(*("---" for _ in cells))


def table_row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _tested(results: dict[str, Any], test: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a table with the results on the test set."""
    rows = results["classifier"]["rows"]
    teacher = results["classifier"]["accuracy"]
    accuracy = f"{test['accuracy']:.1%}" if "accuracy" in test else ""
    return f"{test['saved']:.1%}", f"{test['changed']} of {rows:,}", accuracy, f"{teacher:.1%}"


def _form(chosen: dict[str, Any]) -> tuple[str, str]:
    """The heads of exits, and how they agree with the classifier."""
    agreement = " ".join(f"{100 * share:.1f}" for share in chosen["agreement"])
    form = chosen["form"]
    hidden = f"hidden layer of {form['width']}" if form["width"] else "linear"
    queries = f" with {form['queries']} queries" if form.get("queries") else ""
    return f"{form['pooling']}{queries}, {hidden}, every {form['every']}", agreement


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice([*RUNS]), default=[*RUNS])
@click.option("--times", "timed", is_flag=True, help="Also measure times.")
@click.option(
    "--int8", is_flag=True, help="Let texts run in int8 first where that takes less time."
)
@exits_with_one_line
def main(data: Path, work: Path, only: tuple[str, ...], timed: bool, int8: bool) -> None:
    """Convert and test all classifiers, and write the tables."""
    folder = work / "conversions"
    folder.mkdir(parents=True, exist_ok=True)
    for name in only:
        for seed in RUNS[name].seeds:
            suffix = "-int8" if int8 else ""
            results = Results(folder / f"{name}-{seed}{suffix}.json")
            study(RUNS[name], seed, data, work, timed, int8, results)
    every = {file.stem: Results(file).known for file in sorted(folder.glob("*.json"))}
    head = f"{cpu_name()}, {usable_cores()} cores"
    (folder / "tables.md").write_text("\n".join([head, "", *tables(every), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
