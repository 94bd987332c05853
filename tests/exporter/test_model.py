"""Every family gives the logits of a plain Hugging Face forward pass: whole, cut, and exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoTokenizer,
    DebertaV2Config,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from fpabee.exporter import segments
from fpabee.exporter.backbones import _FAMILIES, build_encoder, family_of
from fpabee.exporter.backbones.base import attention_bias
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.exit_config import MultiExitConfig, Pooling
from fpabee.exporter.model import MultiExitModel
from fpabee.exporter.onnx_file import chain_logits
from fpabee.runtime import Engine, Entropy, simulate
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS, MASK_FILL, ProblemType
from fpabee.runtime.backends.onnxruntime import cpu_session
from fpabee.runtime.encoding import Text, TextEncoder, padded_batches, padding_values
from fpabee.runtime.errors import ModelError

from ..closeness import assert_close, assert_exits, assert_exported

LENGTHS = (33, 40, 1, 12)
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
DEBERTA = SMALL | {"relative_attention": True, "pos_att_type": "p2c|c2p", "type_vocab_size": 2}
MODERN = SMALL | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
GROUPS = SMALL | {"num_hidden_layers": 4, "embedding_size": 8}
DEBERTA_CONFIG: Any = DebertaV2Config  # whose settings are not all declared
# Settings that published models of a family differ in.
VARIANTS: dict[str, PreTrainedConfig] = {
    "albert with two groups": AlbertConfig(**GROUPS, num_hidden_groups=2),
    "albert with two layers in a group": AlbertConfig(**GROUPS, inner_group_num=2),
    "albert without shared layers": AlbertConfig(**GROUPS, num_hidden_groups=4),
    "deberta-v2 with projections of its own": DEBERTA_CONFIG(**DEBERTA, share_att_key=False),
    "deberta-v2 with buckets": DEBERTA_CONFIG(**DEBERTA, position_buckets=6, share_att_key=True),
    "deberta-v2 with a convolution": DEBERTA_CONFIG(**DEBERTA, conv_kernel_size=5, conv_act="gelu"),
    "deberta-v2 with normed positions": DEBERTA_CONFIG(**DEBERTA, norm_rel_ebd="layer_norm"),
    "deberta-v2 with a shorter reach": DEBERTA_CONFIG(**DEBERTA, max_relative_positions=4),
    "deberta-v2 with narrow embeddings": DEBERTA_CONFIG(**DEBERTA, embedding_size=8),
    "deberta-v2 with one term": DEBERTA_CONFIG(**DEBERTA | {"pos_att_type": "c2p"}),
    "deberta-v2 without relative attention": DEBERTA_CONFIG(**SMALL),
    "electra with wide embeddings": ElectraConfig(**SMALL, embedding_size=16),
    "electra with narrow embeddings": ElectraConfig(**SMALL, embedding_size=8),
    "modernbert with local layers alone": ModernBertConfig(
        **MODERN, layer_types=["sliding_attention"] * 3
    ),
    "modernbert with one global layer": ModernBertConfig(
        **MODERN,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 7.0}},
    ),
    "modernbert with biases": ModernBertConfig(**MODERN, norm_bias=True, attention_bias=True),
    "roberta that pads with 0": RobertaConfig(
        **SMALL | {"max_position_embeddings": 41}, type_vocab_size=1
    ),
}


def small_model(config: PreTrainedConfig, exits: tuple[int, ...]) -> MultiExitModel:
    torch.manual_seed(7)
    encoder = build_encoder(config)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # otherwise they are all 0, or all 1
            torch.nn.init.normal_(parameter, std=0.3)
    return MultiExitModel(encoder, MultiExitConfig(exits, ("a", "b"))).eval()


def batch(model: MultiExitModel) -> dict[str, Tensor]:
    """Rows of several lengths with two sentence types, padded."""
    torch.manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape)
    inputs = {"input_ids": torch.where(mask == 1, ids, model.backbone.config.pad_token_id)}
    inputs["attention_mask"] = mask
    if model.backbone.token_types:
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape) * mask
    return inputs


def by_hand(model: MultiExitModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of all exits through Hugging Face's own forward pass."""
    encoder = model.get_submodule(model.backbone.prefix)
    # ALBERT reports every layer of a group, while an exit sits after the whole group.
    step = getattr(encoder.config, "inner_group_num", 1)
    output = encoder(**inputs, output_hidden_states=True)
    hidden = list(output.hidden_states[::step])
    norm = getattr(encoder, "final_norm", lambda states: states)
    hidden = [*map(norm, hidden[:-1]), output.last_hidden_state]
    pooler = getattr(encoder, "pooler", model.pooler)
    dense = pooler if isinstance(pooler, nn.Linear) else getattr(pooler, "dense", None)
    logits = []
    exits = model.exit_config.exits
    for number, (layer, classifier) in enumerate(zip(exits, model.classifiers, strict=True)):
        if model.exit_config.pooling is Pooling.CLS:
            assert isinstance(dense, nn.Linear)
            pooled = torch.tanh(dense(hidden[layer][:, 0]))
        else:
            rows = zip(hidden[layer], inputs["attention_mask"].bool(), strict=True)
            tokens = [row[real] for row, real in rows]
            if model.exit_config.pooling is Pooling.MEAN:
                pooled = torch.stack([row.mean(dim=0) for row in tokens])
            else:
                queries = model.get_submodule(f"queries.{number}").weight
                attention = [(row @ queries.T).softmax(dim=0).T @ row for row in tokens]
                pooled = torch.stack(attention).flatten(1)
            if number < len(model.hidden):
                pooled = functional.gelu(model.get_submodule(f"hidden.{number}.dense")(pooled))
        logits.append(classifier(pooled))
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("pooling", "hidden_layers", "queries"),
    [(Pooling.CLS, 0, 0), (Pooling.MEAN, 2, 0), (Pooling.ATTENTION, 2, 3)],
)
@pytest.mark.parametrize("family", sorted(_FAMILIES))
@torch.no_grad()
def test_logits_are_those_of_a_plain_forward_pass(
    family: str,
    pooling: Pooling,
    hidden_layers: int,
    queries: int,
    tiny_models: Mapping[str, Path],
) -> None:
    model = load_checkpoint(tiny_models[family])
    inputs = batch(model)
    if pooling is model.exit_config.pooling:
        fast = load_checkpoint(tiny_models[family], attention=None)
        assert_exported(fast(**inputs), model(**inputs))
    config = replace(
        model.exit_config, pooling=pooling, hidden_layers=hidden_layers, queries=queries
    )
    torch.manual_seed(3)  # for the heads
    model = MultiExitModel(model.backbone.encoder, config).eval()
    for name, weight in model.named_parameters():
        if name.startswith("queries."):
            torch.nn.init.normal_(weight)
    logits = model(**inputs)
    assert logits.dtype == torch.float32
    assert_exported(logits, by_hand(model, inputs))
    assert logits.std(dim=(1, 2)).min() > 1e-3, "logits that hardly vary prove nothing"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_give_the_same_and_computing_ahead_changes_nothing(variant: str) -> None:
    config = VARIANTS[variant]
    exits = tuple(range(1, config.num_hidden_layers + 1))
    model = small_model(config, exits)
    inputs = batch(model)
    expected = model(**inputs)
    mask = inputs["attention_mask"]
    assert_exported(expected, by_hand(model, inputs))
    assert expected.std(dim=(1, 2)).min() > 1e-2
    cut = segments.cut(model, exits)
    for length in (40, 17):
        state = {name: inputs[name][:, :length] for name in inputs if name != "attention_mask"}
        state["attention_bias"] = attention_bias(mask[:, :length])
        logits = []
        for name in (call for segment in cut.segments for call in segment.calls):
            outputs = cut.modules[name](state)
            logits += [outputs["logits"]] if "logits" in outputs else []
            state |= {key.removeprefix("next_"): value for key, value in outputs.items()}
        rows = mask.sum(dim=1) <= length
        assert_exported(torch.stack(logits)[:, rows], expected[:, rows])


