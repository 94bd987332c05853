"""What is special about each family, from PyTorch to the running engine.

`test_model.py` compares every family with Hugging Face's own forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from fpabee.exporter import segments
from fpabee.exporter.backbones import build_encoder, family_of
from fpabee.exporter.backbones.base import attention_bias
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.exits import MultiExitConfig
from fpabee.exporter.model import MultiExitModel
from fpabee.runtime import Engine, Entropy, simulate
from fpabee.runtime.encoding import Text
from fpabee.runtime.errors import ModelError

# XLM-RoBERTa and CamemBERT are RoBERTa with other tokenizers: see test_tokenizer.py.
FAMILIES = ("roberta", "electra", "distilbert", "deberta-v2", "modernbert")
ALIKE = ("xlm-roberta", "camembert")

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
DEBERTA_CONFIG: Any = DebertaV2Config  # whose settings are not all declared
# Settings that published models of a family differ in.
VARIANTS: dict[str, PreTrainedConfig] = {
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


def small_model(variant: str) -> MultiExitModel:
    torch.manual_seed(7)
    encoder = build_encoder(VARIANTS[variant])
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # otherwise they are all 0, or all 1
            torch.nn.init.normal_(parameter, std=0.3)
    return MultiExitModel(encoder, MultiExitConfig((1, 2, 3), ("a", "b"))).eval()


def small_batch(model: MultiExitModel) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of several lengths, and the mask."""
    lengths = torch.tensor([33, 40, 1, 12])
    mask = (torch.arange(40) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(3, 60, mask.shape) * mask, "attention_mask": mask}
    if model.backbone.token_types:
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape) * mask
    return inputs, mask


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_last_layer_is_the_encoders_and_computing_ahead_changes_nothing(variant: str) -> None:
    model = small_model(variant)
    inputs, mask = small_batch(model)
    embeddings, blocks, heads = model.parts
    bias = attention_bias(mask)
    hidden, carried = embeddings(inputs["input_ids"], inputs.get("token_type_ids"))
    for block in blocks:
        hidden = block(hidden, bias, **carried)
    expected = model.backbone.encoder(**inputs).last_hidden_state
    real = mask.bool()
    difference = (heads[-1].norm(hidden) - expected)[real].abs().max()
    assert difference <= 1e-5
    assert expected[real].std() > 0.1

    expected = model(**inputs)
    for length in (40, 17):
        state = {name: inputs[name][:, :length] for name in inputs if name != "attention_mask"}
        state["attention_bias"] = attention_bias(mask[:, :length])
        logits = []
        for module in segments.cut(model, (1, 2, 3)).modules.values():
            outputs = module(state)
            logits.append(outputs["logits"])
            state |= {name.removeprefix("next_"): value for name, value in outputs.items()}
        rows = mask.sum(dim=1) <= length
        assert (torch.stack(logits) - expected)[:, rows].abs().max() <= 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *ALIKE])
@torch.no_grad()
def test_fast_attention_gives_the_same_logits(family: str, tiny_models: Mapping[str, Path]) -> None:
    eager = load_checkpoint(tiny_models[family])
    fast = load_checkpoint(tiny_models[family], attention=None)
    ids = torch.randint(5, 60, (3, 20))
    mask = (torch.arange(20) < torch.tensor([[20], [9], [13]])).long()
    torch.testing.assert_close(fast(ids, mask), eager(ids, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", *FAMILIES])
def test_the_engine_gives_the_models_logits(
    family: str, engines: Mapping[str, Path], tiny_models: Mapping[str, Path]
) -> None:
    model = load_checkpoint(tiny_models[family])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[family])
    expected, lengths = [], []
    for text in TEXTS:
        pair = (text, None) if isinstance(text, str) else text
        row = tokenizer(*pair, truncation=True, return_tensors="pt")
        lengths.append(row["input_ids"].shape[1])
        with torch.no_grad():
            expected.append(model(**row)[:, 0].numpy())
    assert lengths.count(LONGEST) == 3, "two pairs and a text are too long"
    with Engine.load(engines[family]) as engine:
        together = engine.trace(TEXTS)
        alone = np.concatenate([engine.trace([text]).logits for text in TEXTS], axis=1)
        problem_type = engine.manifest.task.problem_type
        scores = simulate(together.logits, Entropy(threshold=1), problem_type).scores
        rule = Entropy(threshold=float(np.median(scores[0])))
        live = engine.trace(TEXTS * 3, rule=rule)
        whole = engine.trace(TEXTS * 3)
    assert together.lengths.tolist() == lengths
    np.testing.assert_allclose(together.logits, np.stack(expected, axis=1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(together.logits, alone, rtol=0, atol=1e-5)
    # The carried tensors of rows that stop must leave with them, and those of others must stay.
    simulated = simulate(whole.logits, rule, problem_type)
    assert live.exits.tolist() == simulated.exits.tolist()
    assert len(set(live.exits.tolist())) > 1
    ran = ~np.isnan(live.logits)
    np.testing.assert_allclose(live.logits[ran], whole.logits[ran], rtol=0, atol=1e-5)


def test_rotary_positions_that_depend_on_the_text_are_refused() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    config = ModernBertConfig(
        **MODERN, rope_parameters={"full_attention": scaled, "sliding_attention": ROPE}
    )
    with pytest.raises(ModelError, match="of type 'dynamic'"):
        family_of("modernbert")(build_encoder(config))
