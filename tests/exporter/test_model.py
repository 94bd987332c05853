"""The multi-exit model gives the logits of a plain Hugging Face forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AlbertConfig

from fpabee.exporter.backbones import _FAMILIES, build_encoder, family_of
from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.exits import MultiExitConfig, Pooling
from fpabee.exporter.model import MultiExitModel
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import ModelError

LENGTHS = (9, 4, 1, 7)


def with_config(model: MultiExitModel, **changes: Any) -> MultiExitModel:
    """A model of the same encoder and, where an exit stays, the same head."""
    old = model.exit_config
    settings = {"exits": old.exits, "labels": old.labels, "pooling": old.pooling} | changes
    new = MultiExitModel(model.backbone.encoder, MultiExitConfig(**settings))
    for layer, head in zip(new.exit_config.exits, new.classifiers, strict=True):
        head.load_state_dict(model.classifiers[old.exits.index(layer)].state_dict())
    if new.pooler is not None and model.pooler is not None:
        new.pooler.load_state_dict(model.pooler.state_dict())
    return new.eval()


def batch(model: MultiExitModel) -> dict[str, Tensor]:
    """Rows of several lengths with two sentence types, padded."""
    torch.manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 60, shape)
    inputs = {"input_ids": torch.where(mask == 1, ids, model.backbone.config.pad_token_id)}
    inputs["attention_mask"] = mask
    if model.backbone.token_types:
        inputs["token_type_ids"] = torch.randint(0, 2, shape) * mask
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
            pooled = torch.stack([row[real].mean(dim=0) for row, real in rows])
            if number < len(model.hidden):
                pooled = functional.gelu(model.get_submodule(f"hidden.{number}.dense")(pooled))
        logits.append(classifier(pooled))
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("pooling", "hidden_layers"), [(Pooling.CLS, 0), (Pooling.MEAN, 0), (Pooling.MEAN, 2)]
)
@pytest.mark.parametrize("family", sorted(_FAMILIES))
@torch.no_grad()
def test_logits_are_those_of_a_plain_forward_pass(
    family: str, pooling: Pooling, hidden_layers: int, tiny_models: Mapping[str, Path]
) -> None:
    model = load_checkpoint(tiny_models[family])
    model = with_config(model, pooling=pooling, hidden_layers=hidden_layers)
    inputs = batch(model)
    logits = model(**inputs)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, by_hand(model, inputs), rtol=0, atol=1e-5)
    assert logits.std(dim=(1, 2)).min() > 1e-3, "logits that hardly vary prove nothing"
    first = max(1, hidden_layers)
    fewer = with_config(model, exits=model.exit_config.exits[first:])
    assert torch.equal(fewer(**inputs), logits[first:])


@pytest.mark.parametrize(("groups", "inner"), [(2, 1), (1, 2), (4, 1)])
@torch.no_grad()
def test_albert_layers_are_called_in_the_order_of_their_groups(groups: int, inner: int) -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_groups=groups,
        inner_group_num=inner,
        initializer_range=0.5,
    )
    model = MultiExitModel(build_encoder(config), MultiExitConfig((1, 2, 3, 4), ("a", "b"))).eval()
    inputs = batch(model)
    torch.testing.assert_close(model(**inputs), by_hand(model, inputs), rtol=0, atol=1e-5)
    assert model.backbone.shared_layers is (groups < 4)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ((), "not an ascending list"),
        ((2, 1), "not an ascending list"),
        ((0, 1), "do not fit an encoder of 3 layers"),
        ((1, 4), "do not fit an encoder of 3 layers"),
    ],
)
def test_exits_that_do_not_fit_are_refused(exits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        MultiExitConfig(exits, ("a", "b")).validate(3)
    assert "between 1 and 3" in caught.value.hint
    MultiExitConfig((1, 3), ("a",)).validate(3)


@pytest.mark.parametrize(
    ("exits", "labels", "changes", "expected"),
    [
        ((1, 2, 3), "abc", {}, 2),
        ((6, 12), "abc", {}, 1),
        ((12,), "abc", {}, 0),
        ((1, 2, 3), "ab", {}, 0),
        ((1, 2, 3), "abc", {"pooling": Pooling.CLS}, 0),
        ((1, 2, 3), "abc", {"problem_type": ProblemType.MULTI_LABEL}, 0),
    ],
)
def test_the_first_two_exits_of_new_models_have_a_hidden_layer(
    exits: tuple[int, ...], labels: str, changes: dict[str, Any], expected: int
) -> None:
    settings: dict[str, Any] = {"pooling": Pooling.MEAN} | changes
    config = MultiExitConfig(exits, tuple(labels), **settings).with_hidden_layers()
    assert config.hidden_layers == expected


def test_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: albert, bert, cam"):
        family_of("gpt2")
