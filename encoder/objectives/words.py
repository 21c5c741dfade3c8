"""Which tokens of a vocabulary begin a word and which leave one open: what masking whole words needs to know.

tokens   Ġthe  cat  alog  (   Ġx   1  )          a word goes on where a token that leaves it open is followed
begins     1    0    0    1    1   0  1          by one that begins none: "Ġthe cat alog", "Ġx 1"
open       1    1    1    0    1   1  0
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.byte_level import byte_of_character
from encoder.base.errors import ConfigError
from encoder.base.tokenizer_json import read_tokenizer_json

# tokens; what is longer (a key in base 64, a sentence without spaces) is asked in stretches of 8
LONGEST_WORD = 8


@dataclass(frozen=True)
class WordEdges:
    """Per token id, bool [V]: whether it begins a word whatever stands before it, and whether the next may continue it."""

    begins_V: np.ndarray
    open_V: np.ndarray

    def words(self, ids: np.ndarray) -> np.ndarray:
        """The number of each token's word, int64 [T], ascending from 0; no word has over LONGEST_WORD tokens."""
        # a token begins a word by itself, behind one that leaves none open, or at the row's start
        starts = self.begins_V[ids]
        starts[1:] |= ~self.open_V[ids[:-1]]
        starts[:1] = True

        # the place of each token in its word: every LONGEST_WORD-th begins a new one. The running
        # sum of beginnings is then the number of the word
        first = np.flatnonzero(starts)
        inside = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
        return np.cumsum(starts | (inside % LONGEST_WORD == 0)) - 1


def read_word_edges(tokenizer_json: Path, *, vocab_size: int) -> WordEdges:
    """The words of a byte-level BPE, a BPE or Unigram with spaces as U+2581, a WordPiece or a WordLevel tokenizer.

    Raises ConfigError.
    """
    # special tokens and ids without a token are words of their own
    begins_V, open_V = np.ones(vocab_size, dtype=bool), np.zeros(vocab_size, dtype=bool)
    file = read_tokenizer_json(tokenizer_json, error=ConfigError)
    try:
        edges = _edges_of(file.content)
        special_of = {token["content"]: token["special"] for token in file.added}
        # an added token that is not special stands for its text, as it is spelt
        for token, number in file.ids.items():
            if token not in special_of:
                begins_V[number], open_V[number] = edges(token)
            elif not special_of[token]:
                begins_V[number], open_V[number] = _edges_of_text(token)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{tokenizer_json}: its words cannot be told ({error}). Set objective.whole_words:"
            " false."
        ) from error
    return WordEdges(begins_V, open_V)


def _edges_of(content: dict[str, Any]) -> Callable[[str], tuple[bool, bool]]:
    """How the tokens of a tokenizer.json's model show whether they begin a word, and whether they leave it open."""
    kind = content["model"].get("type")
    if kind == "WordLevel":
        return lambda token: (True, False)
    # a token without the prefix (##) begins a word; any may be followed by one that has it
    if kind == "WordPiece":
        prefix = content["model"]["continuing_subword_prefix"]
        return lambda token: (not token.startswith(prefix), True)

    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"a {kind} model; known: BPE, Unigram, WordPiece, WordLevel")

    # bytes are written as other characters, and a token may hold half of one: U+FFFD then
    if '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        byte_of = byte_of_character()
        return lambda token: _edges_of_text(
            bytes(byte_of[c] for c in token).decode("utf-8", errors="replace")
        )
    if kind == "Unigram":
        return _edges_of_unigram
    return lambda token: _edges_of_text(token.replace("\u2581", " "))


def _edges_of_unigram(token: str) -> tuple[bool, bool]:
    # a lone U+2581 is the begin of the word behind it
    if token == "\u2581":
        return True, True
    return _edges_of_text(token.replace("\u2581", " "))


def _edges_of_text(text: str) -> tuple[bool, bool]:
    return not _is_letter(text[:1]), _is_letter(text[-1:])


def _is_letter(character: str) -> bool:
    """Letters, digits, marks that are written on letters, and parts of a character that a byte-level token was cut in."""
    return (
        character == "\ufffd"
        or character.isalnum()
        or unicodedata.category(character or " ").startswith("M")
    )
