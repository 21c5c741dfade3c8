"""ALBERT of transformers: settings and weights of ours to theirs and back, by the rules of bert.py.

    model.layers.N          albert.encoder.albert_layer_groups.G.albert_layers.J          N = G inner_group_num + J
    embedding_projection    albert.encoder.embedding_hidden_mapping_in
    pooler, nsp             albert.pooler, sop_classifier.classifier                      label 0: in their order; 1: swapped

Its class leaves out the dropout after the MLP, which the original has. A proof asks both models without dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encoder.models.albert import AlbertConfig
from encoder.models.hf.bert import (
    BERT_KEYS,
    BERT_LAYOUT,
    Layout,
    bridge_by,
    padded_on_the_right,
)


def _small(config: AlbertConfig) -> dict[str, int]:
    """Five layers over two groups, so that these are not of one size."""
    return {
        "embedding_size": min(config.embedding_size, 16),
        "num_hidden_layers": min(config.num_hidden_layers, 5),
        "num_hidden_groups": min(config.num_hidden_groups, 2),
        "inner_group_num": min(config.inner_group_num, 2),
    }


def _strange(config: AlbertConfig) -> list[str]:
    # its group counts the masks of heads by layers, of which there must be one for each block
    most = config.num_hidden_layers // config.num_hidden_groups
    if config.inner_group_num <= most:
        return []
    return [
        f"inner_group_num {config.inner_group_num} (needed: at most num_hidden_layers /"
        f" num_hidden_groups, {most})"
    ]


ALBERT_LAYOUT = Layout(
    model_type="albert",
    title="ALBERT",
    family="ALBERT",
    config_class="AlbertConfig",
    body="albert",
    embeddings={
        **BERT_LAYOUT.embeddings,
        "model.embedding_projection": "encoder.embedding_hidden_mapping_in",
    },
    layer="encoder.albert_layer_groups.{0}.albert_layers.{1}",
    parts={
        "attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
        "attn.Wo": ("attention.dense",),
        "attn_norm": ("attention.LayerNorm",),
        "mlp.Wi": ("ffn",),
        "mlp.Wo": ("ffn_output",),
        "mlp_norm": ("full_layer_layer_norm",),
    },
    heads={
        "head.dense": "predictions.dense",
        "head.norm": "predictions.LayerNorm",
        "pooler.dense": "albert.pooler",
        "nsp": "sop_classifier.classifier",
    },
    decoder_bias="predictions.bias",
    tied={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    left_out=("pooler.", "sop_classifier."),
    keys={
        **BERT_KEYS,
        "embedding_size": "embedding_size",
        "num_hidden_groups": "num_hidden_groups",
        "inner_group_num": "inner_group_num",
    },
    # AlbertConfig() is xxlarge
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 64,
        "hidden_act": "gelu_new",
    },
    activation="hidden_act",
    settings=AlbertConfig,
    architectures=("AlbertForMaskedLM", "AlbertForPreTraining", "AlbertModel"),
    small=_small,
    blocks_of_group=lambda config: config.inner_group_num,
    strange=_strange,
)


def _logits(model: Any, x_MC: Tensor) -> Tensor:
    """[M, V], or [M, V + 2] with the sentence head's."""
    logits_MV = model.predictions(x_MC)
    if not hasattr(model, "sop_classifier"):
        return logits_MV
    pooled_MC = model.albert.pooler_activation(model.albert.pooler(x_MC))
    return torch.cat((logits_MV, model.sop_classifier(pooled_MC)), dim=-1)


ALBERT = bridge_by(ALBERT_LAYOUT, _logits, padded_on_the_right)
