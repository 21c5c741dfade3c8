"""A checkpoint as Composer's trainer writes one of FlexBERT, with everything beside the tensors."""

from __future__ import annotations

import copy
import datetime
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.models.hf.read import EMBEDDING
from encoder.models.modernbert import ModernBertConfig

# what transformers writes of a configuration: all that PretrainedConfig has no default for
FLEXBERT = {
    "_name_or_path": "bert-base-uncased",
    "alibi_starting_size": 512,
    "allow_embedding_resizing": False,
    "architectures": ["BertForMaskedLM"],
    "attention_layer": "rope",
    "attention_probs_dropout_prob": 0.0,
    "attn_out_bias": False,
    "attn_out_dropout_prob": 0.1,
    "attn_qkv_bias": False,
    "bert_layer": "prenorm",
    "classifier_dropout": None,
    "compile_model": True,
    "decoder_bias": True,
    "deterministic_fa2": False,
    "embed_dropout_prob": 0.0,
    "embed_norm": True,
    "embedding_layer": "sans_pos",
    "encoder_layer": "base",
    "final_norm": True,
    "global_attn_every_n_layers": 3,
    "gradient_checkpointing": False,
    "head_class_act": "silu",
    "head_class_bias": False,
    "head_class_dropout": 0.0,
    "head_class_norm": False,
    "head_pred_act": "gelu",
    "head_pred_bias": False,
    "head_pred_dropout": 0.0,
    "head_pred_norm": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "init_cutoff_factor": 2.0,
    "init_method": "full_megatron",
    "init_small_embedding": False,
    "init_std": 0.02,
    "initial_attention_layer": None,
    "initial_bert_layer": None,
    "initial_mlp_layer": None,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "local_attn_rotary_emb_base": 10000.0,
    "local_attn_rotary_emb_dim": None,
    "loss_function": "fa_cross_entropy",
    "loss_kwargs": {"reduction": "mean"},
    "masked_prediction": True,
    "max_position_embeddings": 512,
    "mlp_dropout_prob": 0.0,
    "mlp_in_bias": False,
    "mlp_layer": "glu",
    "mlp_out_bias": False,
    "model_type": "bert",
    "norm_kwargs": {"bias": False, "eps": 1e-05},
    "normalization": "layernorm",
    "num_initial_layers": 1,
    "pad_logits": False,
    "pad_token_id": 0,
    "padding": "unpadded",
    "pooling_type": "cls",
    "position_embedding_type": "absolute",
    "rotary_emb_base": 160000.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "skip_first_prenorm": True,
    "sliding_window": 128,
    "transformers_version": "4.46.0",
    "type_vocab_size": 2,
    "unpad_embeddings": True,
    "use_cache": True,
    "use_fa2": True,
    "use_sdpa_attn_mask": False,
}


def flexbert(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Our weights under the names of ModernBERT's training code, with its copy of the embedding."""
    names = {
        n: prefix + n.replace("model.layers.", "bert.encoder.layers.").replace("model.", "bert.")
        for n in weights
    }
    copies = {names[n]: w for n, w in weights.items()}
    return {**copies, f"{prefix}decoder.weight": weights.get("decoder.weight", weights[EMBEDDING])}


def flexbert_config(config: ModernBertConfig, **changes: Any) -> dict[str, Any]:
    """FlexBERT's configuration of a model, changed; a change to Ellipsis takes the key out."""
    said = {
        **copy.deepcopy(FLEXBERT),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "rotary_emb_base": config.global_rope_theta,
        "local_attn_rotary_emb_base": config.local_rope_theta,
        "rotary_emb_dim": config.head_width,
        **changes,
    }
    return {key: value for key, value in said.items() if value is not ...}


def composer_state(
    weights: dict[str, Tensor], content: dict[str, Any], tokenizer: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that Composer's trainer saves, in its own order and types."""
    model = OrderedDict(flexbert(weights, "model."))
    steps = {
        name: {"step": torch.tensor(7.0), "exp_avg": torch.zeros_like(w)}
        for name, w in model.items()
    }
    seconds = datetime.timedelta(seconds=11, microseconds=250)
    timestamp = {
        **dict.fromkeys(
            ("iteration", "epoch", "batch", "sample", "token", "epoch_in_iteration"), 3
        ),
        **dict.fromkeys(
            ("token_in_iteration", "batch_in_epoch", "sample_in_epoch", "token_in_epoch"), 3
        ),
        **dict.fromkeys(("total_wct", "iteration_wct", "epoch_wct", "batch_wct"), seconds),
    }
    config = {
        "file_extension": ".json",
        "content": content,
        "class": "src.bert_layers.model.FlexBertForMaskedLM",
    }
    tokens = (
        {}
        if tokenizer is None
        else {"tokenizer.json": {"file_extension": ".json", "content": tokenizer}}
    )
    state = {
        "model": model,
        "optimizers": {
            "StableAdamW": {"state": steps, "param_groups": [{"lr": 8e-4, "betas": (0.9, 0.98)}]}
        },
        "schedulers": {"LambdaLR": {"base_lrs": [8e-4], "last_epoch": 7, "lr_lambdas": [None]}},
        "algorithms": [("GradientClipping", {"repr": "GradientClipping(clipping_type='norm')"})],
        "callbacks": {"SpeedMonitor": {"total_eval_wct": 0.0}, "LRMonitor": {}},
        "timestamp": {"Timestamp": timestamp},
        "rank_zero_seed": 17,
        "train_metrics": {"MaskedAccuracy": {"state_dict": OrderedDict(), "_computed": None}},
        "run_name": "a-run",
        "dataset_state": {"train": None, "eval": {}},
        "integrations": {"huggingface": {"model": {"config": config}, "tokenizer": tokens}},
        "metadata": {"torch_version": torch.__version__, "device": "gpu", "world_size": 8},
    }
    generators = {
        "python": random.Random(1).getstate(),
        "numpy": np.random.RandomState(1).get_state(),
        "torch": torch.random.get_rng_state(),
    }
    return {"state": state, "rng": [generators, copy.deepcopy(generators)]}


def write_composer(path: Path, *args: Any, **kwargs: Any) -> Path:
    """A whole checkpoint, as torch.save writes it for Composer."""
    torch.save(composer_state(*args, **kwargs), path)
    return path
