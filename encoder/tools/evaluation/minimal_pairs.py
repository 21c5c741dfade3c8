"""Minimal pairs: does a model find the acceptable sentence likelier than the other? As BLiMP asks (Warstadt et al. 2020).

    good    The cats sleep.       -9.1       sum over tokens of log p(token | all others), one masked at a time
    bad     The cats sleeps.     -14.8       9.1 nats are fewer: the pair is right

The sum is the pseudo-log-likelihood of Salazar et al. (2020). With the later tokens of a word masked, too, a word's end does not
tell its beginning (Kauf and Ivanova 2023). A sentence of n tokens is n documents, packed with those of other sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encoder.base.errors import ConfigError
from encoder.data.labelled import DataError, label_name, read_rows, texts_of
from encoder.tools.evaluation.masked import nats_of_each, one_by_one
from encoder.tools.evaluation.pieces import plain_tokenizer
from encoder.tools.notebook import LoadedModel

SENTENCES_TOGETHER = 64  # whose masked documents are made at a time
# of pairs that name no groups, as BLiMP names its sentences
GOOD, BAD = "sentence_good", "sentence_bad"


@dataclass(frozen=True, kw_only=True)
class SentencePairs:
    """N pairs of sentences."""

    good: list[str]
    bad: list[str]
    groups: list[str] | None  # of each pair, such as the phenomenon that it tests

    def __len__(self) -> int:
        return len(self.good)


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """What a model makes of pairs."""

    right: float  # share of pairs whose good sentence has the higher sum of log p; nan: of a broken model
    right_of_words: float  # the same with the later tokens of a word masked, too
    by_group: dict[str, float]  # right, in the order of the file; empty without groups

    def numbers(self) -> dict[str, float]:
        """For a table."""
        found = {"pairs_right": self.right, "pairs_right_of_words": self.right_of_words}
        if self.by_group:
            found["pairs_right_by_group"] = float(np.mean([*self.by_group.values()]))
        return found


def read_pairs(
    path: Path, *, good: str = GOOD, bad: str = BAD, by: str | None = None
) -> SentencePairs:
    """Rows of a file. Raises DataError with file and row.

    path: .jsonl, .csv, .tsv, .parquet or .arrow
    good, bad: columns of the acceptable sentence and of the other
    by: column whose values group the pairs
    """
    rows = read_rows(path, [good, bad, *([by] if by else [])])
    found = SentencePairs(
        good=list(texts_of(rows, good)),
        bad=list(texts_of(rows, bad)),
        groups=[label_name(cell, rows, row) for row, cell in enumerate(rows.columns[by])]
        if by
        else None,
    )
    for row, (one, other) in enumerate(zip(found.good, found.bad, strict=True)):
        if one == other:
            raise DataError(
                f"{rows.place(row)}: {good} and {bad} are the same; needed: sentences that differ."
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """Sentences as a model's tokens."""

    ids: list[Tensor]  # int64 of each, its frame included
    words: list[np.ndarray]  # of each token the number of its word; -1 in the frame


def framed(bert: LoadedModel, texts: Sequence[str]) -> Sentences:
    """The tokens of sentences, whole. Raises ConfigError for one without a token, or longer than the model.

    bert: the model and its tokenizer
    texts: the sentences
    """
    before, behind = (list(ids) for ids in (bert.specials.before, bert.specials.behind))
    ids, words = [], []
    for number, one in enumerate(
        plain_tokenizer(bert).encode_batch(list(texts), add_special_tokens=False), start=1
    ):
        length = len(before) + len(one.ids) + len(behind)
        if not one.ids or length > bert.max_tokens:
            raise ConfigError(
                f"the sentence {texts[number - 1][:40]!r} has {len(one.ids):,} tokens; needed: 1 to"
                f" {bert.max_tokens - len(before) - len(behind):,}, the longest of {bert.origin}."
                " Leave its pair out."
            )
        numbers = [-1 if word is None else word for word in one.word_ids]
        ids.append(torch.tensor([*before, *one.ids, *behind]))
        words.append(np.array([*(-1 for _ in before), *numbers, *(-1 for _ in behind)]))
    return Sentences(ids=ids, words=words)


def sums_of_logs(bert: LoadedModel, sentences: Sentences, *, later_of_word: bool) -> np.ndarray:
    """The pseudo-log-likelihood of each sentence, nats, fp64 [N].

    bert: the model
    sentences: N of them
    later_of_word: also mask the later tokens of a token's word
    """
    found: list[float] = []
    for start in range(0, len(sentences.ids), SENTENCES_TOGETHER):
        some = slice(start, start + SENTENCES_TOGETHER)
        asked = [
            one_by_one(bert, ids_T, word_T, later_of_word=later_of_word)
            for ids_T, word_T in zip(sentences.ids[some], sentences.words[some], strict=True)
        ]
        nats_M = nats_of_each(bert, [a for one in asked for a in one]).double()
        found += [-float(part.sum()) for part in nats_M.split([len(one) for one in asked])]
    return np.array(found)


def pair_scores(
    bert: LoadedModel, good: Sentences, bad: Sentences, groups: Sequence[str] | None
) -> PairScores:
    """The share of pairs in which the good sentence is likelier; of equally likely ones the pair is wrong.

    A pair with a sum that is no number makes a share nan: the weights of a broken model say nothing of sentences.

    bert: the model
    good, bad: N sentences each
    groups: of each pair; None: there are none
    """
    right = {}
    for later in (False, True):
        good_N = sums_of_logs(bert, good, later_of_word=later)
        bad_N = sums_of_logs(bert, bad, later_of_word=later)
        # means of a nan are nan
        is_told_N = np.isfinite(good_N) & np.isfinite(bad_N)
        right[later] = np.where(is_told_N, good_N > bad_N, np.nan)
    of_group: dict[str, list[float]] = {}
    for group, is_right in zip(groups or (), right[False], strict=False):
        of_group.setdefault(group, []).append(float(is_right))
    return PairScores(
        right=float(right[False].mean()),
        right_of_words=float(right[True].mean()),
        by_group={group: float(np.mean(found)) for group, found in of_group.items()},
    )
