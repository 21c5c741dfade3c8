"""A tiny model, its tokenizer of letters, and its export, for tests of what goes to and comes from Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encoder.base.tokenizer_json import SpecialIds
from encoder.models.hf.write import export_hf
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.models.stored import StoredModel

SPECIALS = SpecialIds(
    cls_id=1, sep_id=2, pad_id=3, mask_id=4, unk_id=0, all_special=(0, 1, 2, 3, 4)
)
CONFIG = ModernBertConfig(
    vocab_size=280,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    global_rope_theta=160000.0,
    initializer_range=0.2,
    max_position_embeddings=1200,
)


def write_tokenizer_json(path: Path, *, frame: bool = True) -> Path:
    """Five special tokens and 256 letters, ids 0 to 260; without a frame it is that of the special ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(names + letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def stored(
    config: ModernBertConfig = CONFIG, *, seed: int = 2, max_tokens: int | None = 140
) -> StoredModel:
    """A model with drawn weights, biases and norms too, so that none of them could be missed."""
    import torch

    weights = ModernBertForMaskedLM(config, seed=seed).state_dict()
    draw = torch.Generator().manual_seed(seed)
    weights = {
        n: w if w.dim() > 1 else w + 0.3 * torch.randn(w.shape, generator=draw)
        for n, w in weights.items()
    }
    return StoredModel(
        config=config, weights=weights, tokenizer_json=None, origin="a test", max_tokens=max_tokens
    )


def exported(tokenizer_json: Path, out: Path, model: StoredModel | None = None, **changes):
    """Export to `out`; returns the proofs."""
    return export_hf(model or stored(), tokenizer_json, SPECIALS, out, **changes)


def transformers_modernbert(config: ModernBertConfig, **told: object):
    """Their class at our shape and thetas, weights its own. `told`: of its settings, as they stand there."""
    transformers = pytest.importorskip("transformers")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_attention_heads", "global_rope_theta", "local_rope_theta")
    settings = {
        **{name: getattr(config, name) for name in same},
        **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        **dict(attn_implementation="eager", reference_compile=False),
        **told,
    }
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings)).eval()


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def task_pipeline(task: str) -> Callable[..., Any]:
    """transformers' pipeline of a task, or a skip where this version has none: some went in the course of version 5."""
    from transformers.pipelines import SUPPORTED_TASKS, pipeline

    if task not in SUPPORTED_TASKS:
        pytest.skip(f"this transformers has no pipeline for {task}")
    return functools.partial(pipeline, task)
