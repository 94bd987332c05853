"""BERT and its relatives: absolute positions, and layers that add the attention bias."""

from __future__ import annotations

from torch import nn

from .base import Backbone, ClassifierParts, Embeddings


class Bert(Backbone):
    """BERT."""

    def classifier_parts(self) -> ClassifierParts:
        """The pooler is part of the encoder."""
        return ClassifierParts(dense="bert.pooler.dense")


class Roberta(Backbone):
    """RoBERTa, and XLM-RoBERTa and CamemBERT, which have other tokenizers."""

    def max_positions(self) -> int:
        """Positions start after the padding index."""
        return int(self.config.max_position_embeddings) - int(self.config.pad_token_id) - 1


class Albert(Backbone):
    """ALBERT: layers share their weights, in one group or several."""

    def embeddings(self) -> Embeddings:
        """The embeddings and their projection to the hidden size."""
        mapping = self.encoder.encoder.embedding_hidden_mapping_in
        return Embeddings(self.encoder.embeddings, mapping)

    def layers(self) -> list[nn.Module]:
        """One entry for each call, so a group appears several times."""
        groups = self.encoder.encoder.albert_layer_groups
        count = self.config.num_hidden_layers
        return [groups[index * len(groups) // count] for index in range(count)]

    def classifier_parts(self) -> ClassifierParts:
        """The pooler is part of the encoder."""
        return ClassifierParts(dense="albert.pooler")


class Electra(Backbone):
    """ELECTRA: BERT without a pooler; small models have narrow embeddings."""

    def embeddings(self) -> Embeddings:
        """The embeddings, projected to the hidden size if they are narrower."""
        mapping = getattr(self.encoder, "embeddings_project", None)
        return Embeddings(self.encoder.embeddings, mapping)

    def classifier_parts(self) -> ClassifierParts:
        """The head of RoBERTa with another activation."""
        return ClassifierParts("classifier.dense", "classifier.out_proj", activation="gelu")


class DistilBert(Backbone):
    """DistilBERT: no token types, no pooler."""

    def layers(self) -> list[nn.Module]:
        """The layers of its `transformer`."""
        return list(self.encoder.transformer.layer)

    def head_dropout(self) -> float:
        """The same, under the name that it has in this family's configuration."""
        return float(self.config.seq_classif_dropout)

    def classifier_parts(self) -> ClassifierParts:
        """The head consists of two layers of the classifier itself."""
        return ClassifierParts(dense="pre_classifier", activation="relu")
