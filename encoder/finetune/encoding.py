"""Rows to examples: texts through the model's own tokenizer, a pair in its pair form, long ones cut, targets checked.

    one text     [CLS] a fine film [SEP]
    a pair       [CLS] premise [SEP] hypothesis [SEP]      RoBERTa: <s> premise </s></s> hypothesis </s>

A special token that a text spells is text, as in pretraining.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from encoder.base.errors import ConfigError, ModelError
from encoder.base.tokenizer_json import SpecialIds, special_ids_of
from encoder.data.examples import Examples, Places
from encoder.models.hf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ENCODED_TOGETHER = 4096  # rows given to the tokenizer at a time
# of two texts: the longer one first, or one of them alone
Cut = Literal["longest_first", "only_first", "only_second"]


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer, and how it is used for a task."""

    tokenizer: Tokenizer
    specials: SpecialIds
    segments: bool  # whether the model has them
    max_tokens: int  # of an encoded text or pair
    path: Path

    def encoded(
        self, texts: Sequence[Any], *, cut: Cut, overlap_tokens: int = 0
    ) -> Iterator[Encoding]:
        """Each text, or pair of texts, framed; what of a longer one is left is in its `overflowing`.

        texts: one text each, or (first, second)
        cut: which of two texts gives way
        overlap_tokens: that what is left shares with what stands before it
        """
        self.tokenizer.enable_truncation(self.max_tokens, strategy=cut, stride=overlap_tokens)
        for first in range(0, len(texts), ENCODED_TOGETHER):
            yield from self.tokenizer.encode_batch(texts[first : first + ENCODED_TOGETHER])

    def shortened(
        self, texts: Sequence[str], *, most_tokens: int, keep: Literal["first", "last"]
    ) -> list[str]:
        """The texts themselves, those of more tokens cut at their end, or at their beginning.

        texts: each alone
        most_tokens: special ones not counted
        keep: which tokens of a longer one
        """
        self.tokenizer.no_truncation()
        found = []
        for first in range(0, len(texts), ENCODED_TOGETHER):
            some = list(texts[first : first + ENCODED_TOGETHER])
            encoded = self.tokenizer.encode_batch(some, add_special_tokens=False)
            for text, one in zip(some, encoded, strict=True):
                room = most_tokens
                # a part of a text may have other tokens than it has in the text
                while len(one.ids) > most_tokens and room:
                    begin, end = one.offsets[-room][0], one.offsets[room - 1][1]
                    cut = text[:end] if keep == "first" else text[begin:]
                    again = self.tokenizer.encode(cut, add_special_tokens=False)
                    if len(again.ids) <= most_tokens:
                        text, one = cut, again
                    room -= 1
                found.append(text)
        return found


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
    return TextEncoder(
        tokenizer=tokenizer,
        specials=specials,
        segments=segments,
        max_tokens=max_tokens,
        path=tokenizer_json,
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


def examples_of(
    encoded: Iterable[Encoding],
    encoder: TextEncoder,
    *,
    name: str,
    value_P: np.ndarray,
    places: Places | None = None,
    cut: int | None = None,
) -> Examples:
    """The examples of a data set, a document each.

    encoded: in its order
    encoder: of them
    name: of the data set
    value_P: the targets
    places: where they are asked; None: at their first tokens
    cut: how many were cut; None: those of which something is left
    """
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    overflowing = 0
    for one in encoded:
        ids.append(np.array(one.ids, dtype=np.int32))
        overflowing += bool(one.overflowing)
        if encoder.segments:
            segments.append(np.array(one.type_ids, dtype=np.int8))
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    return Examples(
        name=name,
        ids_A=np.concatenate(ids),
        starts_N1=np.concatenate([[0], np.cumsum(lengths)]),
        value_P=value_P,
        segments_A=np.concatenate(segments) if segments else None,
        places=places,
        cut=overflowing if cut is None else cut,
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
