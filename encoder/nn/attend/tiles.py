"""The fast route on CPUs: documents, or windows of them, as equal tiles, and one call over all tiles of a width.

    document tiles (global layers, and short windows)     window tiles (local layers of longer documents)

        keys  a a a .        b b b b                          tokens   | block 0 | block 1 | block 2 |
        a     1 1 1 0     b  1 1 1 1                          queries             block 1
        a     1 1 1 0     b  1 1 1 1                          keys      block 0   block 1   block 2
        a     1 1 1 0     b  1 1 1 1                          mask      same document and |i - j| <= radius
        .     padding     b  1 1 1 1

A document tile is as wide as its longest document, documents of similar length together. A window tile is a block of
consecutive tokens, at least as long as the radius, with the block before and the block after it; documents may cross
blocks, so only the last block is padded, and the keys are a view. Indices and masks are made once per micro-batch.

One core with AMX, forward + backward of 4,096 tokens of 4 heads x 64, CPU time in ms beside one call a document (sdpa):

    documents of      512 global    512 window    350 window    100 global    100 window
    fp32              72 of 70      41 of 70      42 of 74      41 of 38      42 of 42
    bf16              53 of 54      54 of 58      51 of 75      39 of 58      48 of 62
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.pieces import piece_rows
from encoder.nn.attend.contract import AttentionRequest, document_bounds

# added to the scores of keys that a query must not see: exp gives exactly 0 beside a visible key
HIDDEN = -1e30
# lengths that round up to the same multiple of this share a width, so that groups are few
WIDTH_STEP = 32
# wider tiles go to torch's blockwise kernel, which keeps no scores. With AMX at 512 keys 54 ms against 89, before products took a
# few heads at a time; not measured since
PRODUCT_KEYS = 256
# 2,048 tokens in documents of 512: 17 ms by products, 26 by the kernel (AVX512-BF16)
PRODUCT_KEYS_WITHOUT_AMX = 512


class Tiles:
    """Gather tokens into tiles, attend, gather back."""

    name = "tiles"

    def why_not(self, request: AttentionRequest) -> str | None:
        """It runs everywhere."""
        return None

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> TilesPlan:
        """Document tiles, and what local layers use: the same, the same with a band as mask, or window tiles."""
        bounds = torch.tensor(
            document_bounds(cu_seqlens_S1, tokens=tokens), dtype=torch.int64
        ).view(-1, 2)
        starts_S = bounds[:, 0]
        lengths_S = bounds[:, 1] - bounds[:, 0]
        longest = max(lengths_S.tolist(), default=0)
        whole = _document_tiles(starts_S, lengths_S, tokens=tokens, radius=None)

        # up to radius + 1 tokens the band hides nothing. Up to two radii a document is narrower
        # than the three blocks of keys of a window tile
        if longest <= window_radius_tokens + 1:
            windowed: DocumentTiles | WindowTiles = whole
        elif longest <= 2 * window_radius_tokens:
            windowed = _document_tiles(
                starts_S, lengths_S, tokens=tokens, radius=window_radius_tokens
            )
        else:
            windowed = _window_tiles(lengths_S, tokens=tokens, radius=window_radius_tokens)
        return TilesPlan(
            whole=whole.to(cu_seqlens_S1.device), windowed=windowed.to(cu_seqlens_S1.device)
        )


class TilesPlan:
    """The tilings of one micro-batch."""

    traceable = False

    def __init__(self, *, whole: DocumentTiles, windowed: DocumentTiles | WindowTiles) -> None:
        self.whole, self.windowed = whole, windowed

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        if not len(q_THD):
            return v_THD
        return (self.windowed if local else self.whole).attend(q_THD, k_THD, v_THD)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tiles of one width."""

    tiles: int
    width: int  # tokens
    mask: Tensor  # [N, 1, 1 or width, width] fp32, 0 or HIDDEN