def test_new_queries_weigh_all_tokens_alike() -> None:
    config = MultiExitConfig((1, 2), ("a", "b"), pooling=Pooling.ATTENTION, queries=3)
    model = MultiExitModel(build_encoder(VARIANTS["electra with wide embeddings"]), config)
    states = torch.randn(2, 5, 16)
    bias = attention_bias(torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))
    means = torch.stack([states[0, :3].mean(dim=0), states[1].mean(dim=0)])
    for head in model.parts[2]:
        torch.testing.assert_close(head.pool(states, bias), means.repeat(1, 3))


TEXTS: tuple[Text, ...] = (
    "good film",
    "",
    "the plot is bad but the music is good and the film is not",
    ("turn on the lights", "turn off the lights in the morning and in the evening"),
    ("", "rain"),
    "the book on the table " * 5,
    "a",
    ("call mum " * 3, "play the music and set the alarm " * 12),
    ("set the alarm to the morning " * 12, "stop"),
    "the weather is bad " * 40,
)
LONGEST = 64


# The softmax of the first is exactly 0 on padding. That of the second is a number next to 0, as the
# first gives on ARM.
FILLS = (MASK_FILL, -95.0)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("pooling", Pooling)
@torch.no_grad()
def test_no_form_of_head_sees_padding(pooling: Pooling, fill: float) -> None:
    queries = 2 if pooling is Pooling.ATTENTION else 0
    config = MultiExitConfig((1, 2), ("a", "b"), pooling=pooling, queries=queries)
    encoder = build_encoder(VARIANTS["electra with wide embeddings"])
    head = MultiExitModel(encoder, config).eval().parts[2][0]
    for weight in head.parameters():
        torch.nn.init.normal_(weight)
    states = torch.randn(2, 9, 16)
    padded = head(states, torch.tensor([0.0] * 4 + [fill] * 5).expand(2, 1, 1, 9))
    assert_exported(padded, head(states[:, :4], torch.zeros(2, 1, 1, 4)))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("family", ["albert", "bert"])
