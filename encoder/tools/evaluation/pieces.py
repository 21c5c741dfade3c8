"""Texts as documents of tokens, framed as the model was trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from encoder.base.errors import ConfigError
from encoder.tools.notebook import LoadedModel

CHARACTERS_PER_TOKEN = (
    16  # of a text, beyond which no more tokens are expected: the rest is not encoded
)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Documents of at most so many tokens, cut from texts.

    text      "The cat sat on the mat."          pieces of 6 tokens
    pieces    [CLS] The cat sat on [SEP]    [CLS] the mat . [SEP]
    words     -1    0   1   2   3  -1       -1    4   5   6 -1
    """

    documents: list[Tensor]  # int64 ids of each, its frame included
    # of each token the number of its word in the text, as the tokenizer splits it; -1 in the frame
    words: list[np.ndarray]
    tokens: int  # without frames
    bytes: int  # of the text in UTF-8

    @property
    def bytes_per_token(self) -> float:
        """What makes losses of two tokenizers comparable."""
        return self.bytes / self.tokens


def plain_tokenizer(bert: LoadedModel) -> Tokenizer:
    """The model's tokenizer, to which "[MASK]" in a text is six letters, as in the preparation of shards."""
    tokenizer = Tokenizer.from_str(bert.tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer


def cut_texts(
    bert: LoadedModel, texts: Iterable[str], *, longest: int, most_tokens: int, least: int = 1
) -> Pieces:
    """The first texts as documents; a text begins a document of its own.

    bert: the model and its tokenizer
    texts: empty ones are passed over
    longest: tokens of a document, its frame included
    most_tokens: of all documents together, without frames; the last text is cut there
    least: tokens of a text's last piece, below which it is left out

    Raises ConfigError where nothing is left, or the model cannot be so long.
    """
    check_length(bert, longest)
    before, behind = (list(ids) for ids in (bert.specials.before, bert.specials.behind))
    room = longest - len(before) - len(behind)
    tokenizer = plain_tokenizer(bert)

    documents: list[Tensor] = []
    words: list[np.ndarray] = []
    tokens = total_bytes = 0
    for text in texts:
        left = most_tokens - tokens
        if left <= 0:
            break
        text = text[: CHARACTERS_PER_TOKEN * left]
        found = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, min(left, len(found.ids)), room):
            end = min(start + room, left, len(found.ids))
            if end - start < least:
                continue
            documents.append(torch.tensor([*before, *found.ids[start:end], *behind]))
            numbers = [-1 if word is None else word for word in found.word_ids[start:end]]
            words.append(np.array([*(-1 for _ in before), *numbers, *(-1 for _ in behind)]))
            tokens += end - start
            # white space before a token is its own
            first = found.offsets[start - 1][1] if start else 0
            total_bytes += len(text[first : found.offsets[end - 1][1]].encode("utf-8"))
    if not documents:
        raise ConfigError(
            f"the texts hold no piece of {least:,} tokens; needed: at least one. Give longer texts."
        )
    return Pieces(documents=documents, words=words, tokens=tokens, bytes=total_bytes)


def check_length(bert: LoadedModel, longest: int) -> None:
    """The model can be so long. Raises ConfigError."""
    frame = len(bert.specials.before) + len(bert.specials.behind)
    if not frame < longest <= bert.max_tokens:
        raise ConfigError(
            f"documents of {longest:,} tokens; needed: {frame + 1} to {bert.max_tokens:,}, the"
            f" longest of {bert.origin}. Set --document-tokens."
        )
