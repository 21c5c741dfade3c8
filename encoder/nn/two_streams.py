"""XLNet's attention: two streams of queries over one stream of keys, scored by content, by distance and by segment.

    rows of a micro-batch      T content rows, one a token; then M query rows, one a target. Keys are content rows
    content row i              sees what its ranks allow, and itself
    query row at token i       sees what its ranks allow, never token i: it is to predict it

    score(i, j) = [ (q_i + r_w) k_j + (q_i + r_r) W_r R(place_i - place_j) + (q_i + r_s) s(segment_i != segment_j) ] / sqrt(D)

R is a sinusoid of the distance (Yang et al. 2019, appendix A.2; Dai et al. 2019, section 3.3). A document is read in stretches.
A stretch sees the last tokens before it as its memory: their layer inputs, cut off from the gradient, as Transformer-XL keeps
them. They stand in the same micro-batch, so a layer computes all stretches at once.

This is the plain path, for any device and precision. Stretches of similar length are laid side by side in blocks, and the
backward pass computes a block's scores again: BLOCK_SCORES of them stand in memory at once, or those of one stretch where it
is longer: its rows times its keys (score_bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoder.base.errors import ConfigError
from encoder.base.objective import Stretch

# scores of a block over all heads; fp32: 16 MB on a CPU, 256 MB on a GPU
BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**26}
NEVER = 2**31 - 1  # rank of a key that nobody sees


@dataclass(frozen=True, kw_only=True)
class ReadingOrder:
    """How the documents of a micro-batch are read: int64 [T] each.

    A row that has query rank a sees a key of rank b where b < a. Places are those of the text: their differences are what the
    sinusoids see. Streams count in the order of reading, from 0 in each document, and stretches ascend with them.
    """

    place_T: Tensor
    stream_T: Tensor
    stretch_T: Tensor
    segment_T: Tensor
    key_rank_T: Tensor
    query_rank_T: Tensor
    memory_tokens: int = 0  # before a stretch that it sees


@dataclass(frozen=True, kw_only=True)
class QueryRows:
    """Where the query stream stands. M rows."""

    index_M: Tensor  # int64, the token of each
    real_M: Tensor  # bool; False: only fills the fixed capacity


@dataclass(frozen=True)
class _Block:
    """B stretches side by side, Q rows and K keys of each, filled up."""

    shape: tuple[int, int, int]  # B, Q, K
    visible_B1QK: Tensor  # bool
    differs_B1QK: Tensor  # bool: of two segments
    place_BQ: Tensor
    place_BK: Tensor
    # False for rows that see nothing at all; None: there are none
    sees_BQ11: Tensor | None
    nearest: int  # the least place_i - place_j
    farthest: int


@dataclass(frozen=True, kw_only=True)
class TwoStreamPlan:
    """Everything that the attention of a micro-batch needs and that does not depend on the layer. R = T + M rows."""

    tokens: int  # T
    memory_index_N: Tensor | None  # content rows that are somebody's memory; None: none is
    row_index: Tensor  # rows of all blocks, one block after another
    key_index: Tensor  # keys of all blocks: below T a content row, from T on one of memory_index_N
    place_of_R: Tensor  # where each row stands in the blocks
    blocks: Sequence[_Block]
    distances: range  # of waves_PC

    def waves(self, width: int, like: Tensor) -> Tensor:
        """waves_PC: a sinusoid for each distance, in the dtype of `like` and on its device."""
        distance_P = torch.arange(self.distances.start, self.distances.stop, device=like.device)
        return sinusoids(distance_P, width).to(like.dtype)


def plain_order(positions_T: Tensor, segments_T: Tensor | None) -> ReadingOrder:
    """Every token sees its whole document.

    positions_T: places inside documents
    segments_T: int64; None: all of segment 0
    """
    place_T = positions_T.to(torch.int64)
    zeros_T = torch.zeros_like(place_T)
    return ReadingOrder(
        place_T=place_T,
        stream_T=place_T,
        stretch_T=zeros_T,
        segment_T=zeros_T if segments_T is None else segments_T,
        key_rank_T=zeros_T,
        query_rank_T=zeros_T + 1,
    )


def sinusoids(distance_P: Tensor, width: int) -> Tensor:
    """[sin(w d), cos(w d)], w_f = 10000^(-2f/C) for f below C/2: fp32 [P, C], sines before cosines.

    The angles are fp32, as in transformers: fp64 weights meet the same numbers on both sides.
    """
    even_F = torch.arange(0, width, 2, device=distance_P.device, dtype=torch.float32)
    frequency_F = 1 / torch.pow(10000, even_F / width)
    angle_PF = distance_P.to(torch.float32)[:, None] * frequency_F
    return torch.cat((angle_PF.sin(), angle_PF.cos()), dim=-1)


def plan_two_streams(
    cu_seqlens_S1: Tensor, order: ReadingOrder, queries: QueryRows | None, *, heads: int
) -> TwoStreamPlan:
    """Who sees whom, in blocks. Asks the device for the documents' lengths and the order, once.

    cu_seqlens_S1: int32, ends of the documents
    order: how they are read
    queries: where the query stream stands; None: there is none
    heads: of a layer, for the size of a block

    Raises ConfigError while a CUDA graph is captured.
    """
    device = cu_seqlens_S1.device
    # a plan counts on tensors that say "cuda" where there is none
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "engine.graphs micro_step with an XLNet: its attention asks the device how long documents"
            " are, which no captured graph can. Use graphs: off."
        )
    units = _units(cu_seqlens_S1, order, queries)
    most = BLOCK_SCORES[device.type] // heads

    memory_T = np.zeros(units.tokens, dtype=bool)
    for unit in units.found:
        memory_T[unit.memory] = True
    number_T = units.tokens + np.cumsum(memory_T) - 1

    blocks: list[_Block] = []
    rows: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    place_of_R = np.zeros(units.rows, dtype=np.int64)
    at = 0
    for group in _groups(units.found, most=most):
        laid = _laid(group, units, number_T=number_T)
        real_BQ = laid.row_BQ >= 0
        place_of_R[laid.row_BQ[real_BQ]] = at + np.flatnonzero(real_BQ.ravel())
        at += real_BQ.size
        rows.append(np.maximum(laid.row_BQ, 0).ravel())
        keys.append(np.maximum(laid.key_BK, 0).ravel())
        blocks.append(_block(laid, units, device=device))

    def placed(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    nearest = min(block.nearest for block in blocks)
    farthest = max(block.farthest for block in blocks)
    return TwoStreamPlan(
        tokens=units.tokens,
        memory_index_N=placed(np.flatnonzero(memory_T)) if memory_T.any() else None,
        row_index=placed(np.concatenate(rows)),
        key_index=placed(np.concatenate(keys)),
        place_of_R=placed(place_of_R),
        blocks=blocks,
        distances=range(nearest, farthest + 1),
    )


def score_bytes(stretch: Stretch, *, tokens: int, heads: int, width: int, device: str) -> int:
    """Bytes that the backward pass of a block holds for a moment, and the masks of all blocks.

    Of each score: the softmax, its gradient and one number more; of each pair of a row and a distance one number. Found by
    torch's profiler on a CPU, of 600 to 4,096 tokens and 1 to 12 heads, within 4 %; in bf16 as in fp32.

    stretch: the longest
    tokens: of a micro-batch, as many stretches of this length
    heads: of a layer
    width: bytes of a number; softmaxes are computed in 4 at least
    device: cpu or cuda
    """
    keys = stretch.tokens + stretch.memory_tokens
    pairs = (stretch.tokens + stretch.query_rows) * keys
    whole = pairs * max(1.0, tokens / stretch.tokens)
    block = max(pairs, min(whole, BLOCK_SCORES[device] / heads))

    # from the first key to the last token, and back
    distances = (stretch.tokens + keys) / keys
    number = max(width, 4)
    # of a pair, whatever the heads: the place of its distance, 8 bytes; whether it is seen, and of two segments
    return int(block * (heads * number * (3 + distances) + 8) + 2 * whole)


class TwoStreamAttention(nn.Module):
    """The attention of a layer. Its biases r_w, r_r and r_s and its segments are the layer's own (`untie_r` of XLNet)."""

    def __init__(self, *, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.head_width = heads, head_width
        self.Wq = nn.Linear(width, inner, bias=False)
        self.Wkv = nn.Linear(width, 2 * inner, bias=False)
        self.Wr = nn.Linear(width, inner, bias=False)
        self.Wo = nn.Linear(inner, width, bias=False)
        self.r_w = HeadBias(heads, head_width)
        self.r_r = HeadBias(heads, head_width)
        self.r_s = HeadBias(heads, head_width)
        self.segments = Segments(heads, head_width)

    def forward(self, x_RC: Tensor, *, plan: TwoStreamPlan, waves_PC: Tensor) -> Tensor:
        """[R, C] -> [R, C]."""
        q_RHD = self.Wq(x_RC).unflatten(-1, (self.heads, self.head_width))
        x_KC = x_RC[: plan.tokens]
        if plan.memory_index_N is not None:
            # gradients reach Wkv by way of the memory, and not what is remembered. One call: at ZeRO
            # stage 3 ranks gather weights together, also where only some have a memory
            memory_NC = x_KC.detach().index_select(0, plan.memory_index_N)
            x_KC = torch.cat((x_KC, memory_NC))
        kv_K2HD = self.Wkv(x_KC).unflatten(-1, (2, self.heads, self.head_width))
        k_KHD, v_KHD = kv_K2HD.unbind(1)

        out_RHD = attend_two_streams(
            plan,
            (self.r_w(q_RHD), self.r_r(q_RHD), self.segments(self.r_s(q_RHD))),
            k_KHD,
            v_KHD,
            self.Wr(waves_PC).unflatten(-1, (self.heads, self.head_width)),
        )
        return self.Wo(out_RHD.flatten(1))


class HeadBias(nn.Module):
    """x + weight: a vector for each head."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_width))

    def forward(self, x_NHD: Tensor) -> Tensor:
        """[N, H, D] -> [N, H, D]."""
        return x_NHD + self.weight.to(x_NHD.dtype)


class Segments(nn.Module):
    """How much more a query scores a key of another segment than one of its own."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        # the same segment, another one
        self.weight = nn.Parameter(torch.zeros(2, heads * head_width))

    def forward(self, q_NHD: Tensor) -> Tensor:
        """[N, H, D] -> [N, H]."""
        same_HD, other_HD = self.weight.to(q_NHD.dtype).unflatten(-1, (self.heads, -1))
        # what all keys of a query have in common is nothing to a softmax
        return (q_NHD * (other_HD - same_HD)).sum(-1)


def attend_two_streams(
    plan: TwoStreamPlan,
    queries: tuple[Tensor, Tensor, Tensor],
    k_KHD: Tensor,
    v_KHD: Tensor,
    r_PHD: Tensor,
) -> Tensor:
    """[R, H, D]: what each row gets of the values that it sees; zeros where it sees none.

    plan: of the micro-batch
    queries: that meet keys and distances, [R, H, D] each, and scores of another segment [R, H]
    k_KHD, v_KHD: keys and values of content rows, then of the memory
    r_PHD: keys of the distances
    """
    of_rows = [x.index_select(0, plan.row_index) for x in queries]
    of_keys = [x.index_select(0, plan.key_index) for x in (k_KHD, v_KHD)]
    rows = [block.shape[0] * block.shape[1] for block in plan.blocks]
    keys = [block.shape[0] * block.shape[2] for block in plan.blocks]
    # [block] of three tensors of rows and two of keys
    given = zip(*(x.split(rows) for x in of_rows), *(x.split(keys) for x in of_keys), strict=True)
    run: Callable[..., Tensor] = _attend
    if torch.is_grad_enabled():
        # nothing in it draws random numbers
        run = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
    out = []
    for block, tensors in zip(plan.blocks, given, strict=True):
        first = block.nearest - plan.distances.start
        last = block.farthest - plan.distances.start
        out.append(run(block, *tensors, r_PHD[first : last + 1]))
    return torch.cat(out).index_select(0, plan.place_of_R)


def _attend(
    block: _Block,
    content_NHD: Tensor,
    distance_NHD: Tensor,
    segment_NH: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    r_pHD: Tensor,
) -> Tensor:
    """[B Q, H, D] of one block."""
    b, q, k = block.shape
    scale = content_NHD.shape[-1] ** -0.5
    content_BHQD, distance_BHQD = (
        x.unflatten(0, (b, q)).transpose(1, 2) for x in (content_NHD, distance_NHD)
    )
    k_BHKD, v_BHKD = (x.unflatten(0, (b, k)).transpose(1, 2) for x in (k_NHD, v_NHD))

    # a score for every distance, then each pair picks its own
    far_BHQP = distance_BHQD @ r_pHD.permute(1, 2, 0)
    pick_B1QK = (block.place_BQ[:, :, None] - block.place_BK[:, None, :] - block.nearest)[:, None]
    heads = content_BHQD.shape[1]
    scores = content_BHQD @ k_BHKD.transpose(-1, -2)
    scores = scores + far_BHQP.gather(-1, pick_B1QK.expand(-1, heads, -1, -1))
    other_BHQ1 = segment_NH.unflatten(0, (b, q)).transpose(1, 2)[..., None]
    scores = (scores + other_BHQ1 * block.differs_B1QK) * scale

    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = exact.masked_fill(~block.visible_B1QK, torch.finfo(exact.dtype).min)
    shares_BHQK = hidden.softmax(-1).to(v_BHKD.dtype)
    out_BQHD = (shares_BHQK @ v_BHKD).transpose(1, 2)
    if block.sees_BQ11 is not None:
        out_BQHD = out_BQHD * block.sees_BQ11
    return out_BQHD.flatten(0, 1)


# the plan, on the host -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A stretch of a document: tokens in the order of reading."""

    tokens: np.ndarray
    memory: np.ndarray  # tokens before it
    queries: np.ndarray  # query rows at its tokens, from T on


@dataclass(frozen=True, kw_only=True)
class _Units:
    """The stretches of a micro-batch, and of its rows what scores depend on."""

    found: list[_Unit]
    tokens: int  # T
    rows: int  # R
    token_R: np.ndarray  # of each row
    place_T: np.ndarray
    segment_T: np.ndarray
    key_rank_T: np.ndarray
    query_rank_T: np.ndarray


def _units(cu_seqlens_S1: Tensor, order: ReadingOrder, queries: QueryRows | None) -> _Units:
    # a list: tensors without data say here that they have none, and a plan takes its estimate
    ends = np.array(cu_seqlens_S1.tolist(), dtype=np.int64)
    stream_T, stretch_T = (x.cpu().numpy() for x in (order.stream_T, order.stretch_T))
    tokens = len(stream_T)
    document_T = np.repeat(np.arange(len(ends) - 1), np.diff(ends))

    # tokens document by document, in the order of reading; a stretch ends where the next begins
    read_T = np.lexsort((stream_T, document_T))
    document, stretch = document_T[read_T], stretch_T[read_T]
    changes = (np.diff(document) != 0) | (np.diff(stretch) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [tokens]])

    # query rows by the stretch of their token, in its order
    token_M = np.zeros(0, dtype=np.int64)
    real = np.zeros(0, dtype=np.int64)
    if queries is not None:
        token_M = queries.index_M.cpu().numpy()
        real = np.flatnonzero(queries.real_M.cpu().numpy())
    read_place_T = np.empty(tokens, dtype=np.int64)
    read_place_T[read_T] = np.arange(tokens)
    by_place = real[np.argsort(read_place_T[token_M[real]], kind="stable")]
    query_starts = np.searchsorted(read_place_T[token_M[by_place]], starts)

    found = []
    for number, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        first = max(ends[document[start]], start - order.memory_tokens)
        found.append(
            _Unit(
                tokens=read_T[start:end],
                memory=read_T[first:start],
                queries=tokens + by_place[query_starts[number] : query_starts[number + 1]],
            )
        )
    place_T, segment_T, key_rank_T, query_rank_T = (
        x.cpu().numpy()
        for x in (order.place_T, order.segment_T, order.key_rank_T, order.query_rank_T)
    )
    return _Units(
        found=found,
        tokens=tokens,
        rows=tokens + len(token_M),
        token_R=np.concatenate([np.arange(tokens), token_M]),
        place_T=place_T,
        segment_T=segment_T,
        key_rank_T=key_rank_T,
        query_rank_T=query_rank_T,
    )


