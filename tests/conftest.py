"""Options of the test suite, and tiny random models with their engines folders: no downloads."""

from __future__ import annotations

import os
import random
import shutil
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import numpy as np
import pytest
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest, sha256_of
from fpabee.runtime.artifact.manifest import (
    EXIT_0_NAME,
    REFERENCE_NAME,
    ExitZeroSpec,
    FirstStageSpec,
    ProblemType,
    with_operating_points,
)
from fpabee.runtime.artifact.operating_point import Goal, OperatingPoint, QuickPass
from fpabee.runtime.artifact.quick import logits_sha256
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.encoding import TextEncoder
from fpabee.runtime.engine import Engine
from fpabee.runtime.exit_0 import ExitZero, ngrams
from fpabee.runtime.rules.rules import ExitRule

from .doubles.hub import Hub, serve

# fmt: off
WORDS = (
    "the", "a", "it", "is", "not", "but", "and", "good", "bad", "film", "plot", "music", "play",
    "stop", "turn", "on", "off", "light", "lights", "weather", "rain", "sun", "set", "alarm",
    "morning", "evening", "book", "table", "flight", "to", "from", "london", "call", "mum",
)
# fmt: on

CLASSIFICATION = (ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL)
"""The tasks whose rows do not depend on each other."""

_SEED = 20240607
QUICK = "onnxruntime-int8"
"""The target of quick passes in tests, see `add_quick_pass`."""
_POSITIONS = 64

