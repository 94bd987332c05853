"""One small adapter for each encoder family, which knows its embeddings, layers and head.

An adapter contains no modelling code; it only calls the modules of the installed `transformers`. To
add a family, subclass `Backbone`, add the class to `_FAMILIES`, add a tiny model to
`tests/conftest.py`, and add its name to the lists of families in `tests/exporter/`.
"""

from __future__ import annotations

from typing import Any

import torch

from ...runtime.errors import ModelError
from .base import Backbone
from .bert import Albert, Bert, DistilBert, Electra, Roberta
from .deberta import DebertaV2
from .modernbert import ModernBert
from .mpnet import MPNet

_FAMILIES: dict[str, type[Backbone]] = {
    "albert": Albert,
    "bert": Bert,
    "camembert": Roberta,
    "deberta-v2": DebertaV2,
    "distilbert": DistilBert,
    "electra": Electra,
    "modernbert": ModernBert,
    "mpnet": MPNet,
    "roberta": Roberta,
    "xlm-roberta": Roberta,
}


def family_of(model_type: str) -> type[Backbone]:
    """The adapter of a family.

    Args:
        model_type: the name of the family in `config.json`.

    Raises:
        ModelError: there is no adapter for this family.
    """
    if model_type not in _FAMILIES:
        raise ModelError(
            f"the encoder family {model_type!r} is not supported; "
            f"supported: {', '.join(sorted(_FAMILIES))}",
            "use an encoder of one of these families, or add an adapter to exporter/backbones",
        )
    return _FAMILIES[model_type]


def build_encoder(config: Any, attention: str | None = "eager") -> Any:
    """A randomly initialised Hugging Face encoder in float32.

    Args:
        config: a `PretrainedConfig` of a supported family.
        attention: Hugging Face's attention implementation; an export needs `eager`. None: the
            fastest one of the family.
    """
    from transformers import AutoModel

    family_of(config.model_type)
    build: Any = AutoModel.from_config
    return build(config, attn_implementation=attention, dtype=torch.float32)
