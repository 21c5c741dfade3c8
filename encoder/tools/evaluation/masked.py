"""What a model knows of masked tokens: loss, perplexity, bits a byte, and pseudo-perplexity.

    held-out loss        some tokens are masked at once       exp(mean loss): perplexity, as the card of RoPERT counts it
    pseudo-perplexity    each token is masked alone           exp(-1/N sum log p(x_i | all others)), Salazar et al. 2020

Losses depend on the masking rate, on the length of the documents and on the vocabulary: compare equal rates and lengths, and
between vocabularies bits a byte alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.batch import Targets, TokenBatch, packed_documents
from encoder.base.rng import generator
from encoder.nn.loss import cross_entropy_sum
from encoder.objectives.mlm import MLM, MaskedLanguageModel, MlmConfig
from encoder.tools.evaluation.pieces import Pieces
from encoder.tools.notebook import LoadedModel, in_forwards
from encoder.train.evaluate import unigram_entropy


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A document as it is shown, and what is asked of it."""

    shown_T: Tensor  # int64
    index_M: Tensor  # int64, the asked places
    value_M: Tensor  # int64, the ids that stood there


@dataclass(frozen=True, kw_only=True)
class MaskedLoss:
    """Sums over asked tokens."""

    sum: float  # nats
    count: int
    correct: int  # those whose own logit was the highest

    @property
    def mean(self) -> float:
        """Nats a token; nan of none."""
        return self.sum / self.count if self.count else math.nan


def masked_loss(
    bert: LoadedModel, pieces: Pieces, *, mask_share: float, seed: int = 0
) -> dict[str, float]:
    """The held-out numbers of a model, by name.

    bert: the model
    pieces: the text
    mask_share: of the tokens that are asked; of these 0.8 are [MASK], 0.1 another token, 0.1 stay
    seed: of the masks; a piece's mask is a function of it and of the piece's number

    Sums over all asked tokens, never a mean of means. Raises ConfigError for a share that is none.
    """
    ids = bert.specials
    # one more than the largest id
    vocab_size = 1 + max(bert.tokenizer.get_vocab().values())
    objective = MaskedLanguageModel(
        MlmConfig().held_out(mask_share=mask_share),
        vocab_size=vocab_size,
        mask_id=ids.mask_id,
        pad_id=ids.pad_id,
        special_ids=ids.all_special,
    )
    asked = []
    for number, document in enumerate(pieces.documents):
        row = objective.mask(document.numpy(), generator(seed, "evaluate", number))
        target = row.targets[MLM]
        asked.append(
            Asked(
                shown_T=torch.from_numpy(row.ids),
                index_M=torch.as_tensor(target.index),
                value_M=torch.as_tensor(target.value),
            )
        )
    found = loss_of(bert, asked)
    counts_V = np.bincount(torch.cat(pieces.documents).numpy(), minlength=vocab_size)
    return {
        "loss": found.mean,
        "perplexity": math.exp(min(found.mean, 700.0)),
        "bits_per_byte": found.mean / math.log(2) / pieces.bytes_per_token,
        "accuracy": found.correct / max(1, found.count),
        # the loss of a model that knows how often each token of this text occurs, and nothing else
        "unigram_loss": unigram_entropy(counts_V, ids.all_special),
        "asked_tokens": found.count,
    }


def pseudo_perplexity(bert: LoadedModel, pieces: Pieces) -> dict[str, float]:
    """Perplexity with one mask a token, and with the later tokens of the word masked, too (Kauf and Ivanova 2023).

    Without the second, long words look easier than they are: their beginning is told by their end. A piece of n tokens takes n
    forward passes of n tokens.
    """
    alone = _masked_one_by_one(bert, pieces, later_of_word=False)
    in_words = _masked_one_by_one(bert, pieces, later_of_word=True)
    return {
        "pseudo_perplexity": math.exp(min(alone.mean, 700.0)),
        "pseudo_perplexity_of_words": math.exp(min(in_words.mean, 700.0)),
        "pseudo_bits_per_byte": alone.mean / math.log(2) / pieces.bytes_per_token,
    }


def _masked_one_by_one(bert: LoadedModel, pieces: Pieces, *, later_of_word: bool) -> MaskedLoss:
    found = []
    for ids_T, word_T in zip(pieces.documents, pieces.words, strict=True):
        found.append(loss_of(bert, one_by_one(bert, ids_T, word_T, later_of_word=later_of_word)))
    return _added(found)


def one_by_one(
    bert: LoadedModel, ids_T: Tensor, word_T: np.ndarray, *, later_of_word: bool
) -> list[Asked]:
    """A document as often as it has tokens, each time with another one masked.

    bert: whose mask is shown
    ids_T, word_T: the tokens, and the numbers of their words; -1: never asked
    later_of_word: the later tokens of the word are masked, too
    """
    asked = []
    for place in np.flatnonzero(word_T >= 0):
        hidden = np.zeros(len(word_T), dtype=bool)
        hidden[place] = True
        if later_of_word:
            hidden[place:] |= word_T[place:] == word_T[place]
        shown_T = ids_T.clone()
        shown_T[torch.from_numpy(hidden)] = bert.specials.mask_id
        index_M = torch.tensor([place])
        asked.append(Asked(shown_T=shown_T, index_M=index_M, value_M=ids_T[index_M]))
    return asked


def loss_of(bert: LoadedModel, asked: Sequence[Asked]) -> MaskedLoss:
    """The sums over all that is asked of the documents."""
    found = [MaskedLoss(sum=0.0, count=0, correct=0)]
    with torch.no_grad():
        for some in in_forwards([len(a.shown_T) for a in asked]):
            batch = _batch(asked[some])
            if not batch.counts[MLM]:
                continue
            targets = batch.targets[MLM]
            x_MC = bert.model.masked_states(batch, targets.index_M)
            term = cross_entropy_sum(*bert.model.token_decoder(x_MC), targets.value_M)
            found.append(
                MaskedLoss(sum=float(term.sum), count=int(term.count), correct=int(term.correct))
            )
    return _added(found)


def nats_of_each(bert: LoadedModel, asked: Sequence[Asked]) -> Tensor:
    """[M], -log p of each asked token of all documents, in their order."""
    found = [torch.empty(0)]
    with torch.no_grad():
        for some in in_forwards([len(a.shown_T) for a in asked]):
            batch = _batch(asked[some])
            targets = batch.targets[MLM]
            logits_MV = bert.model.decode(bert.model.masked_states(batch, targets.index_M))
            found.append(F.cross_entropy(logits_MV.float(), targets.value_M, reduction="none"))
    return torch.cat(found)


def _batch(asked: Sequence[Asked]) -> TokenBatch:
    """Documents end to end; their places count from the first one's start."""
    starts = np.cumsum([0, *(len(a.shown_T) for a in asked[:-1])]).tolist()
    index_M = torch.cat([a.index_M + start for a, start in zip(asked, starts, strict=True)])
    value_M = torch.cat([a.value_M for a in asked])
    targets = Targets(index_M=index_M, value_M=value_M, count=len(index_M))
    return packed_documents([a.shown_T for a in asked], {MLM: targets})


def _added(found: Sequence[MaskedLoss]) -> MaskedLoss:
    return MaskedLoss(
        sum=math.fsum(f.sum for f in found),
        count=sum(f.count for f in found),
        correct=sum(f.correct for f in found),
    )