# By default the same examples are tried every time, so that a failure is due to a change.
hypothesis.settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=100, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too, more thoroughly")
    parser.addoption(
        "--seconds", type=float, default=5, help="how long to fuzz each target, and to soak"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("thorough" if config.getoption("--all") else "fast")


# Families whose encoders are those of another family. Their exports, which take seconds, are slow.
_NEAR_COPIES = ("roberta", "xlm-roberta", "camembert", "electra")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --all or -m slow")
    for item in items:
        exports = "engines" in getattr(item, "fixturenames", ())
        if "slow" in item.keywords or (exports and any(f in item.name for f in _NEAR_COPIES)):
            item.add_marker(skip)


@dataclass(frozen=True)
class _Tiny:
    """What sets a tiny model apart."""

    specials: dict[str, str]  # role to token, in the order of their ids
    labels: tuple[str, ...]
    problem_type: ProblemType
    pooling: str
    token_types: bool
    config: dict[str, Any]


_SIZES = {"intermediate_size": 64, "max_position_embeddings": _POSITIONS}
_OF_BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
_OF_ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>"}
_SINGLE = ProblemType.SINGLE_LABEL
_MULTI = ProblemType.MULTI_LABEL
# The first two positions of these families are not used.
_AFTER_PADDING = {"max_position_embeddings": _POSITIONS + 2}
_LIKE_ROBERTA = _Tiny(
    _OF_ROBERTA, ("left", "right"), _SINGLE, "mean", False,
    _SIZES | _AFTER_PADDING | {"type_vocab_size": 1},
)  # fmt: skip
# The first three differ most in structure: most tests run over these. All of them are held
# against Hugging Face's forward pass, and most are exported, in tests/exporter/.
_TINY = {
    "bert": _Tiny(
        _OF_BERT, ("music", "weather", "alarm", "travel"), _SINGLE, "mean", True, _SIZES
    ),
    "albert": _Tiny(
        _OF_BERT, ("no", "perhaps", "yes"), _SINGLE, "cls", True, _SIZES | {"embedding_size": 16}
    ),
    "mpnet": _Tiny(
        _OF_ROBERTA, ("food", "staff", "price", "place", "other"), _MULTI, "mean", False,
        _SIZES | _AFTER_PADDING,
    ),
    "roberta": _LIKE_ROBERTA,
    "xlm-roberta": _LIKE_ROBERTA,
    "camembert": _LIKE_ROBERTA,
    "electra": _Tiny(
        _OF_BERT, ("real", "replaced", "unsure"), _SINGLE, "mean", True,
        _SIZES | {"embedding_size": 16},
    ),
    "distilbert": _Tiny(
        _OF_BERT, ("small", "fast"), _MULTI, "cls", False,
        {"hidden_dim": 64, "max_position_embeddings": _POSITIONS},
    ),
    "deberta-v2": _Tiny(
        {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"},
        ("entailment", "neutral", "contradiction"), _SINGLE, "mean",
        True,  # the tokenizer names them, the model has none
        _SIZES
        | {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 8}
        | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
        | {"position_biased_input": False, "conv_kernel_size": 3},
    ),
    "modernbert": _Tiny(
        {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"},
        ("old", "new", "both"), _SINGLE, "cls", False, _SIZES | {"local_attention": 8},
    ),
}  # fmt: skip


class MadeOnce(Mapping[str, Path]):
    """Folders by name, made when a test first asks for one and shared by all workers.

    It iterates over the families of the tiny models.

    Args:
        root: the folder of these folders.
        make: makes one of them.
        ahead: names that a worker makes, the last first, while another one makes what it needs.
    """

    def __init__(
        self, root: Path, make: Callable[[str, Path], object], ahead: Sequence[str] = ()
    ) -> None:
        self._root = root
        self._make = make
        self._ahead = ahead
        root.mkdir(exist_ok=True)

    def __getitem__(self, family: str) -> Path:
        if not self._make_once(family, timeout=0):
            missing = [name for name in self._ahead if not (self._root / name).is_dir()]
            if missing:
                self._make_once(missing[-1], timeout=0)
            self._make_once(family)
        return self._root / family

    def _make_once(self, family: str, timeout: float = -1) -> bool:
        """Make a folder that is not there; False if another worker makes it for too long."""
        folder = self._root / family
        try:
            with FileLock(f"{folder}.lock", timeout):
                if not folder.is_dir():
                    self._make(family, folder)
        except Timeout:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(_TINY)

    def __len__(self) -> int:
        return len(_TINY)


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all pytest-xdist workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def user_cache(shared_root: Path) -> Iterator[None]:
    """The user's cache directory of this run, which is not that of the person who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_root / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def every_cpu_runs_int8() -> Iterator[None]:
    """Tests of int8 run on CPUs without VNNI, too: none of them depends on large sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpabee.runtime.machine._VNNI", {"fpu"})  # which every x86 CPU has
        yield


@pytest.fixture(scope="session")
def tiny_models(shared_root: Path) -> Mapping[str, Path]:
    """A model_dir of each family: 3 layers, 32 wide, an exit after each, distinct weights."""
    return MadeOnce(shared_root / "models", make_model)


@pytest.fixture(scope="session")
def engines(tiny_models: Mapping[str, Path], shared_root: Path) -> Mapping[str, Path]:
    """The engines folder of each tiny model. Read-only: use `engine_copy` to damage one."""
    from fpabee.exporter import export

    ahead = [family for family in _TINY if family not in _NEAR_COPIES]  # a whole run needs them
    return MadeOnce(
        shared_root / "engines", lambda family, folder: export(tiny_models[family], folder), ahead
    )


@pytest.fixture(scope="session")
def attending_models(shared_root: Path) -> Mapping[str, Path]:
    """The tiny models with heads that attend, with two queries and a hidden layer."""
    return MadeOnce(
        shared_root / "attending_models",
        lambda family, folder: make_model(family, folder, queries=2),
    )


@pytest.fixture(scope="session")
def attending_engines(
    attending_models: Mapping[str, Path], shared_root: Path
) -> Mapping[str, Path]:
    """The engines folders of these models. Read-only."""
    from fpabee.exporter import export

    return MadeOnce(
        shared_root / "attending_engines",
        lambda family, folder: export(attending_models[family], folder),
    )


@pytest.fixture(scope="session")
def ranking_engines(shared_root: Path) -> Mapping[str, Path]:
    """The engines folders of the tiny models as rerankers: one logit for a pair. Read-only."""
    from fpabee.exporter import export

    def make(family: str, folder: Path) -> None:
        model = make_model(family, folder.with_name(f"{folder.name}-model"), ranks=True)
        export(model, folder)

    return MadeOnce(shared_root / "ranking_engines", make)


@pytest.fixture(scope="session")
def first_stage_engines(
    ranking_engines: Mapping[str, Path], shared_root: Path
) -> Mapping[str, Path]:
    """The same folders with an exit 0, which predicts from the scores of a search. Read-only."""

    def make(family: str, folder: Path) -> None:
        shutil.copytree(ranking_engines[family], folder)
        add_first_stage(folder)

    return MadeOnce(shared_root / "first_stage_engines", make)


def add_first_stage(folder: Path) -> None:
    """Give an engines folder that ranks an exit 0 for scores."""
    spec = FirstStageSpec(weights=(0.5, 0.25, -0.125), bias=0.1)
    engines = EnginesFolder.read(folder)
    texts, reference = read_reference(engines)
    engines.with_manifest(first_stage=spec).write()
    write_reference(folder, texts, np.stack([np.zeros_like(reference[0]), *reference]))
    correct_reference(folder)


@pytest.fixture(scope="session")
def exit_0_engines(engines: Mapping[str, Path], shared_root: Path) -> Mapping[str, Path]:
    """The same folders with an exit 0. Read-only."""

    def make(family: str, folder: Path) -> None:
        shutil.copytree(engines[family], folder)
        add_exit_0(folder)

    return MadeOnce(shared_root / "exit_0_engines", make)


def add_exit_0(folder: Path, seed: int = 0) -> None:
    """Give an engines folder an exit 0 that is often sure and akin to the later exits.

    It is fitted to the last exit's logits on random texts, with noise that the seed draws.
    """
    manifest = read_manifest(folder)
    texts = [" ".join(random.Random(n).choices(WORDS, k=n % 12 + 1)) for n in range(400)]
    with Engine.load(folder, threads=1) as engine:
        rows = engine.core.encode(texts)
        logits = engine.trace(texts).logits[-1]
    unigrams = 200
    buckets = 256
    found, counts = ngrams(rows, unigrams, buckets)
    bags = np.zeros((len(rows), unigrams + buckets))
    np.add.at(bags, (np.repeat(np.arange(len(rows)), counts), found), np.repeat(1 / counts, counts))
    squares = bags.T @ bags + 0.02 * np.eye(bags.shape[1])
    table = np.linalg.solve(squares, bags.T @ logits)
    table += np.random.default_rng(seed).normal(scale=0.5, size=table.shape)
    labels = len(manifest.task.labels)
    arrays: dict[str, Any] = {
        "table": table.astype(np.float16),
        "weights": np.eye(labels, dtype=np.float32),
        "bias": np.linspace(-0.1, 0.1, labels, dtype=np.float32),
    }
    set_exit_0(folder, unigrams, **arrays)
    texts_of_reference, reference = read_reference(EnginesFolder(folder, manifest))
    exit_0 = ExitZero(unigrams, **arrays)
    encoder = TextEncoder(folder, manifest.tokenizer)
    first = exit_0(encoder.encode(texts_of_reference))
    write_reference(folder, texts_of_reference, np.stack([first, *reference]))
    correct_reference(folder)


def correct_reference(folder: Path) -> None:
    """Let the manifest of an engines folder name the reference answers as they are."""
    manifest = read_manifest(folder)
    files = {**manifest.files, REFERENCE_NAME: sha256_of(folder / REFERENCE_NAME)}
    EnginesFolder(folder, manifest).with_manifest(files=files).write()


def set_exit_0(folder: Path, unigrams: int, **arrays: NDArray[Any]) -> None:
    """Write an exit 0 into an engines folder, with its hash in the manifest."""
    np.savez(folder / EXIT_0_NAME, **arrays)  # type: ignore[arg-type]
    spec = ExitZeroSpec(
        file=EXIT_0_NAME,
        sha256=sha256_of(folder / EXIT_0_NAME),
        unigrams=unigrams,
        buckets=len(arrays["table"]) - unigrams,
    )
    EnginesFolder.read(folder).with_manifest(exit_0=spec).write()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, and an empty cache."""
    with serve(tmp_path / "cache") as hub:
        yield hub


def add_quick_pass(
    folder: Path, rule: ExitRule, name: str = "quick", alone: ExitRule | None = None
) -> None:
    """Give a folder a target `onnxruntime-int8`, and a point whose quick pass runs in it.

    Its graphs are those in fp32 with other weights, so that its answers differ a little. All its
    texts run in fp32.

    Args:
        folder: the engines folder.
        rule: that of the point, with thresholds for the exits of the quick pass and one more.
        name: that of the point.
        alone: the rule of a point `alone` without a quick pass; None: there is none.
    """
    import onnx
    from onnx import numpy_helper

    engines = EnginesFolder.read(folder)
    manifest = engines.manifest
    random_numbers = np.random.default_rng(7)
    (folder / "onnx" / "int8").mkdir()
    graphs = {}
    for graph_name, graph in manifest.graphs.items():
        model = onnx.load(folder / graph.file)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim:
                noise = random_numbers.normal(scale=0.03 * values.std(), size=values.shape)
                other = numpy_helper.from_array(values + noise.astype(np.float32), tensor.name)
                tensor.CopyFrom(other)
        file = f"onnx/int8/{graph_name}.onnx"
        onnx.save(model, folder / file)
        graphs[graph_name] = msgspec.structs.replace(
            graph, file=file, sha256=sha256_of(folder / file)
        )
    exact = manifest.targets[manifest.default_target]
    quick = with_operating_points(msgspec.structs.replace(exact, precision="int8"), {}, "")
    engines = engines.with_manifest(precisions={"int8": graphs}).with_target(QUICK, quick)
    exits = len(manifest.exits)
    points = {} if alone is None else {"alone": _point(alone, exits)}
    first = QuickPass(
        target=QUICK,
        sha256=logits_sha256(engines.manifest, QUICK),
        p99_share=1.5,
        alone="" if alone is None else "alone",
    )
    points[name] = msgspec.structs.replace(_point(rule, exits + 1), quick=first)
    changed = with_operating_points(exact, points, name)
    engines.with_target(manifest.default_target, changed).write()


@pytest.fixture
def rtx() -> None:
    """Plans of TensorRT for RTX are really built."""
    for package in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture
def engine_copy(
    engines: Mapping[str, Path],
    exit_0_engines: Mapping[str, Path],
    set_points: Callable[..., None],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Copies an engines folder, so that a test may damage it; with operating points, if any."""

    def copy(
        family: str = "bert", name: str = "engines", exit_0: bool = False, **points: Any
    ) -> Path:
        source = exit_0_engines if exit_0 else engines
        folder = Path(shutil.copytree(source[family], tmp_path / name))
        if points:
            set_points(folder, **points)
        return folder

    return copy


def _point(rule: ExitRule, exits: int) -> OperatingPoint:
    """An operating point with made-up figures, for a model with this number of exits."""
    return OperatingPoint(
        rule=rule.to_dict(),
        goal=Goal(max_drop=0.5),
        metric="accuracy",
        score=0.9,
        full_depth_score=0.9,
        drop_interval=(-0.4, 0.4),
        held_out="5-fold cross-fitting",
        rows=100,
        data_sha256="0" * 64,
        mean_depth=1.0,
        exits=(100, *[0] * (exits - 1)),
    )


@pytest.fixture(scope="session")
def set_points() -> Callable[..., None]:
    """Gives a folder's target operating points: name to rule.

    The target is the default one, or a copy of it under another name.
    """

    def write(folder: Path, target: str = "", default: str = "", **rules: ExitRule) -> None:
        manifest = read_manifest(folder)
        name = target or manifest.default_target
        points = {point: _point(rule, len(manifest.exits)) for point, rule in rules.items()}
        built = manifest.targets.get(name, manifest.targets[manifest.default_target])
        changed = with_operating_points(built, points, default)
        EnginesFolder(folder, manifest).with_target(name, changed).write()

    return write


def change_point(folder: Path, name: str, **changes: Any) -> None:
    """Change an operating point of a folder's default target."""
    manifest = read_manifest(folder)
    target = manifest.targets[manifest.default_target]
    point = msgspec.structs.replace(target.operating_points[name], **changes)
    points = {**target.operating_points, name: point}
    changed = with_operating_points(target, points, target.default_operating_point)
    EnginesFolder(folder, manifest).with_target(manifest.default_target, changed).write()


def make_model(
    family: str,
    folder: Path,
    width: int = 32,
    layers: int = 3,
    queries: int = 0,
    *,
    pooling: str = "",
    ranks: bool = False,
    **sizes: int,
) -> Path:
    """Write a model_dir with random weights and an exit after every layer.

    Args:
        family: of the encoder.
        folder: where to.
        width: of the hidden states.
        layers: how many.
        queries: of heads that attend; 0: the heads are the family's tiny ones.
        pooling: of heads that do not attend; empty: that of the family's tiny ones.
        ranks: whether it gives one logit for a query and a document.
        sizes: other settings than the family's tiny ones.
    """
    import torch
    from transformers import AutoConfig

    from fpabee.exporter.backbones import build_encoder
    from fpabee.exporter.checkpoint import save_checkpoint
    from fpabee.exporter.exit_config import MultiExitConfig, Pooling
    from fpabee.exporter.model import MultiExitModel

    tiny = _TINY[family]
    vocabulary = _vocabulary(tiny)
    exits = tuple(range(1, layers + 1))
    begin, end, pad = (vocabulary[tiny.specials[role]] for role in ("cls", "sep", "pad"))
    config = AutoConfig.for_model(
        family,
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=sizes.pop("num_attention_heads", 4),
        initializer_range=0.15 * (32 / width) ** 0.5,
        pad_token_id=pad,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), begin),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), end),
        **(tiny.config | sizes),
    )
    pools = Pooling(pooling or tiny.pooling)
    multi_exit = MultiExitConfig(exits, tiny.labels, tiny.problem_type, pools)
    if ranks:
        multi_exit = MultiExitConfig(exits, ("score",), ProblemType.RANKING, pools)
    if queries:
        multi_exit = replace(
            multi_exit,
            pooling=Pooling.ATTENTION,
            queries=queries,
            hidden_layers=layers,
            hidden_width=24,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED + list(_TINY).index(family))
        model = MultiExitModel(build_encoder(config), multi_exit)
        _spread(model)
    save_checkpoint(model, folder)
    _save_tokenizer(tiny, vocabulary, folder, sizes.get("max_position_embeddings", _POSITIONS))
    return folder


