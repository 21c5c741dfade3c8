"""Small folders of transformers' classes with drawn weights, as a page opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.hf import write_tokenizer_json

PAIR_FORM = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ],
    "pair": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
    ],
    "special_tokens": {
        "[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
        "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]},
    },
}


def write_page_folder(
    folder: Path, class_name: str, *, max_tokens: int = 40, pair: bool = True, **settings: Any
) -> Path:
    """A tiny BERT of that class, with a tokenizer of letters.

    folder: to write
    class_name: of transformers, such as BertForMaskedLM
    max_tokens: of a text
    pair: the tokenizer frames two texts
    settings: of its config
    """
    import transformers

    tokenizer_json = write_tokenizer_json(folder.with_name(f"{folder.name}.tokenizer.json"))
    if pair:
        content = json.loads(tokenizer_json.read_text())
        content["post_processor"] = PAIR_FORM
        tokenizer_json.write_text(json.dumps(content))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), model_max_length=max_tokens, **names
    ).save_pretrained(folder)

    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=3,
        initializer_range=0.5,
        **settings,
    )
    getattr(transformers, class_name)(config).save_pretrained(folder)
    return folder