def _groups(units: Sequence[_Unit], *, most: int) -> list[list[_Unit]]:
    """Units of similar length together, so that rows times keys of a group, filled up, are at most `most`, or it is one unit."""

    def size(unit: _Unit) -> tuple[int, int]:
        return len(unit.memory) + len(unit.tokens), len(unit.tokens) + len(unit.queries)

    groups: list[list[_Unit]] = []
    keys = rows = 0
    for unit in sorted(units, key=size, reverse=True):
        # keys descend, rows may not
        rows = max(rows, size(unit)[1])
        if groups and (len(groups[-1]) + 1) * keys * rows <= most:
            groups[-1].append(unit)
            continue
        keys, rows = size(unit)
        groups.append([unit])
    return groups


@dataclass(frozen=True)
class _Laid:
    """A group side by side; -1 where a unit has fewer."""

    row_BQ: np.ndarray
    key_BK: np.ndarray  # as TwoStreamPlan's
    token_BK: np.ndarray  # of each key
    memory_BK: np.ndarray  # bool


def _laid(group: Sequence[_Unit], units: _Units, *, number_T: np.ndarray) -> _Laid:
    """number_T: the key that a token is as a memory"""
    rows = [np.concatenate([unit.tokens, unit.queries]) for unit in group]
    keys = [np.concatenate([number_T[unit.memory], unit.tokens]) for unit in group]
    tokens = [np.concatenate([unit.memory, unit.tokens]) for unit in group]
    key_BK = _filled_up(keys)
    return _Laid(
        row_BQ=_filled_up(rows),
        key_BK=key_BK,
        token_BK=_filled_up(tokens),
        memory_BK=key_BK >= units.tokens,
    )


