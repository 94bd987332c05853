"""Model folders that cannot be exported."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .cases import Arguments, Case, Change, Make, Place, change_config, change_json, check, each

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
PICKLE = "pytorch_model.bin"


def model(change: Change) -> Make:
    """A copy of a model, changed."""
    return lambda place: place.export(place.model(change))


def shared(*options: object) -> Make:
    """A good model, and options that do not fit it."""
    return lambda place: place.export(place.models["bert"], *options)


def config(**settings: object) -> Make:
    return model(lambda folder: change_config(folder, **settings))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    def apply(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return model(apply)


def no_heads(*architectures: str) -> Make:
    """A model without exits, whose configuration names its class."""

    def apply(folder: Path) -> None:
        kept = load_file(folder / WEIGHTS)
        save_file({n: w for n, w in kept.items() if "classifiers" not in n}, folder / WEIGHTS)
        change_config(folder, architectures=list(architectures))

    return model(apply)


def file(name: str, content: bytes | str) -> Make:
    raw = content.encode() if isinstance(content, str) else content
    return model(lambda folder: (folder / name).write_bytes(raw))


def pickled(content: object, save: Callable[..., object] = torch.save) -> Change:
    """Weights in a pickle instead of safetensors."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        with (folder / PICKLE).open("wb") as out:
            save(content, out)

    return apply


def pickle_cut_short(folder: Path) -> None:
    pickled(load_file(folder / WEIGHTS))(folder)
    (folder / PICKLE).write_bytes((folder / PICKLE).read_bytes()[:-1000])


def repeated(folder: Path) -> None:
    """One number that stands for the embeddings of 10^10 tokens."""
    content = load_file(folder / WEIGHTS)
    content["bert.embeddings.word_embeddings.weight"] = torch.zeros(1, 1).expand(10**10, 32)
    change_config(folder, vocab_size=10**10)
    pickled(content)(folder)


class Harmful:
    """Unpickling this makes a file, which the case would find."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def harmful(save: Callable[..., object]) -> Make:
    def make(place: Place) -> Arguments:
        place.patch.chdir(place.root)
        return model(pickled({"classifiers.0.weight": Harmful()}, save))(place)

    return make


def converted(change: Change) -> Make:
    """A conversion of a changed model, of which one file cannot be read."""

    def make(place: Place) -> Arguments:
        def plain(folder: Path) -> None:
            change_config(folder, architectures=None)
            change(folder)

        texts = place.file("texts.txt", "".join(f"rain {number}\n" for number in range(1000)))
        return ["convert", place.model(plain), texts, "-o", place.root / "out", "--quiet"]

    return make


def trained(change: Change) -> Make:
    """A training of a changed encoder."""

    def make(place: Place) -> Arguments:
        lines = [f'{{"text": "rain", "label": "{label}"}}\n' for label in "ab"]
        rows = place.file("rows.jsonl", "".join(lines))
        encoder = ["--backbone", place.model(change), "-o", place.root / "out", "--quiet"]
        return ["train", "--train", rows, "--dev", rows, *encoder]

    return make


def index_of(*names: str) -> Change:
    """An index of files with weights, instead of weights."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        content = {"metadata": {}, "weight_map": {f"w{name}": name for name in names}}
        (folder / f"{PICKLE}.index.json").write_text(json.dumps(content))

    return apply


def nested_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{PICKLE}.index.json").write_text("[" * 10**5)


def cut_short(name: str) -> Make:
    return model(lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300]))


def removed(*names: str) -> Make:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return model(remove)


def tokenizer(change: Callable[[Any], object]) -> Make:
    return model(lambda folder: change_json(folder / TOKENIZER, change))


def slow_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')


def slow_classifier(folder: Path) -> None:
    """A plain classifier with such a tokenizer."""
    content = load_file(folder / WEIGHTS)
    for kind in ("weight", "bias"):
        content[f"classifier.{kind}"] = content.pop(f"classifiers.2.{kind}")
    save_file(content, folder / WEIGHTS)
    slow_tokenizer(folder)


