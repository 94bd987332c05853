"""Tiny classifiers with random weights, and one that is converted once."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fpabee.calibration import Bound
from fpabee.calibration.progress import Progress
from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.convert import (
    Conversion,
    ConvertOptions,
    classification,
    convert,
    heads,
    ranking,
    workflow,
)
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.targets.builders import BUILDERS, INT8_TARGETS, OPENVINO_TARGETS
from fpabee.exporter.training import bag_of_ngrams
from fpabee.runtime.artifact.manifest import ProblemType

from ...conftest import WORDS, MadeOnce
from ...doubles.hub import serve
from ...programs import spy, write_lines
from ..conftest import require

SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL
RANKING = ProblemType.RANKING
LABELS = ("no", "perhaps", "yes")
# Families, with settings that change their heads.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in _FAMILIES},
    "deberta-v2 with tanh": ("deberta-v2", {"pooler_hidden_act": "tanh"}),
    "modernbert with means": (
        "modernbert",
        {
            "classifier_pooling": "mean",
            "classifier_bias": True,
            "classifier_activation": "relu",
            "norm_bias": True,
        },
    ),
}


def classifier_config(source: Path, labels: Sequence[str], problem_type: str | None) -> Any:
    """The settings of a tiny model's encoder for a plain classifier."""
    config = AutoConfig.from_pretrained(source)
    del config.fpabee, config.architectures
    config.problem_type = problem_type
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return config


