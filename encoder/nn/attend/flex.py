"""torch's flex_attention: one compiled kernel that skips the blocks of tokens that do not see each other.

documents     a a a a | a a b b | b c c c | d d d d       blocks of 4 tokens here, of 128 in truth

keys            0 1 2 3
queries   0     # o . .       #  all see all: no mask is asked
          1     o o o .       o  some do: the mask decides pair by pair
          2     . o o .       .  none do: skipped
          3     . . . #
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

from encoder.nn.attend.contract import AttentionRequest
from encoder.nn.attend.packed import HALVES, Needs

BLOCK_TOKENS = 128  # what the kernel skips by


class Flex:
    """Any precision that Triton multiplies in; CUDA alone, because on a CPU flex_attention has no backward pass."""

    name = "flex"
    needs = Needs(at_least=(8, 0), dtypes=(*HALVES, torch.float32), head_widths=range(16, 257))

    def why_not(self, request: AttentionRequest) -> str | None:
        """It needs a CUDA device and triton."""
        return self.needs.unmet(request) or _missing()

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> FlexPlan:
        """Two block masks; nothing is read back from the device."""
        from torch.nn.attention.flex_attention import flex_attention

        attend: Callable[..., Any] = flex_attention
        if cu_seqlens_S1.device.type == "cuda":
            attend = _compiled()
        return FlexPlan(
            attend,
            whole=block_mask(cu_seqlens_S1, tokens=tokens, radius=None),
            windowed=block_mask(cu_seqlens_S1, tokens=tokens, radius=window_radius_tokens),
        )


class FlexPlan:
    """The block masks of one micro-batch."""

    traceable = True

    def __init__(
        self, attend: Callable[..., Any], *, whole: BlockMask, windowed: BlockMask
    ) -> None:
        self.attend, self.whole, self.windowed = attend, whole, windowed

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        tokens = len(q_THD)
        if not tokens:
            return v_THD

        # [T, H, D] -> [1, H, T', D], T' whole blocks; the padding is a document of its own
        spare = -tokens % BLOCK_TOKENS
        q, k, v = (
            F.pad(x_THD, (0, 0, 0, 0, 0, spare)).transpose(0, 1)[None]
            for x_THD in (q_THD, k_THD, v_THD)
        )
        out = self.attend(q, k, v, block_mask=self.windowed if local else self.whole)
        return out[0].transpose(0, 1)[:tokens]


def block_mask(cu_seqlens_S1: Tensor, *, tokens: int, radius: int | None) -> BlockMask:
    """Which blocks see each other, from the documents of their first and last tokens: no mask of T x T is made.

    Tokens beyond the last whole block count as one more document. Documents ascend, so two blocks share one exactly if
    their ranges of documents meet. Who sees is seen: queries by keys and keys by queries are the same list.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    place_T = torch.arange(
        blocks * BLOCK_TOKENS, device=cu_seqlens_S1.device, dtype=cu_seqlens_S1.dtype
    )
    document_T = torch.searchsorted(cu_seqlens_S1[1:].contiguous(), place_T, right=True)
    document_BT = document_T.view(blocks, BLOCK_TOKENS)
    first_B = document_BT[:, 0]
    last_B = document_BT[:, -1]

    # the ranges of documents of two blocks meet; or both are one and the same document
    some_BB = (first_B[:, None] <= last_B) & (first_B <= last_B[:, None])
    all_BB = (first_B[:, None] == last_B) & (first_B == last_B[:, None])

    # from the distance of two blocks' first tokens: the nearest pair less 127, the farthest plus
    if radius is not None:
        apart_BB = BLOCK_TOKENS * (place_T[:blocks, None] - place_T[:blocks]).abs()
        some_BB &= apart_BB - (BLOCK_TOKENS - 1) <= radius
        all_BB &= apart_BB + (BLOCK_TOKENS - 1) <= radius

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        together = document_T[query] == document_T[key]
        return together if radius is None else together & ((query - key).abs() <= radius)

    # it asks torch's compiler, 1.5 s, for which those without this kernel need not wait
    from torch.nn.attention.flex_attention import BlockMask

    # where all pairs see each other the kernel does not ask `sees`
    partial, full = _listed(some_BB & ~all_BB), _listed(all_BB)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK_TOKENS, mask_mod=sees)


def _listed(sees_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block sees [1, 1, B], and which, those first [1, 1, B, B]."""
    # stable: the seen ones first, in ascending order
    order_BB = sees_BB.int().argsort(dim=1, descending=True, stable=True)
    return sees_BB.sum(1, dtype=torch.int32)[None, None], order_BB.int()[None, None]


@cache
def _missing() -> str | None:
    # a search of the disk: not at every forward
    if find_spec("triton"):
        return None
    return "triton is not installed"


@cache
def _compiled() -> Callable[..., Any]:
    # a graph for each length, window and mode (a run with two phases and evaluation has 8); beyond torch's limit of 8 it would
    # run uncompiled, with scores of T x T: whole, it raises instead
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