def test_graphs_of_heads_that_attend_do_not_see_padding(
    family: str, fill: float, attending_engines: Mapping[str, Path]
) -> None:
    engines = EnginesFolder.read(attending_engines[family])
    manifest = engines.manifest
    rows = TextEncoder(engines.path, manifest.tokenizer).encode(TEXTS)
    padding = padding_values(manifest.tokenizer) | {ATTENTION_BIAS: fill}

    def logits(batch: int) -> NDArray[np.float32]:
        batches = padded_batches(rows, padding, batch)
        return chain_logits(
            manifest, batches, lambda name: cpu_session(engines.graph(manifest.graphs[name]))
        )

    assert_exported(logits(batch=len(rows)), logits(batch=1))


# XLM-RoBERTa and CamemBERT are RoBERTa with other tokenizers: see test_tokenizer.py.
EXPORTED = sorted(_FAMILIES.keys() - {"xlm-roberta", "camembert"})


@pytest.mark.parametrize("family", EXPORTED)
def test_the_engine_gives_the_models_logits(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    check_engine(engines[family], tiny_models[family])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("albert", "bert") else pytest.mark.slow)
        for family in EXPORTED
    ],
)
def test_heads_that_attend_give_the_models_logits(
    family: str, attending_engines: Mapping[str, Path], attending_models: Mapping[str, Path]
) -> None:
    check_engine(attending_engines[family], attending_models[family])


def check_engine(folder: Path, model_dir: Path) -> None:
    """The engine gives the logits of the model, for texts alone and together."""
    model = load_checkpoint(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = []
    lengths = []
    for text in TEXTS:
        pair = (text, None) if isinstance(text, str) else text
        row = tokenizer(*pair, truncation=True, return_tensors="pt")
        lengths.append(row["input_ids"].shape[1])
        with torch.no_grad():
            expected.append(model(**row)[:, 0].numpy())
    assert lengths.count(LONGEST) == 3, "two pairs and a text are too long"
    with Engine.load(folder) as engine:
        together = engine.trace(TEXTS)
        alone = np.concatenate([engine.trace([text]).logits for text in TEXTS], axis=1)
        task = engine.manifest.task
        scores = simulate(together.logits, Entropy(threshold=1), task.problem_type).scores
        rule = Entropy(threshold=float(np.median(scores[0])))
        live = engine.trace(TEXTS * 3, rule=rule)
        whole = engine.trace(TEXTS * 3)
    assert together.lengths.tolist() == lengths
    assert_exported(together.logits, np.stack(expected, axis=1))
    assert_close(together.logits, alone)
    # The carried tensors of rows that stop must leave with them, and those of others must stay.
    assert_exits(live.exits, whole.logits, rule, task)
    assert len(set(live.exits.tolist())) > 1
    assert_close(live.logits, np.where(np.isnan(live.logits), np.nan, whole.logits))


def test_the_first_two_exits_of_new_models_have_a_hidden_layer() -> None:
    for exits, labels, changes, expected in (
        ((1, 2, 3), "abc", {}, 2),
        ((6, 12), "abc", {}, 1),
        ((12,), "abc", {}, 0),
        ((1, 2, 3), "ab", {}, 0),
        ((1, 2, 3), "abc", {"pooling": Pooling.CLS}, 0),
        ((1, 2, 3), "abc", {"problem_type": ProblemType.MULTI_LABEL}, 0),
    ):
        settings: dict[str, Any] = {"pooling": Pooling.MEAN} | changes
        config = MultiExitConfig(exits, tuple(labels), **settings).with_hidden_layers(24)
        assert config.hidden_layers == expected


def test_families_that_are_not_supported_are_refused() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: albert, bert, cam"):
        family_of("gpt2")
    scaled = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    config = ModernBertConfig(
        **MODERN, rope_parameters={"full_attention": scaled, "sliding_attention": ROPE}
    )
    with pytest.raises(ModelError, match="of type 'dynamic'"):
        family_of("modernbert")(build_encoder(config))
