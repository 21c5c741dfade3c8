"""Self-attention of packed documents: one fused projection, rotary positions, a backend, and the way out."""

from __future__ import annotations

from torch import Tensor, nn

from encoder.nn.attend import Plan
from encoder.nn.rope import split_and_rotate


class Attention(nn.Module):
    """Row w * C + h * D + j of Wqkv is feature j of head h of the query (w = 0), key (1) or value (2)."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.Wo = nn.Linear(width, width, bias=False)

    def forward(self, x_TC: Tensor, *, plan: Plan, rope: Tensor, local: bool) -> Tensor:
        """[T, C] -> [T, C]; rope is a table of encoder.nn.rope."""
        qkv_T3HD = self.Wqkv(x_TC).view(-1, 3, self.heads, self.head_width)
        out_THD = plan(*split_and_rotate(qkv_T3HD, rope), local=local)
        return self.Wo(out_THD.reshape(x_TC.shape))