def _filled_up(parts: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.full((len(parts), max(map(len, parts))), -1, dtype=np.int64)
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole


def _block(laid: _Laid, units: _Units, *, device: torch.device) -> _Block:
    real_BQ, real_BK = laid.row_BQ >= 0, laid.token_BK >= 0
    # what fills up takes the values of row and key 0, which nobody looks at
    row_BQ, token_BK = np.maximum(laid.row_BQ, 0), np.maximum(laid.token_BK, 0)
    token_BQ = units.token_R[row_BQ]
    is_content_BQ = row_BQ < units.tokens

    # a memory is seen by all, and counts as segment 0
    rank_BK = np.where(laid.memory_BK, -1, units.key_rank_T[token_BK])
    rank_BK = np.where(real_BK, rank_BK, NEVER)
    segment_BK = np.where(laid.memory_BK, 0, units.segment_T[token_BK])
    itself_BK = np.where(laid.memory_BK | ~real_BK, -1, token_BK)
    itself_BQ = np.where(is_content_BQ & real_BQ, token_BQ, -2)

    rank_BQ, segment_BQ = units.query_rank_T[token_BQ], units.segment_T[token_BQ]
    visible_BQK = rank_BK[:, None, :] < rank_BQ[:, :, None]
    visible_BQK |= itself_BK[:, None, :] == itself_BQ[:, :, None]
    # rows that fill up see everything, so that none of their numbers is nan
    visible_BQK |= ~real_BQ[:, :, None]
    sees_BQ = visible_BQK.any(-1)

    # filled up with places of the unit itself: no distance is beyond those of its pairs
    place_BQ = np.where(real_BQ, units.place_T[token_BQ], units.place_T[token_BQ[:, :1]])
    place_BK = np.where(real_BK, units.place_T[token_BK], units.place_T[token_BK[:, :1]])

    def placed(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _Block(
        shape=(*row_BQ.shape, token_BK.shape[1]),
        visible_B1QK=placed(visible_BQK[:, None]),
        differs_B1QK=placed((segment_BQ[:, :, None] != segment_BK[:, None, :])[:, None]),
        place_BQ=placed(place_BQ),
        place_BK=placed(place_BK),
        sees_BQ11=None if sees_BQ.all() else placed(sees_BQ[:, :, None, None]),
        nearest=int((place_BQ.min(1) - place_BK.max(1)).min()),
        farthest=int((place_BQ.max(1) - place_BK.min(1)).max()),
    )
