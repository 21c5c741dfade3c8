"""One layer: attention, then the feed-forward, each added to the stream, the norms before them or after the sums."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from encoder.nn.attend import Plan
from encoder.nn.attention import Attention
from encoder.nn.dropout import AddressedDropout
from encoder.nn.mlp import FeedForward

NormPlace = Literal["pre", "post"]


class Block(nn.Module):
    """pre:   x = x + dropout(attention(attn_norm(x)));   x = x + dropout(mlp(mlp_norm(x)))
    post:  x = attn_norm(x + dropout(attention(x)));   x = mlp_norm(x + dropout(mlp(x)))

    What of it is compiled has a fixed shape: the full layer where its attention can be traced (kernels for packed documents), else
    what comes before attention and what comes after it, while the backend between them meets other documents in each micro-batch.
    """

    def __init__(
        self,
        *,
        norm_place: NormPlace,
        attn_norm: nn.Module,
        attn: Attention,
        attn_dropout: AddressedDropout,
        mlp_norm: nn.Module,
        mlp: FeedForward,
        mlp_dropout: AddressedDropout,
        local: bool,
    ) -> None:
        super().__init__()
        self.norm_place, self.local = norm_place, local
        # compiled parts have a fixed shape, and a scale of 8 bits is that of all tokens
        self.may_leave_out = True
        self.attn_norm, self.attn, self.attn_dropout = attn_norm, attn, attn_dropout
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_dropout = mlp_dropout

    def forward(
        self,
        x_TC: Tensor,
        *,
        plan: Plan,
        rope: Tensor | None,
        dropout_key_T: Tensor,
        at_M: Tensor | None = None,
    ) -> Tensor:
        """[T, C] -> [T, C], or of tokens at_M alone [M, C].

        x_TC: the stream
        plan: of attention
        rope: table of the layer's angles
        dropout_key_T: what decides which features are dropped
        at_M: int64, whose states are asked; of the others what is behind attention may be left out
        """
        if plan.traceable:
            return _rows(self.full(x_TC, plan, rope, dropout_key_T), at_M)
        q_THD, k_THD, v_THD = self.pre_attention(x_TC, rope)
        out_THD = plan(q_THD, k_THD, v_THD, local=self.local)
        if not self.may_leave_out:
            return _rows(self.post_attention(x_TC, out_THD, dropout_key_T), at_M)
        return self.post_attention(*(_rows(x, at_M) for x in (x_TC, out_THD, dropout_key_T)))

    def compile_(self, *, backend: str = "inductor") -> None:
        """From now on its parts run compiled, one graph for each shape; all blocks of a process share the graphs."""
        # kept by the code's place, so for all models and modes of a process: training, evaluation and the fixed batch of one
        # run are 6 already, torch's limit is 8, and beyond it a full graph raises
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.may_leave_out = False
        for part in ("pre_attention", "post_attention", "full"):
            setattr(
                self,
                part,
                torch.compile(getattr(self, part), backend=backend, dynamic=False, fullgraph=True),
            )

    def full(self, x_TC: Tensor, plan: Plan, rope: Tensor | None, dropout_key_T: Tensor) -> Tensor:
        """What forward computes, in one piece: the gradients of the stream are added up inside of what is compiled."""
        # the class's methods: on this block the same names stand for compiled ones
        q_THD, k_THD, v_THD = Block.pre_attention(self, x_TC, rope)
        out_THD = plan(q_THD, k_THD, v_THD, local=self.local)
        return Block.post_attention(self, x_TC, out_THD, dropout_key_T)

    def pre_attention(self, x_TC: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, C] -> query, key and value, each [T, H, D]."""
        if self.norm_place == "pre":
            x_TC = self.attn_norm(x_TC)
        return self.attn.project(x_TC, rope)

    def post_attention(self, x_TC: Tensor, out_THD: Tensor, dropout_key_T: Tensor) -> Tensor:
        """The stream [T, C] and what attention gave [T, H, D] -> [T, C]."""
        x_TC = self.attn_dropout(x_TC, self.attn.merge(out_THD), dropout_key_T)
        if self.norm_place == "pre":
            out_TC = self.mlp(self.mlp_norm(x_TC), dropout_key_T)
            return self.mlp_dropout(x_TC, out_TC, dropout_key_T)
        x_TC = self.attn_norm(x_TC)
        out_TC = self.mlp(x_TC, dropout_key_T)
        return self.mlp_norm(self.mlp_dropout(x_TC, out_TC, dropout_key_T))


def _rows(x: Tensor, at_M: Tensor | None) -> Tensor:
    return x if at_M is None else x.index_select(0, at_M)