def _spread(model: Any) -> None:
    """Weights that make rows stop at different exits: every word tells, and exits are akin."""
    import torch
    from torch.nn import init

    for name, weight in model.named_parameters():
        if name.endswith(("word_embeddings.weight", "tok_embeddings.weight")):
            init.normal_(weight, std=1.0)
        elif name.endswith("bias"):
            init.normal_(weight, std=0.1)
        elif name.startswith("queries."):
            init.normal_(weight, std=0.5)
    akin = init.normal_(model.classifiers[0].weight.detach().clone(), std=1.0)
    for classifier in model.classifiers:
        init.normal_(classifier.weight, std=0.3)
        classifier.weight.data += akin
    with torch.no_grad():
        ids = torch.randint(4, 4 + len(WORDS), (64, 12))
        ids[:, 0] = model.backbone.config.bos_token_id
        logits = model.eval()(ids, torch.ones_like(ids))
        for classifier, mean in zip(model.classifiers, logits.mean(dim=1), strict=True):
            classifier.bias -= mean


def _vocabulary(tiny: _Tiny) -> dict[str, int]:
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*characters, *(f"##{character}" for character in characters)]
    # "a" is a word and a character.
    every = dict.fromkeys([*tiny.specials.values(), *WORDS, *pieces])
    return {piece: index for index, piece in enumerate(every)}


def _save_tokenizer(tiny: _Tiny, vocabulary: dict[str, int], folder: Path, max_length: int) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin = tiny.specials["cls"]
    end = tiny.specials["sep"]
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=tiny.specials["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "{0} $A {1} $B:1 {1}:1" if tiny.token_types else "{0} $A {1} {1} $B {1}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=pair.format(begin, end),
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    types = ["token_type_ids"] if tiny.token_types else []
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *types, "attention_mask"],
        **{f"{role}_token": token for role, token in tiny.specials.items()},
    ).save_pretrained(folder)