@dataclass(frozen=True, kw_only=True)
class DocumentTiles:
    """One tile a document, documents of similar length together; slots are all places of all tiles, end to end."""

    groups: list[Group]
    token_of_slot: Tensor  # int64; a slot that holds nothing names a token of its document
    slot_of_token: Tensor  # int64 [T]
    empty: Tensor  # int64: slots that hold nothing; what comes back from them is dropped

    def to(self, device: torch.device) -> DocumentTiles:
        """The same with its tensors on a device."""
        return DocumentTiles(
            groups=[replace(g, mask=g.mask.to(device)) for g in self.groups],
            token_of_slot=self.token_of_slot.to(device),
            slot_of_token=self.slot_of_token.to(device),
            empty=self.empty.to(device),
        )

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        # back from slots to tokens by one slot a token: empty slots give no gradient. They are
        # hidden as keys, and their outputs get none (`empty`)
        slots = [
            _Gather.apply(x_THD, self.token_of_slot, self.slot_of_token, None)
            for x_THD in (q_THD, k_THD, v_THD)
        ]
        sizes = [g.tiles * g.width for g in self.groups]
        qkv_of_groups = zip(*(x.split(sizes) for x in slots), strict=True)
        outs = []
        for group, qkv in zip(self.groups, qkv_of_groups, strict=True):
            q, k, v = (x.unflatten(0, (group.tiles, group.width)).transpose(1, 2) for x in qkv)
            outs.append(_attend(q, k, v, group.mask).transpose(1, 2).flatten(0, 1))
        return _Gather.apply(torch.cat(outs), self.slot_of_token, self.token_of_slot, self.empty)


@dataclass(frozen=True, kw_only=True)
class WindowTiles:
    """One tile a block of tokens, with the block before and the block after it as keys."""

    block: int  # tokens
    mask: Tensor  # [N, 1, block, 3 * block] fp32, 0 or HIDDEN

    def to(self, device: torch.device) -> WindowTiles:
        """The same with its mask on a device."""
        return replace(self, mask=self.mask.to(device))

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        tokens = len(q_THD)
        # to whole blocks; the keys are padded by _Windows, with a block on either side
        q_THD = F.pad(q_THD, (0, 0, 0, 0, 0, -tokens % self.block))
        q = q_THD.unflatten(0, (-1, self.block)).transpose(1, 2)
        out = _attend(
            q, _Windows.apply(k_THD, self.block), _Windows.apply(v_THD, self.block), self.mask
        )
        return out.transpose(1, 2).flatten(0, 1)[:tokens]


