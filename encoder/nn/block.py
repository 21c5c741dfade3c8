"""One pre-norm layer: attention, then the gated feed-forward, each added to the stream."""

from __future__ import annotations

from torch import Tensor, nn

from encoder.nn.attend import Plan
from encoder.nn.attention import Attention
from encoder.nn.dropout import AddressedDropout
from encoder.nn.mlp import GeGLU
from encoder.nn.norm import layer_norm


class Block(nn.Module):
    """x = x + dropout(attention(norm(x))); x = x + mlp(norm(x)). Layer 0 has no first norm: the embedding has one."""

    def __init__(self, *, layer: int, width: int, heads: int, intermediate: int, norm_eps: float, local: bool,
                 attention_output_dropout: float) -> None:
        super().__init__()
        self.local = local
        self.attn_norm = layer_norm(width, eps=norm_eps) if layer > 0 else nn.Identity()
        self.attn = Attention(width=width, heads=heads)
        self.attn_dropout = AddressedDropout(width=width, layer=layer, p=attention_output_dropout)
        self.mlp_norm = layer_norm(width, eps=norm_eps)
        self.mlp = GeGLU(width=width, intermediate=intermediate)

    def forward(self, x_TC: Tensor, *, plan: Plan, rope: Tensor, dropout_key_T: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        attended_TC = self.attn(self.attn_norm(x_TC), plan=plan, rope=rope, local=self.local)
        x_TC = self.attn_dropout(x_TC, attended_TC, dropout_key_T)
        return x_TC + self.mlp(self.mlp_norm(x_TC))