def token_limit(limit: object) -> Make:
    change: Callable[[Any], object] = lambda c: c.update(model_max_length=limit)  # noqa: E731
    return model(lambda folder: change_json(folder / "tokenizer_config.json", change))


def occupied(place: Place) -> Arguments:
    (place.root / "out").mkdir()
    place.file("out/mine.txt", "mine")
    return place.export(place.models["bert"], "--force")


BOMB = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
LAYER = "bert.encoder.layer.1.output.dense.weight"

CONFIGS = [
    Case("no folder", lambda p: p.export(p.root / "none"), "none", "train"),
    Case("no config.json", removed(CONFIG), CONFIG),
    Case("an unknown family", config(model_type="gpt2"), "'gpt2'", "deberta-v2"),
    Case("a width of words", config(hidden_size="wide"), CONFIG, "hidden_size"),
    Case("another width", config(hidden_size=64), "(173, 32)", "64"),
    Case("no attention heads", config(num_attention_heads=0), CONFIG),
    Case("no layers", config(num_hidden_layers=0), "[1, 2, 3]", "0"),
    Case("10^9 layers", config(num_hidden_layers=10**9), "num_hidden_layers", "1000000000"),
    Case("100 layers", config(num_hidden_layers=100), "1552", "bert.encoder.layer."),
    Case("a norm of NaN", config(layer_norm_eps=math.nan), CONFIG, "nan"),
    Case("a last head of NaN", config(fpabee={"exits": [1, 2, 3], "pooling": "mean", "last_head": {
         "pooling": "mean", "activation": "tanh", "norm_eps": {"__float__": "NaN"}}}), "norm_eps"),
    Case("an unknown activation", config(fpabee={"exits": [1, 2, 3], "pooling": "mean",
         "last_head": {"pooling": "mean", "activation": "nope"}}), "'nope'"),
    Case("no family", file(CONFIG, "{}"), CONFIG),
    Case("exits too deep", config(fpabee={"exits": [2, 3, 4]}), "4", "3"),
    Case("more hidden layers than exits", config(fpabee={"pooling": "mean", "hidden_layers": 9}),
         "hidden_layers", "9"),
    Case("an unknown pooling", config(fpabee={"pooling": "max"}), "'max'"),
    Case("attention without queries", config(fpabee={"pooling": "attention"}), "queries", "0"),
    Case("queries without attention", config(fpabee={"pooling": "mean", "queries": 4}), "4"),
    Case("more queries than the weights have",
         config(fpabee={"pooling": "attention", "queries": 10**9}), "queries.0.weight"),
    Case("a last head that attends", config(fpabee={"pooling": "mean", "last_head": {
         "pooling": "attention", "activation": "tanh"}}), "last head", "'attention'"),
    Case("too few label thresholds", config(fpabee={"pooling": "mean", "label_thresholds": [0.4]}),
         "label_thresholds", "[0.4]", "4"),
    Case("a label threshold above 1",
         config(fpabee={"pooling": "mean", "label_thresholds": [0.4, 0.5, 0.5, 2]}), "2.0"),
    Case("labels without numbers", config(id2label={"a": "b"}), CONFIG),
    Case("an unknown task", config(problem_type="odd"), "'odd'", "regression"),
    Case("a regression with several outputs", config(problem_type="regression"), "4 labels"),
    Case("fewer labels than the heads give", config(id2label={"0": "a", "1": "b"}), "2", "4"),
    Case("a label twice", config(id2label={str(n): "a" for n in range(4)}), "'a'"),
]  # fmt: skip