def _document_tiles(
    starts_S: Tensor, lengths_S: Tensor, *, tokens: int, radius: int | None
) -> DocumentTiles:
    widths_S = (lengths_S + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP
    groups, token_of_slot, real = [], [], []
    for width in widths_S.unique().tolist():
        starts_N = starts_S[widths_S == width]
        lengths_N = lengths_S[widths_S == width]
        longest = int(lengths_N.max())
        place_L = torch.arange(longest)

        # keys beyond a document's end are hidden from all of its queries: one row of mask a tile
        real_NL = place_L < lengths_N[:, None]
        mask = torch.zeros(len(starts_N), 1, 1, longest).masked_fill_(
            ~real_NL[:, None, None, :], HIDDEN
        )

        # the band differs from query to query: a mask [N, 1, L, L]
        if radius is not None and longest > radius + 1:
            far_LL = (place_L[:, None] - place_L).abs() > radius
            mask = mask.expand(-1, 1, longest, -1).masked_fill(far_LL, HIDDEN)
        groups.append(Group(tiles=len(starts_N), width=longest, mask=mask))
        token_of_slot.append(
            (starts_N[:, None] + place_L).where(real_NL, starts_N[:, None]).flatten()
        )
        real.append(real_NL.flatten())

    # for a batch without documents, of which nothing could be joined
    none = torch.zeros(0, dtype=torch.int64)
    there = torch.cat([none, *token_of_slot])
    holds = torch.cat([none.bool(), *real])

    # slot_of_token is the inverse of token_of_slot on the slots that hold a token
    slots = holds.nonzero()[:, 0]
    return DocumentTiles(
        groups=groups,
        token_of_slot=there,
        empty=(~holds).nonzero()[:, 0],
        slot_of_token=torch.empty(tokens, dtype=torch.int64).index_copy_(0, there[slots], slots),
    )


def _window_tiles(lengths_S: Tensor, *, tokens: int, radius: int) -> WindowTiles:
    block = max(radius, 32)  # a shorter block makes many small products
    blocks = -(-tokens // block)

    # one block of nothing before, one behind. Nothing sees nothing, so no query is without a key
    document_T = torch.full(((blocks + 2) * block,), -1)
    document_T[block : block + tokens] = torch.repeat_interleave(
        torch.arange(len(lengths_S)), lengths_S
    )

    # places in a tile of three blocks: the queries are the middle one
    place_B = torch.arange(block, 2 * block)
    place_K = torch.arange(3 * block)
    query_NB = document_T[block:-block].view(blocks, block)
    key_NK = document_T.unfold(0, 3 * block, block)
    near_BK = (place_B[:, None] - place_K).abs() <= radius
    sees_NBK = (query_NB[:, :, None] == key_NK[:, None, :]) & near_BK

    mask_NBK = torch.zeros(sees_NBK.shape).masked_fill_(~sees_NBK, HIDDEN)
    return WindowTiles(block=block, mask=mask_NBK[:, None])


class _Gather(torch.autograd.Function):
    """x[there], whose gradient is again a gather, found at `back` (a scatter-add is slow on CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, empty: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, empty)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        back, empty = ctx.saved_tensors
        d_x = d.index_select(0, back)
        if empty is not None:
            d_x.index_fill_(0, empty, 0)
        return d_x, None, None, None


class _Windows(torch.autograd.Function):
    """[T, H, D] -> [N, H, 3 * block, D]: each block with its neighbours, a view of one padded copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.tokens, ctx.block = len(x), block
        # a block of zeros in front; behind as many as fill the last block, and one more block
        return (
            F.pad(x, (0, 0, 0, 0, block, block - len(x) % -block))
            .unfold(0, 3 * block, block)
            .transpose(2, 3)
        )

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        # the parts of a tile in its three blocks, each [N, H, block, D]
        before, own, after = d.unflatten(2, (3, ctx.block)).unbind(2)

        # block n is the first of tile n + 1, the middle of tile n and the last of tile n - 1
        d_x = own.clone()
        d_x[:-1] += before[1:]
        d_x[1:] += after[:-1]
        return d_x.transpose(1, 2).flatten(0, 1)[: ctx.tokens], None


@cache
def most_product_keys(device: str) -> int:
    """Keys of the widest tile that half precision attends over by products: on cpu, this one, or another device."""
    if device == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return PRODUCT_KEYS_WITHOUT_AMX
    return PRODUCT_KEYS


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[N, H, Q, D] and [N, H, K, D] -> [N, H, Q, D]. In fp32 torch's kernel is ahead at every width: 22 ms against 37 at 128."""
    if q.element_size() == 2 and k.shape[2] <= most_product_keys(q.device.type):
        return _Products.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


class _Products(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v over [N, H, Q, D] and [N, H, K, D], keeping the probabilities for the backward pass.

    Scores and softmax are fp32 (fp64 for fp64); the other products run in the input's precision. A few heads at a time, whose
    scores stay in the cache. In bf16 that is four times as fast as torch's kernel where the CPU has AMX: 12 ms against 50 for 40
    tiles of 104, one thread.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        shape, heads, keys = q.shape, q.shape[1], k.shape[2]
        exact = torch.promote_types(q.dtype, torch.float32)
        ctx.scale = q.shape[3] ** -0.5
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        p = q.new_empty(len(q), q.shape[1], keys)
        out = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for part, tiles in _parts(p, heads=heads):
                # the mask first, and q k^T / sqrt(D) added to it in the product itself
                scores = (
                    mask[tiles]
                    .to(exact)
                    .expand(-1, min(heads, part.stop - part.start), shape[2], keys)
                    .reshape(-1, shape[2], keys)
                )
                scores = torch.baddbmm(
                    scores, q[part].to(exact), k[part].to(exact).transpose(1, 2), alpha=ctx.scale
                )
                p[part] = torch.softmax(scores, dim=-1)
                torch.bmm(p[part], v[part], out=out[part])
        ctx.heads = heads
        ctx.save_for_backward(q, k, v, p)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        shape, d_out = d_out.shape, d_out.flatten(0, 1)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for part, _ in _parts(p, heads=ctx.heads):
                torch.bmm(p[part].transpose(1, 2), d_out[part], out=d_v[part])
                d_p = torch.bmm(d_out[part], v[part].transpose(1, 2))

                # p (d_p - sum over keys of d_p p), then times the scale of the scores
                d_scores = torch.ops.aten._softmax_backward_data(d_p, p[part], -1, p.dtype)
                d_scores.mul_(ctx.scale)
                torch.bmm(d_scores, k[part], out=d_q[part])
                torch.bmm(d_scores.transpose(1, 2), q[part], out=d_k[part])
        return (
            d_q.view(shape),
            d_k.view(*shape[:2], *d_k.shape[1:]),
            d_v.view(*shape[:2], *d_v.shape[1:]),
            None,
        )


def _parts(p: Tensor, *, heads: int) -> Iterator[tuple[slice, slice]]:
    """Heads of tiles [N H, Q, K] to work on at once, and their tiles: of one tile, or all heads of several."""
    most = piece_rows(p, elements=p[0].numel())
    # a divisor of the heads, or a multiple
    together = most // heads * heads or max(d for d in range(1, most + 1) if heads % d == 0)
    for start in range(0, len(p), together):
        stop = min(start + together, len(p))
        yield slice(start, stop), slice(start // heads, -(-stop // heads))
