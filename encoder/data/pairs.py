"""Documents into pairs of sentences, as BERT and ALBERT make their examples (create_pretraining_data.py of both).

    sentences of a document      4  3  5  6 tokens, pairs of at most 13: [CLS] A [SEP] B [SEP] with 10 tokens of text
    chunk                        4  3  5            sentences until 10 tokens are reached
    A | B                        4 | 3 5            cut at random between two sentences: label 0
    cut to 10 tokens             4 | 6              a token at a time off the longer part, at random its first or its last

Half of the pairs have label 1. BERT: B is taken from another document, from a random sentence on, and the sentences after A
are read again for the next pair. ALBERT: A and B change places. A chunk of one sentence always gets a B of another document.

All documents of a window are gone through side by side, a pair of each at a time. So what is drawn depends on nothing but the
window's sentences and its generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.objective import PAIR_FRAME_TOKENS, PairRule
from encoder.data.sentences import SentenceLists


@dataclass(frozen=True)
class WindowSentences:
    """The sentences of a window's documents, end to end. D documents, N sentences."""

    source_D: np.ndarray  # int64, number of the source
    document_D: np.ndarray  # int64, in its source
    starts_D1: np.ndarray  # int64 into the sentences
    before_N1: np.ndarray  # int64, tokens of all sentences before each, and in all

    @staticmethod
    def joined(parts: Sequence[tuple[int, np.ndarray, SentenceLists]]) -> WindowSentences:
        """Of several sources: the number of each, its documents, and their sentences."""
        counts = [np.diff(lists.starts_D1) for _, _, lists in parts]
        tokens = [lists.tokens_N for _, _, lists in parts]

        return WindowSentences(
            np.concatenate([np.full(len(documents), source) for source, documents, _ in parts]),
            np.concatenate([documents for _, documents, _ in parts]),
            np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
            np.concatenate([[0], np.cumsum(np.concatenate(tokens))]),
        )

    def reached(self, first_N: np.ndarray, tokens: np.ndarray, document: np.ndarray) -> np.ndarray:
        """The sentence behind the first ones of a document that have so many tokens together, or its last."""
        # the first boundary between sentences at or behind so many tokens, inside the document
        place = np.searchsorted(self.before_N1, self.before_N1[first_N] + tokens)
        return np.minimum(place, self.starts_D1[document + 1])


@dataclass(frozen=True)
class _Part:
    """One part of each of n pairs: sentences of a document."""

    document: np.ndarray  # int64 [n], a document of the window
    first: np.ndarray  # int64 [n], its first sentence
    end: np.ndarray  # int64 [n], behind its last

    def where(self, chosen: np.ndarray, other: _Part) -> _Part:
        """These parts where chosen, elsewhere the others."""
        return _Part(
            np.where(chosen, self.document, other.document),
            np.where(chosen, self.first, other.first),
            np.where(chosen, self.end, other.end),
        )

    @staticmethod
    def joined(parts: Sequence[_Part], order: np.ndarray) -> _Part:
        """All parts, one behind another, in another order."""
        return _Part(
            np.concatenate([part.document for part in parts])[order],
            np.concatenate([part.first for part in parts])[order],
            np.concatenate([part.end for part in parts])[order],
        )

    def tokens(self, text: WindowSentences) -> np.ndarray:
        return text.before_N1[self.end] - text.before_N1[self.first]


@dataclass(frozen=True)
class Pairs:
    """n pairs, those of a document together. Pieces as WindowPlan has them, two for each pair."""

    pieces_P4: np.ndarray  # int64 [2 n, 4]
    tokens: np.ndarray  # int64 [n], with [CLS] and two [SEP]
    label: np.ndarray  # int8 [n]


def pairs_of(
    text: WindowSentences, rule: PairRule, *, max_tokens: int, chance: np.random.Generator
) -> Pairs:
    """All pairs of a window's documents.

    text: the sentences; a document without one gives no pair
    rule: what an objective asks for
    max_tokens: of a pair, [CLS] and two [SEP] counted
    chance: belongs to the window alone
    """
    room = max_tokens - PAIR_FRAME_TOKENS
    assert room >= 2, "a pair has a token of each part"

    # short_share of the documents get shorter pairs, of 2 to `room` tokens: one length for each
    counts_D = np.diff(text.starts_D1)
    is_short_D = chance.random(len(counts_D)) < rule.short_share
    target_D = np.where(is_short_D, chance.integers(2, room + 1, len(counts_D)), room)

    # each turn makes one pair of every document that has sentences left
    next_D = text.starts_D1[:-1].copy()
    partners = np.flatnonzero(counts_D)
    open_D = partners
    turns: list[_Turn] = []
    while len(open_D):
        turn = _next_pairs(text, rule, open_D, next_D, target_D, partners, chance)
        turns.append(turn)
        next_D[open_D] = turn.next
        open_D = open_D[turn.next < text.starts_D1[open_D + 1]]

    if not turns:
        nothing = np.zeros(0, np.int64)
        return Pairs(np.zeros((0, 4), np.int64), nothing, nothing.astype(np.int8))

    # those of a document together, in their order
    order = np.argsort(np.concatenate([turn.document for turn in turns]), kind="stable")
    first = _Part.joined([turn.first for turn in turns], order)
    second = _Part.joined([turn.second for turn in turns], order)

    pieces_P4, tokens = _cut_to(room, text, first, second, chance)
    return Pairs(pieces_P4, tokens, np.concatenate([turn.label for turn in turns])[order])