def save(model: Any, source: Path, folder: Path) -> Path:
    """Write a classifier, with the tokenizer of a tiny model."""
    model.save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def make(tiny_models: Mapping[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a classifier with random weights and the tokenizer of the tiny model."""

    def make(kind: str, labels: Sequence[str] = LABELS, **changes: Any) -> Path:
        family, settings = KINDS[kind]
        source = tiny_models[family]
        config = classifier_config(source, labels, None)
        for name, value in (settings | changes).items():
            setattr(config, name, value)
        torch.manual_seed(5)
        build: Any = AutoModelForSequenceClassification.from_config
        model = build(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # by default they are all 0, or all 1
                nn.init.normal_(parameter, std=0.3)
        return save(model, source, tmp_path / "classifier")

    return make


@pytest.fixture
def classifier(make: Callable[..., Path]) -> Classifier:
    """A BERT classifier with random weights."""
    return Classifier(make("bert"))


TEXTS = tuple(
    dict.fromkeys(
        " ".join(random.Random(seed).choices(WORDS, k=1 + seed % 7)) for seed in range(700)
    )
)


def make_telling(
    source: Path, folder: Path, problem_type: str | None, labels: Sequence[str] = LABELS
) -> Path:
    """Write a BERT classifier whose decisions differ from text to text.

    Args:
        source: a tiny model, whose encoder and tokenizer it gets.
        folder: where to.
        problem_type: its task, if it names it.
        labels: in the order of its logits.
    """
    config = classifier_config(source, labels, problem_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        build: Any = AutoModelForSequenceClassification.from_config
        model = build(config).eval()
        weights = load_file(source / "model.safetensors")
        model.load_state_dict({n: w for n, w in weights.items() if n.startswith("bert.")}, False)
        nn.init.normal_(model.classifier.weight)
    rows = AutoTokenizer.from_pretrained(source)(TEXTS[:64], return_tensors="pt", padding=True)
    with torch.no_grad():
        model.classifier.weight *= 4 / model(**rows).logits.std()
        model.classifier.bias -= model(**rows).logits.mean(dim=0)
    return save(model, source, folder)


@pytest.fixture(scope="session")
def telling(tiny_models: Mapping[str, Path], shared_root: Path) -> Mapping[str, Path]:
    """Classifiers whose decisions differ from text to text, by their task. Read-only."""
    source = tiny_models["bert"]
    return MadeOnce(
        shared_root / "telling", lambda task, folder: make_telling(source, folder, task)
    )


QUERIES = [
    {
        "query": " ".join(random.Random(seed).choices(WORDS, k=6)),
        "documents": [
            " ".join(random.Random(100 * seed + n).choices(WORDS, k=1 + n % 9))
            for n in range(5 + seed % 4)
        ],
    }
    for seed in range(320)
]


def make_reranker(source: Path, folder: Path, identity: bool = False) -> Path:
    """Write a BERT reranker, as sentence-transformers writes it, whose scores differ.

    Args:
        source: a tiny model, whose encoder and tokenizer it gets.
        folder: where to.
        identity: whether its scores are its logits; otherwise their sigmoid.
    """
    make_telling(source, folder, None, ("score",))
    name = "linear.Identity" if identity else "activation.Sigmoid"
    settings = {"model_type": "CrossEncoder", "activation_fn": f"torch.nn.modules.{name}"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def reranker(tiny_models: Mapping[str, Path], shared_root: Path) -> Path:
    """A reranker whose scores differ from document to document. Read-only."""
    rerankers = MadeOnce(
        shared_root / "rerankers", lambda _, folder: make_reranker(tiny_models["bert"], folder)
    )
    return rerankers["bert"]


@pytest.fixture(scope="session")
def queries(shared_root: Path) -> Path:
    """A file of some hundred distinct queries, of which every tenth is there twice."""
    return write_lines(shared_root / "queries.jsonl", [*QUERIES, *QUERIES[::10]])


@pytest.fixture(scope="session")
def texts(shared_root: Path) -> Path:
    """A file of some hundred distinct texts, of which every fifth is there twice; all say yes."""
    rows = [{"text": text, "label": "yes"} for text in (*TEXTS, *TEXTS[::5])]
    return write_lines(shared_root / "texts.jsonl", rows)


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Lets a conversion take a few seconds: few queries, few steps, one target."""
    patch.setattr(heads, "_QUERIES", (2,))
    patch.setattr(heads, "_MOST_STEPS", 60)
    patch.setattr(heads, "_LR", 0.03)
    patch.setattr(heads, "cost_of_heads", lambda *_: 0.01)
    patch.setattr(bag_of_ngrams, "_MOST_EPOCHS", 4)
    patch.setattr(workflow, "buildable", lambda names: [])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `quickly`."""
    quickly(monkeypatch)


INT8 = INT8_TARGETS[0]


@pytest.fixture
def with_int8(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions quantize for ONNX Runtime; a tiny random model has no robust answers."""
    pytest.importorskip("nncf")
    if BUILDERS[INT8].why_not() is not None:
        pytest.skip("this CPU cannot run int8")
    require(monkeypatch, 0.0)
    monkeypatch.setattr(workflow, "buildable", {INT8_TARGETS: [INT8], OPENVINO_TARGETS: []}.get)


# With so many changes allowed, some hundred texts certify something.
OPTIONS = ConvertOptions(bound=Bound(changed_answers=0.1))


@pytest.fixture
def convert_here(
    telling: Mapping[str, Path], texts: Path, quick: None, tmp_path: Path
) -> Callable[..., Conversion]:
    """Converts the classifier with one label for each text, or another model, to `engines`."""

    def run(
        options: ConvertOptions = OPTIONS,
        *progress: Progress,
        file: Path = texts,
        model: Path = telling[SINGLE.value],
    ) -> Conversion:
        return convert(model, file, tmp_path / "engines", options, *progress)

    return run


@dataclass
class Converted:
    """A conversion, and how it called some functions, by their names."""

    folder: Path
    result: Conversion
    calls: dict[str, Any]


def convert_and_note(model: object, file: Path, folder: Path, options: ConvertOptions) -> Converted:
    """Convert a model quickly, and note how functions that both kinds need were called."""
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        noted = {
            name: spy(patch, module, name)
            for module, names in (
                (workflow, "choose_exits train_heads _too_few"),
                (classification, "learn calibrate"),
                (ranking, "calibrate_ranking"),
            )
            for name in names.split()
        }
        result = convert(str(model), file, folder, options)
    return Converted(folder, result, {name: each.call_args for name, each in noted.items()})


@pytest.fixture(scope="session")
def converted(
    telling: Mapping[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    """A conversion of the classifier with one label for each text, from a hub. Read-only."""
    folder = tmp_path_factory.mktemp("converted") / "engines"
    with serve(folder.parent / "cache") as hub:
        hub.add("owner/name", telling[SINGLE.value])
        made = convert_and_note("owner/name", texts, folder, OPTIONS)
    shutil.rmtree(folder.parent / "cache")
    return made
