"""The tokenizer of a Hugging Face folder: the run's own tokenizer.json, with the edits that ModernBERT's release has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoder.base.errors import ModelError
from encoder.base.files import write_json
from encoder.base.tokenizer_json import (
    ROLES,
    SpecialIds,
    TokenizerFile,
    read_tokenizer_json,
    template,
)
from encoder.base.untrusted import native_code
from encoder.models.stored import TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def check_tokenizer(tokenizer_json: Path, *, vocab_size: int) -> None:
    """It is a tokenizer.json whose ids the model has. Raises ModelError."""
    _read(tokenizer_json, vocab_size)


def read_tokenizer(
    tokenizer_json: Path, specials: SpecialIds, *, vocab_size: int, segments: bool = False
) -> Tokenizer:
    """The tokenizer that an export of the model has. It frames a text, [CLS] ... [SEP]; it cuts and pads nothing.

    tokenizer_json, specials, vocab_size, segments: as write_tokenizer has them

    Raises ModelError.
    """
    file, _ = _served(tokenizer_json, specials, vocab_size, segments=segments)
    return _tokenizer(file.content, tokenizer_json)


def write_tokenizer(
    folder: Path,
    tokenizer_json: Path,
    specials: SpecialIds,
    *,
    vocab_size: int,
    max_tokens: int,
    segments: bool = False,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    folder: of the export
    tokenizer_json: the run's own; without a post-processor it is given the frame that every document of the shards has
    specials: their ids, and the frame
    vocab_size: of the model
    max_tokens: its model_max_length
    segments: whether the model has them: the second of two texts is then of segment 1

    Raises ModelError.
    """
    file, names = _served(tokenizer_json, specials, vocab_size, segments=segments)
    (folder / TOKENIZER).write_text(json.dumps(file.content, ensure_ascii=False), encoding="utf-8")
    kinds = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": name for role, name in names.items()},
            "model_max_length": max_tokens,
            "model_input_names": kinds,
            # XLNet's [CLS] is the last token, and stays it
            "padding_side": "right" if specials.frame == "both_ends" else "left",
            "truncation_side": "right",
            # ModernBERT's own file says true, which turns the decoded "x . y" into "x. y": wrong for code
            "clean_up_tokenization_spaces": False,
        },
    )


def _served(
    tokenizer_json: Path, specials: SpecialIds, vocab_size: int, *, segments: bool = False
) -> tuple[TokenizerFile, dict[str, str]]:
    """A tokenizer.json with the edits, and role -> token."""
    file = _read(tokenizer_json, vocab_size)
    content = file.content
    token_of = {number: token for token, number in file.ids.items()}
    role_ids = {role: getattr(specials, f"{role}_id") for role in ROLES}
    if strange := [f"{role} {i}" for role, i in role_ids.items() if i not in token_of]:
        raise ModelError(
            f"{tokenizer_json} has no token {', '.join(strange)}. "
            "Give the tokenizer that the model was trained with."
        )
    names = {role: token_of[i] for role, i in role_ids.items()}

    # a mask that is no added token would be cut like any other text
    masks = [token for token in file.added if token["id"] == specials.mask_id]
    if not masks:
        raise ModelError(
            f"{tokenizer_json} has {names['mask']} in its vocabulary, but not among"
            " added_tokens, so text with a mask would be cut into letters. Add it there as a"
            " special token."
        )
    # "a [MASK]" asks for " word", space included, as the vocabulary has it
    masks[0]["lstrip"] = True
    if content.get("post_processor") is None:
        content["post_processor"] = template(names, file.ids, frame=specials.frame, second=0)
    if segments:
        _put_segments(content["post_processor"])
    # a maker's own would cut and fill what transformers is asked for
    content["truncation"] = content["padding"] = None
    # an empty text shows the frame alone
    needed = [*specials.before, *specials.behind]
    framed = _tokenizer(content, tokenizer_json).encode("").ids
    if framed != needed:
        in_words = " and ".join(token_of[i] for i in needed)
        raise ModelError(
            f"{tokenizer_json} makes {framed} of an empty text; needed: {in_words}, {needed}, as"
            " the model was trained. Put such a post_processor, or null for that one."
        )
    return file, names


def _put_segments(post_processor: dict[str, Any]) -> None:
    """The second of two texts, and the special tokens behind it that had its segment, become segment 1."""
    # a sequence of post-processors, or one by itself; where B has segment 1 already, nothing to do
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") != "TemplateProcessing" or _part_of(step["pair"], "B") != 0:
            continue
        behind = False
        for part in step["pair"]:
            about = next(iter(part.values()))
            behind = behind or about["id"] == "B"
            about["type_id"] = max(about["type_id"], int(behind))


def _part_of(pair: list[dict[str, Any]], name: str) -> int | None:
    """The segment of a text in a template."""
    return next(
        (p["Sequence"]["type_id"] for p in pair if p.get("Sequence", {}).get("id") == name), None
    )


def _tokenizer(content: dict[str, Any], tokenizer_json: Path) -> Tokenizer:
    """The tokenizer of this content, checked to encode. Raises ModelError."""
    import tokenizers

    with native_code(f"{tokenizer_json} cannot be used as a tokenizer.json", error=ModelError):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.encode("")
        return tokenizer


def _read(tokenizer_json: Path, vocab_size: int) -> TokenizerFile:
    """The file, whose ids the model has."""
    try:
        file = read_tokenizer_json(tokenizer_json, error=ModelError)
    except ModelError as error:
        raise ModelError(
            f"{tokenizer_json} cannot be used as a tokenizer.json ({str(error).rstrip('.')}). "
            "Give the one that stands beside the shards."
        ) from error
    if file.vocab_size > vocab_size:
        raise ModelError(
            f"{tokenizer_json} has ids up to {file.vocab_size - 1:,}; the model's vocabulary is"
            f" {vocab_size:,}. Give the tokenizer that the model was trained with."
        )
    return file
