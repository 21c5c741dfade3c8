"""Rows to examples: texts through the model's own tokenizer, a pair in its pair form, long ones cut, targets checked.

    one text     [CLS] a fine film [SEP]
    a pair       [CLS] premise [SEP] hypothesis [SEP]      RoBERTa: <s> premise </s></s> hypothesis </s>

A special token that a text spells is text, as in pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encoder.base.errors import ConfigError, ModelError
from encoder.base.tokenizer_json import SpecialIds, special_ids_of
from encoder.data.examples import Examples
from encoder.data.labelled import Rows, texts_of
from encoder.finetune.tasks import TaskConfig
from encoder.models.hf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODED_TOGETHER = 4096  # rows given to the tokenizer at a time


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer, and how it is used for a task."""

    tokenizer: Tokenizer
    specials: SpecialIds
    segments: bool  # whether the model has them
    path: Path


def read_encoder(
    tokenizer_json: Path, *, vocab_size: int, max_tokens: int, segments: bool, pairs: bool
) -> TextEncoder:
    """The model's tokenizer, seen to frame what the task has.

    tokenizer_json: of the model
    vocab_size: of the model
    max_tokens: longer texts are cut; of a pair the longer one first
    segments: whether the model has two or more
    pairs: whether rows have two texts

    Raises ModelError for a tokenizer of another vocabulary, or without the pair form.
    """
    text_vocabulary, specials = special_ids_of(tokenizer_json, error=ModelError)
    if text_vocabulary > vocab_size:
        raise ModelError(
            f"{tokenizer_json} has {text_vocabulary:,} ids, the model {vocab_size:,}; needed: the"
            " tokenizer that the model was trained with."
        )
    tokenizer = read_tokenizer(tokenizer_json, specials, vocab_size=vocab_size, segments=segments)
    if pairs:
        _check_pairs(tokenizer, specials, tokenizer_json)
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(max_tokens, strategy="longest_first")
    return TextEncoder(
        tokenizer=tokenizer, specials=specials, segments=segments, path=tokenizer_json
    )


def _check_pairs(tokenizer: Tokenizer, specials: SpecialIds, path: Path) -> None:
    """A tokenizer without a pair template encodes two texts without any special token, and says nothing."""
    framed = tokenizer.encode("", "").ids
    first, last = specials.before, specials.behind
    # [CLS] [SEP] [SEP], of RoBERTa <s> </s> </s> </s>
    has_frame = framed[: len(first)] == [*first] and framed[-len(last) :] == [*last]
    if not has_frame or framed.count(specials.sep_id) < 2:
        raise ModelError(
            f"{path} makes {framed} of a pair of empty texts, which is no pair form; needed: [CLS] A"
            ' [SEP] B [SEP]. Give its post_processor a "pair", as data-prep tokenizer writes it.'
        )


def encode(rows: Rows, task: TaskConfig, encoder: TextEncoder, *, name: str) -> Examples:
    """The examples of a data set, in its order. Raises DataError with file and row.

    rows: with the columns of the task
    task: whose labels are known
    encoder: of the model
    name: of the data set
    """
    value_N = task.targets(rows)
    texts: list[Any] = list(zip(*(texts_of(rows, column) for column in task.texts), strict=True))
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    cut = 0
    for first in range(0, len(texts), ENCODED_TOGETHER):
        some = texts[first : first + ENCODED_TOGETHER]
        given = [pair[0] if len(pair) == 1 else pair for pair in some]
        for encoded in encoder.tokenizer.encode_batch(given):
            ids.append(np.array(encoded.ids, dtype=np.int32))
            cut += bool(encoded.overflowing)
            if encoder.segments:
                segments.append(np.array(encoded.type_ids, dtype=np.int8))
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    return Examples(
        name=name,
        ids_A=np.concatenate(ids),
        starts_N1=np.concatenate([[0], np.cumsum(lengths)]),
        value_N=value_N,
        segments_A=np.concatenate(segments) if segments else None,
        cut=cut,
    )


def check_length(max_tokens: int, *, longest: int, pairs: bool) -> None:
    """A text can be so long. Raises ConfigError.

    max_tokens: of the task file
    longest: that the model can read
    pairs: whether rows have two texts
    """
    least = 6 if pairs else 3
    if not least <= max_tokens <= longest:
        raise ConfigError(
            f"data.max_tokens is {max_tokens:,}; needed: {least} to {longest:,}, the longest that the"
            " model reads."
        )
