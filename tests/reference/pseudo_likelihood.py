"""Pseudo-log-likelihood of a sentence the slow way: transformers, one mask and one forward pass at a time."""

from __future__ import annotations

from typing import Any

import torch


def pseudo_log_likelihood(
    model: Any, ids: list[int], words: list[int], *, mask_id: int, later_of_word: bool
) -> float:
    """The sum of log p(token | all others), nats (Salazar et al. 2020).

    model: a class of transformers with a head over masked tokens
    ids: the sentence in its frame
    words: the number of each token's word; -1 in the frame
    mask_id: of the vocabulary
    later_of_word: mask the later tokens of the word, too (Kauf and Ivanova 2023)
    """
    total = 0.0
    for place, word in enumerate(words):
        if word < 0:
            continue
        shown = list(ids)
        shown[place] = mask_id
        if later_of_word:
            for later in range(place + 1, len(ids)):
                if words[later] == word:
                    shown[later] = mask_id
        with torch.no_grad():
            logits_V = model(torch.tensor([shown])).logits[0, place]
        total += float(logits_V.double().log_softmax(-1)[ids[place]])
    return total