PARTS = [
    Case("no weights", removed(WEIGHTS), WEIGHTS, PICKLE),
    Case("a tensor larger than the file", file(WEIGHTS, struct.pack("<Q", len(BOMB)) + BOMB),
         WEIGHTS),
    Case("a plain classifier", no_heads(),
         "classifiers.0.weight", "fpabee-convert"),
    Case("an embedding model", no_heads("BertModel"), "an embedding model", "fpabee-train"),
    Case("a classifier of Hugging Face", no_heads("BertForSequenceClassification"),
         "BertForSequenceClassification", "fpabee-convert"),
    *(Case(f"{name} instead of a classifier",
           converted(partial(change_config, architectures=[name])), name, fact)
      for name, fact in (("BertForTokenClassification", "tokens"), ("BertForMaskedLM", "language"),
                         ("BertModel", "embedding"), ("BertMultiExit", "fpabee-export"))),
    Case("a head too many",
         weights(lambda w: w.update({"classifiers.3.weight": torch.ones(4, 32)})), "4 heads"),
    Case("a scalar head", weights(lambda w: w.update({"classifiers.0.weight": torch.ones(())})),
         CONFIG, "4", "0"),
    Case("a layer missing", weights(lambda w: w.pop(LAYER)), "1", LAYER),
    Case("a head of another shape",
         weights(lambda w: w.update({"classifiers.1.weight": torch.ones(5, 32)})), "(5, 32)"),
    Case("NaN", weights(lambda w: w["classifiers.1.bias"].fill_(math.nan)), "classifiers.1.bias"),
    Case("weights in int8",
         weights(lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})), "int8"),
    Case("a tensor larger than its values", model(repeated), "10000000000, 32)"),
    Case("a pickle cut short", model(pickle_cut_short), PICKLE),
    Case("a pickle with code in it", harmful(torch.save), PICKLE),
    Case("a pickle of a list", model(pickled([1, 2])), PICKLE),
    Case("a classifier in a pickle with code in it", converted(pickled(Harmful())), PICKLE),
    Case("an encoder in a pickle with code in it", trained(pickled(Harmful())), PICKLE),
    Case("an index of a file elsewhere", model(index_of("../outside.bin")), "'../outside.bin'"),
    Case("an index of any file", converted(index_of("/etc/passwd")), "'/etc/passwd'", "*.bin"),
    Case("an index of nothing", trained(index_of()), f"{PICKLE}.index.json"),
    Case("an index of a name that no file has", model(index_of("a\0.bin")), r"'a\x00.bin'"),
    Case("an index that is a list", converted(nested_index), f"{PICKLE}.index.json"),
    Case("a classifier of an unknown task",
         converted(lambda f: change_config(f, problem_type="odd")), "'odd'", "multi_label"),
    Case("no tokenizer", removed(TOKENIZER, "tokenizer_config.json"), TOKENIZER, "vocab.txt"),
    Case("an empty tokenizer", file(TOKENIZER, "{}"), TOKENIZER),
    Case("a tokenizer without a fast version", model(slow_tokenizer), "EsmTokenizer"),
    Case("a classifier without a fast tokenizer", converted(slow_classifier), "EsmTokenizer"),
    Case("a tokenizer with a damaged table", tokenizer(lambda t: t.update(
         normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})), "charsmap"),
    Case("tokenizer.json cut short", cut_short(TOKENIZER), "model"),
    Case("a tokenizer of a larger vocabulary",
         tokenizer(lambda t: t["model"]["vocab"].update(film=10**6)), "1000000", "173"),
    Case("a limit of no tokens", token_limit(0), "model_max_length", "0", "--max-length"),
]  # fmt: skip

OPTIONS = [
    Case("exits that are not there", shared("--exits", "2,9"), "2,9", "3"),
    Case("more tokens than positions", shared("--max-length", 65), "65", "64"),
    Case("another task", shared("--problem-type", "multi_label_classification"),
         "single_label_classification", "--problem-type"),
    Case("an output that is not ours", occupied, "out"),
    Case("an output below a file",
         lambda p: p.export(p.models["bert"], "-o", p.file("mine", "") / "engines"), "mine"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning:torch")
@each(CONFIGS, PARTS, OPTIONS)
def test_a_bad_model_dir(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


def test_the_harmful_pickle_would_have_run(place: Place) -> None:
    harmful(pickle.dump)(place)
    pickle.loads((place.root / "model" / PICKLE).read_bytes())
    assert (place.root / "ran").exists()