@dataclass(frozen=True)
class _Turn:
    """A pair of each of n documents, its parts as they are laid."""

    document: np.ndarray  # int64 [n]
    first: _Part
    second: _Part
    label: np.ndarray  # int8 [n]
    next: np.ndarray  # int64 [n], the sentence at which the document goes on


def _next_pairs(
    text: WindowSentences,
    rule: PairRule,
    open_D: np.ndarray,
    next_D: np.ndarray,
    target_D: np.ndarray,
    partners: np.ndarray,
    chance: np.random.Generator,
) -> _Turn:
    """The next pair of each open document.

    text: the sentences
    rule: what an objective asks for
    open_D: documents with sentences left
    next_D: the next sentence of every document
    target_D: tokens that a pair of every document is to have
    partners: documents with sentences, of which a random B is taken
    """
    first = next_D[open_D]
    target = target_D[open_D]

    # the chunk: sentences until the target is reached, split behind 1 to count - 1 of them. Of
    # one sentence A is all, and the rest is empty
    end = text.reached(first, target, open_D)
    count = end - first
    split = first + chance.integers(1, np.maximum(count, 2))
    coin = chance.random(len(open_D)) < 0.5

    part_a = _Part(open_D, first, split)
    rest = _Part(open_D, split, end)

    # drawn for every pair, used or not; B gets as many tokens as A leaves of the target
    other = _other_parts(text, open_D, target - part_a.tokens(text), partners, chance)

    # random: B of another document by the coin, and where a chunk of one sentence has no rest.
    # Swapped: by the coin, and B of another document only where there is no rest
    if rule.label_1 == "random":
        is_other = coin | (count == 1)
        is_swapped = np.zeros(len(open_D), bool)
    else:
        is_other = count == 1
        is_swapped = coin & ~is_other

    part_b = other.where(is_other, rest)
    first_part = part_a
    second_part = part_b
    if is_swapped.any():
        first_part = part_b.where(is_swapped, part_a)
        second_part = part_a.where(is_swapped, part_b)

    label = (is_other | is_swapped).astype(np.int8)
    # where B is of another document, the rest was not used, and is read again for the next pair
    return _Turn(open_D, first_part, second_part, label, np.where(is_other, split, end))


def _other_parts(
    text: WindowSentences,
    open_D: np.ndarray,
    tokens: np.ndarray,
    partners: np.ndarray,
    chance: np.random.Generator,
) -> _Part:
    """Sentences of another document for each, from a random one on, until they have so many tokens.

    Any other document is as likely. Where there is no other, it is the same one, as in the original after ten draws.

    open_D: the documents that a part is for
    tokens: that it is to have, of each
    partners: documents with sentences
    """
    # uniform over all partners but one: drawn among one fewer, and moved
    # past the document's own place
    place = chance.integers(0, max(len(partners) - 1, 1), len(open_D))
    if len(partners) > 1:
        place += place >= np.searchsorted(partners, open_D)

    document = partners[place]
    counts = text.starts_D1[document + 1] - text.starts_D1[document]
    first = text.starts_D1[document] + chance.integers(0, counts)
    return _Part(document, first, text.reached(first, np.maximum(tokens, 1), document))


def _cut_to(
    room: int,
    text: WindowSentences,
    part_a: _Part,
    part_b: _Part,
    chance: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces [2 n, 4] and tokens [n] of pairs with at most `room` tokens of text.

    A token at a time is dropped off the longer part, off B where both are as long. How many of a part's dropped ones are its
    first is a sum of coins, drawn as one number.

    room: tokens of text that a pair may have
    text: the sentences
    part_a, part_b: as they are laid
    chance: of the window
    """
    tokens_a = part_a.tokens(text)
    tokens_b = part_b.tokens(text)

    # in closed form: the longer part first comes down to the length of the shorter one. What is
    # still above the room is dropped in turn, B first
    above = np.maximum(tokens_a + tokens_b - room, 0)
    drop_a = np.minimum(above, np.maximum(tokens_a - tokens_b, 0))
    drop_b = np.minimum(above, np.maximum(tokens_b - tokens_a, 0))

    rest = above - drop_a - drop_b
    drop_a += rest // 2
    drop_b += (rest + 1) // 2

    pieces_a = _pieces(text, part_a, drop_a, chance.binomial(drop_a, 0.5))
    pieces_b = _pieces(text, part_b, drop_b, chance.binomial(drop_b, 0.5))
    pieces_P4 = np.stack([pieces_a, pieces_b], axis=1).reshape(-1, 4)
    return pieces_P4, tokens_a + tokens_b - above + PAIR_FRAME_TOKENS


def _pieces(
    text: WindowSentences, part: _Part, dropped: np.ndarray, dropped_first: np.ndarray
) -> np.ndarray:
    """Pieces [n, 4] of the parts without the dropped tokens; [CLS] stands at 0 of a stored document.

    text: the sentences
    part: of each pair
    dropped, dropped_first: tokens that each loses, and how many of them are its first
    """
    # the start in the stored document: [CLS], the sentences before the
    # part, the dropped first tokens
    begin_D = text.before_N1[text.starts_D1[:-1]]
    start = 1 + text.before_N1[part.first] - begin_D[part.document] + dropped_first
    end = start + part.tokens(text) - dropped
    source = text.source_D[part.document]
    return np.stack([source, text.document_D[part.document], start, end], axis=1)
