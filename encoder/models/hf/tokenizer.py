"""The tokenizer of a Hugging Face folder: the run's own tokenizer.json, with the edits that ModernBERT's release has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoder.base.errors import ModelError
from encoder.base.files import write_json
from encoder.base.untrusted import native_code, read_json
from encoder.models.hf.bridge import SpecialIds
from encoder.models.stored import TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def check_tokenizer(tokenizer_json: Path, *, vocab_size: int) -> None:
    """It is a tokenizer.json whose ids the model has. Raises ModelError."""
    _read(tokenizer_json, vocab_size)


def read_tokenizer(tokenizer_json: Path, specials: SpecialIds, *, vocab_size: int) -> Tokenizer:
    """The tokenizer that an export of the model has. It puts [CLS] and [SEP] around a text; it cuts and pads nothing.

    Raises ModelError.
    """
    content, _ = _served(tokenizer_json, specials, vocab_size)
    return _tokenizer(content, tokenizer_json)


def write_tokenizer(
    folder: Path, tokenizer_json: Path, specials: SpecialIds, *, vocab_size: int, max_tokens: int
) -> None:
    """tokenizer.json and tokenizer_config.json (its model_max_length is max_tokens). Raises ModelError.

    A tokenizer.json without a post-processor is given [CLS] ... [SEP], as every document of the shards has them.
    """
    content, names = _served(tokenizer_json, specials, vocab_size)
    (folder / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": names[i] for role, i in _roles(specials).items()},
            "model_max_length": max_tokens,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "truncation_side": "right",
            # ModernBERT's own file says true, which turns the decoded "x . y" into "x. y": wrong for code
            "clean_up_tokenization_spaces": False,
        },
    )


def _served(
    tokenizer_json: Path, specials: SpecialIds, vocab_size: int
) -> tuple[dict[str, Any], dict[int, str]]:
    """The content of a tokenizer.json with the edits, and its tokens by id."""
    content, names = _read(tokenizer_json, vocab_size)
    strange = [f"{role} {i}" for role, i in _roles(specials).items() if i not in names]
    if strange:
        raise ModelError(
            f"{tokenizer_json} has no token {', '.join(strange)}. "
            "Give the tokenizer that the model was trained with."
        )
    masks = [token for token in content["added_tokens"] if token["id"] == specials.mask_id]
    if not masks:
        raise ModelError(
            f"{tokenizer_json} has {names[specials.mask_id]} in its vocabulary, but not among"
            " added_tokens, so text with a mask would be cut into letters. Add it there as a"
            " special token."
        )
    masks[0]["lstrip"] = (
        True  # "a [MASK]" asks for " word", space included, as the vocabulary has it
    )
    if content.get("post_processor") is None:
        content["post_processor"] = _template(names, specials)
    content["truncation"] = content["padding"] = (
        None  # a maker's own would cut and fill what transformers is asked for
    )
    framed = _tokenizer(content, tokenizer_json).encode("").ids
    if framed != [specials.cls_id, specials.sep_id]:
        raise ModelError(
            f"{tokenizer_json} makes {framed} of an empty text; needed: {names[specials.cls_id]}"
            f" and {names[specials.sep_id]}, {[specials.cls_id, specials.sep_id]}, as the model was"
            " trained. Put such a post_processor, or null for that one."
        )
    return content, names


def _roles(specials: SpecialIds) -> dict[str, int]:
    return {role: getattr(specials, f"{role}_id") for role in ("cls", "sep", "pad", "mask", "unk")}


def _template(names: dict[int, str], specials: SpecialIds) -> dict[str, Any]:
    cls, sep = (
        {"SpecialToken": {"id": names[i], "type_id": 0}} for i in (specials.cls_id, specials.sep_id)
    )
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [cls, a, sep],
        "pair": [cls, a, sep, b, sep],
        "special_tokens": {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}
            for i in (specials.cls_id, specials.sep_id)
        },
    }


def _tokenizer(content: dict[str, Any], tokenizer_json: Path) -> Tokenizer:
    """The tokenizer of this content, seen to encode. Raises ModelError."""
    import tokenizers

    with native_code(f"{tokenizer_json} cannot be used as a tokenizer.json", error=ModelError):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.encode("")
        return tokenizer


def _read(tokenizer_json: Path, vocab_size: int) -> tuple[dict[str, Any], dict[int, str]]:
    """The file's content, and its tokens by id."""
    try:
        content = read_json(tokenizer_json, root=dict, error=ModelError)
        names = {i: word for word, i in content["model"]["vocab"].items()}
        names.update({token["id"]: token["content"] for token in content["added_tokens"]})
        top = max(names)
        if not all(type(i) is int and isinstance(word, str) for i, word in names.items()):
            raise TypeError("an id is no whole number")
    except (ModelError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error).rstrip(".") if isinstance(error, ModelError) else repr(error)
        raise ModelError(
            f"{tokenizer_json} cannot be used as a tokenizer.json ({why}). "
            "Give the one that stands beside the shards."
        ) from error
    if top >= vocab_size:
        raise ModelError(
            f"{tokenizer_json} has ids up to {top:,}; the model's vocabulary is {vocab_size:,}. "
            "Give the tokenizer that the model was trained with."
        )
    return content, names
