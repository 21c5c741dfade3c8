"""Whether a model uses a long context: the loss of the same tokens with more and more before them, and a needle.

    context 512     [CLS]                     the last 512 tokens [SEP]
    context 2,048   [CLS] 1,536 tokens before the last 512 tokens [SEP]       the same masks: the loss must fall

    needle          [CLS] text ... The code of Anna is river. ... text  The code of Anna is [MASK]. [SEP]

No fine-tuning is needed, and text alone. A model whose rotary angles do not fit the length shows a loss that rises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.tools.evaluation.masked import Asked, MaskedLoss, loss_of, nats_of_each
from encoder.tools.evaluation.pieces import check_length, cut_texts, plain_tokenizer
from encoder.tools.notebook import LoadedModel

MOST_WINDOWS = 32
LEAST_LENGTH, MOST_ASKED_ZONE = 32, 512  # tokens
BUCKETS = 8  # of positions
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the text that stand before the needle
PLACES = 8  # needles of each cell of the grid
NAMES = ("Anna", "Peter", "Maria", "John", "Laura", "David", "Sarah", "Thomas")
SECRETS = (
    "river",
    "stone",
    "music",
    "paper",
    "horse",
    "bread",
    "green",
    "winter",
    "glass",
    "light",
)


@dataclass(frozen=True, kw_only=True)
class ContextScores:
    """By context length in tokens, by position, and by (length, depth)."""

    loss: dict[int, float]  # nats of the same asked tokens
    windows: int  # texts that were long enough
    position_loss: dict[int, float]  # by the first position of each stretch
    needle: dict[int, dict[float, float]]  # accuracy
    chance: float | None  # of the needle, where one could be asked

    def numbers(self) -> dict[str, float]:
        """The short form, for a table."""
        shortest, longest = min(self.loss), max(self.loss)
        found = {
            f"context_loss_{shortest}": self.loss[shortest],
            f"context_loss_{longest}": self.loss[longest],
            "context_gain": self.loss[shortest] - self.loss[longest],
        }
        if self.needle and self.chance is not None:
            cells = [share for row in self.needle.values() for share in row.values()]
            found["needle_accuracy"] = sum(cells) / len(cells)
            found["needle_chance"] = self.chance
        return found


def context_lengths(most_tokens: int) -> list[int]:
    """The asked zone and its doublings, up to the longest document: 1,024 gives 256, 512, 1,024."""
    zone = min(MOST_ASKED_ZONE, max(LEAST_LENGTH, most_tokens // 4))
    lengths = [zone]
    while 2 * lengths[-1] <= most_tokens:
        lengths.append(2 * lengths[-1])
    return lengths


def context_windows(
    bert: LoadedModel, texts: Iterable[str], *, longest: int | None = None
) -> list[Tensor]:
    """The first tokens, frame included, of the first 32 texts that are as long as the longest context.

    bert: the model and its tokenizer
    texts: long ones; shorter ones are passed over
    longest: tokens; None: the model's longest document

    Raises ConfigError where no text is long enough.
    """
    length = context_lengths(longest or bert.max_tokens)[-1]
    check_length(bert, length)
    windows: list[Tensor] = []
    for text in texts:
        if len(windows) == MOST_WINDOWS:
            break
        # hardly a token is longer than its text
        if len(text) < length // 2:
            continue
        try:
            piece = cut_texts(bert, [text], longest=length, most_tokens=length)
        except ConfigError:
            # white space alone has no token
            continue
        if len(piece.documents[0]) == length:
            windows.append(piece.documents[0])
    if not windows:
        raise ConfigError(
            f"no text has {length:,} tokens; needed: at least one text of that length, better 32."
            " Give longer texts, or a smaller --context-tokens."
        )
    return windows


def context_scores(
    bert: LoadedModel, windows: Sequence[Tensor], *, mask_share: float = 0.15, seed: int = 0
) -> ContextScores:
    """Losses and needles.

    bert: the model
    windows: as context_windows gives them
    mask_share: of the asked tokens, all of which are [MASK]
    seed: of the masks and the needles
    """
    lengths = context_lengths(len(windows[0]))
    losses = {length: MaskedLoss(sum=0.0, count=0, correct=0) for length in lengths}
    for number, window_T in enumerate(windows):
        draw = generator(seed, "context", number).random(lengths[0])
        for length in lengths:
            asked = _end_of(bert, window_T, length, draw < mask_share)
            losses[length] = _sum(losses[length], loss_of(bert, [asked]))
    needle, chance = needles(bert, windows, lengths, seed=seed)
    return ContextScores(
        loss={length: found.mean for length, found in losses.items()},
        windows=len(windows),
        position_loss=_position_loss(bert, windows, mask_share=mask_share, seed=seed),
        needle=needle,
        chance=chance,
    )


def _end_of(bert: LoadedModel, window_T: Tensor, length: int, asked_Z: np.ndarray) -> Asked:
    """The frame around the last tokens of a window, of which those in `asked_Z` are masked, counted from the end."""
    before, behind = len(bert.specials.before), len(bert.specials.behind)
    inner_T = window_T[before : len(window_T) - behind]
    room = length - before - behind
    ids_T = torch.cat((window_T[:before], inner_T[-room:], window_T[len(window_T) - behind :]))
    # the same tokens at every length: those of the shortest context
    zone = min(len(asked_Z) - before - behind, room)
    offset = before + room - zone
    index_M = torch.from_numpy(np.flatnonzero(asked_Z[:zone]) + offset)
    return _hidden(bert, ids_T, index_M)


def _hidden(bert: LoadedModel, ids_T: Tensor, index_M: Tensor) -> Asked:
    shown_T = ids_T.clone()
    shown_T[index_M] = bert.specials.mask_id
    return Asked(shown_T=shown_T, index_M=index_M, value_M=ids_T[index_M])


def _position_loss(
    bert: LoadedModel, windows: Sequence[Tensor], *, mask_share: float, seed: int
) -> dict[int, float]:
    """Loss by stretches of the longest window, masked all over."""
    length = len(windows[0])
    frame = len(bert.specials.before)
    edges = np.linspace(frame, length - len(bert.specials.behind), BUCKETS + 1).astype(int)
    nats: list[list[float]] = [[] for _ in range(BUCKETS)]
    for number, window_T in enumerate(windows):
        chosen_T = generator(seed, "positions", number).random(length) < mask_share
        # the frame is never asked
        chosen_T[: edges[0]] = chosen_T[edges[-1] :] = False
        index_M = torch.from_numpy(np.flatnonzero(chosen_T))
        found_M = nats_of_each(bert, [_hidden(bert, window_T, index_M)]).tolist()
        # the stretch of each asked place
        bucket_M = np.searchsorted(edges, index_M.numpy(), side="right") - 1
        for bucket, loss in zip(bucket_M.tolist(), found_M, strict=True):
            nats[bucket].append(loss)
    return {int(edges[b]): sum(some) / len(some) for b, some in enumerate(nats) if some}


def needles(
    bert: LoadedModel, windows: Sequence[Tensor], lengths: Sequence[int], *, seed: int = 0
) -> tuple[dict[int, dict[float, float]], float | None]:
    """Accuracy by length and depth, and that of chance; nothing where the tokenizer cuts the words that are asked for.

    bert: the model
    windows: ids of texts of the longest length, the filling
    lengths: in tokens, frame, needle and question included; one without room for them is left out
    seed: of names and words

    The answer is the likeliest of the words that the tokenizer has as one token each, so chance is known.
    """
    tokenizer = plain_tokenizer(bert)
    words = _single_tokens(tokenizer)
    if len(words) < 2:
        return {}, None
    answers = torch.tensor([*words.values()])
    found: dict[int, dict[float, float]] = {}
    for length in lengths:
        for depth in DEPTHS:
            right = []
            for number in range(PLACES):
                draw = generator(seed, "needle", length, round(100 * depth), number)
                name = NAMES[int(draw.integers(len(NAMES)))]
                word = [*words][int(draw.integers(len(words)))]
                needle = _ids(tokenizer, _sentence(name, word))
                window_T = windows[number % len(windows)]
                ids_T = _hay(bert, window_T, needle, words[word], length=length, depth=depth)
                if ids_T is not None:
                    right.append(_answer(bert, ids_T, answers) == words[word])
            if right:
                found.setdefault(length, {})[depth] = sum(right) / len(right)
    return found, 1.0 / len(words)


def _hay(
    bert: LoadedModel,
    window_T: Tensor,
    needle: list[int],
    asked_id: int,
    *,
    length: int,
    depth: float,
) -> Tensor | None:
    """Text with the needle in it and the question at its end, or None where there is no room.

    bert: whose frame and mask are used
    window_T: the text
    needle: ids of the sentence; the question is the same with `asked_id` masked
    asked_id: of the word
    length: tokens of everything
    depth: share of the text that stands before the needle
    """
    before, behind = bert.specials.before, bert.specials.behind
    question = [bert.specials.mask_id if token == asked_id else token for token in needle]
    room = length - len(before) - len(behind) - len(needle) - len(question)
    if room < 1:
        return None
    text = window_T[len(before) : len(before) + room].tolist()
    at = round(depth * room)
    return torch.tensor([*before, *text[:at], *needle, *text[at:], *question, *behind])


def _answer(bert: LoadedModel, ids_T: Tensor, answers: Tensor) -> int:
    """The likeliest of some ids at the last mask."""
    masks = (ids_T == bert.specials.mask_id).nonzero()[:, 0]
    with torch.no_grad():
        x_MC = bert.model.masked_states(packed_documents([ids_T]), masks[-1:])
        logits_V = bert.model.decode(x_MC)[0]
    return int(answers[logits_V[answers].argmax()])


def _single_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The words that change one token of the sentence, and that token's id."""
    found = {}
    sentences = {word: _ids(tokenizer, _sentence("Anna", word)) for word in SECRETS}
    lengths = [len(ids) for ids in sentences.values()]
    usual = min(lengths)
    same = {word: ids for word, ids in sentences.items() if len(ids) == usual}
    for word, ids in same.items():
        others = [other for other in same.values() if other is not ids]
        places = [p for p in range(usual) if all(other[p] != ids[p] for other in others)]
        if others and len(places) == 1 and ids.count(ids[places[0]]) == 1:
            found[word] = ids[places[0]]
    return found


def _sentence(name: str, word: str) -> str:
    return f" The code of {name} is {word}."


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _sum(a: MaskedLoss, b: MaskedLoss) -> MaskedLoss:
    return MaskedLoss(sum=a.sum + b.sum, count=a.count + b.count, correct=a.correct + b.correct)
