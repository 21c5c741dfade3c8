"""BERT's and ALBERT's pairs from lists of sentences, a token at a time, as create_pretraining_data.py makes them.

A sentence is a list of tokens; here a token is (source, document, place). The documents take turns, so that the draws are
those of the fast version: all documents of a turn draw a number of a kind before the next kind is drawn, and what is cut
off is drawn at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Token = tuple[int, int, int]
Sentence = list[Token]
Pair = tuple[list[Token], list[Token], int]  # A, B, label


def sentence_pairs(
    documents: list[list[Sentence]], *, label_1: str, short_share: float, room: int, chance: Any
) -> list[list[Pair]]:
    """Of each document its pairs (A, B, label)."""
    short = chance.random(len(documents))
    lengths = chance.integers(2, room + 1, len(documents))
    targets = [int(n) if r < short_share else room for r, n in zip(short, lengths)]
    places = [0] * len(documents)
    pairs: list[list[Pair]] = [[] for _ in documents]
    filled = [d for d, sentences in enumerate(documents) if sentences]
    turn = list(filled)
    while turn:
        chunks = [_chunk(documents[d], places[d], targets[d]) for d in turn]
        ends = chance.integers(1, np.array([max(len(chunk), 2) for chunk in chunks]))
        coins = chance.random(len(turn))
        others = chance.integers(0, max(len(filled) - 1, 1), len(turn))
        partners = [_partner(filled, d, int(number)) for d, number in zip(turn, others)]
        firsts = chance.integers(0, np.array([len(documents[p]) for p in partners]))
        made = []
        for i, d in enumerate(turn):
            chunk = chunks[i]
            part_a = [token for sentence in chunk[: ends[i]] for token in sentence]
            part_b = [token for sentence in chunk[ends[i] :] for token in sentence]
            used = len(chunk)
            label = 0
            if len(chunk) == 1 or (label_1 == "random" and coins[i] < 0.5):
                part_b = []
                for sentence in documents[partners[i]][firsts[i] :]:
                    part_b += sentence
                    if len(part_b) >= targets[d] - len(part_a):
                        break
                used = int(ends[i])
                label = 1
            elif label_1 == "swapped" and coins[i] < 0.5:
                part_a, part_b, label = part_b, part_a, 1
            places[d] += used
            made.append((part_a, part_b, label))
        for d, pair in zip(turn, made):
            pairs[d].append(pair)
        turn = [d for d in turn if places[d] < len(documents[d])]
    return _cut(pairs, room, chance)


def _cut(pairs: list[list[Pair]], room: int, chance: Any) -> list[list[Pair]]:
    drops = [_dropped(len(a), len(b), room) for of_d in pairs for a, b, _ in of_d]
    fronts_a = iter(chance.binomial(np.array([a for a, _ in drops], np.int64), 0.5))
    fronts_b = iter(chance.binomial(np.array([b for _, b in drops], np.int64), 0.5))
    left = iter(drops)
    cut: list[list[Pair]] = []
    for of_d in pairs:
        cut.append([])
        for part_a, part_b, label in of_d:
            drop_a, drop_b = next(left)
            part_a = _without(part_a, drop_a, int(next(fronts_a)))
            part_b = _without(part_b, drop_b, int(next(fronts_b)))
            cut[-1].append((part_a, part_b, label))
    return cut


def _chunk(sentences: list[Sentence], place: int, target: int) -> list[Sentence]:
    chunk: list[Sentence] = []
    for sentence in sentences[place:]:
        chunk.append(sentence)
        if sum(map(len, chunk)) >= target:
            break
    return chunk


def _partner(filled: list[int], document: int, number: int) -> int:
    others = [d for d in filled if d != document] or [document]
    return others[number]


def _dropped(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens are dropped of each, one after another."""
    dropped_a = dropped_b = 0
    while a + b > room:
        if a > b:
            a, dropped_a = a - 1, dropped_a + 1
        else:
            b, dropped_b = b - 1, dropped_b + 1
    return dropped_a, dropped_b


def _without(part: list[Token], dropped: int, front: int) -> list[Token]:
    return part[front : len(part) - (dropped - front)]
