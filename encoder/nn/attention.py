"""Self-attention of packed documents: one fused projection, rotary positions where asked, a backend, and the way out."""

from __future__ import annotations

from torch import Tensor, nn

from encoder.nn.rope import split_and_rotate


class Attention(nn.Module):
    """Row w * H D + h * D + j of Wqkv is feature j of head h of the query (w = 0), key (1) or value (2).

    What runs between the two is a backend's plan and belongs to the micro-batch, not to the layer.
    """

    def __init__(self, *, width: int, heads: int, head_width: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.Wqkv = nn.Linear(width, 3 * heads * head_width, bias=bias)
        self.Wo = nn.Linear(heads * head_width, width, bias=bias)

    def project(self, x_TC: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, C] -> query, key and value, each [T, H, D]; rope is a table of encoder.nn.rope, or None: nothing turns."""
        qkv_T3HD = self.Wqkv(x_TC).view(-1, 3, self.heads, self.head_width)
        if rope is None:
            return qkv_T3HD.unbind(1)
        return split_and_rotate(qkv_T3HD, rope)

    def merge(self, out_THD: Tensor) -> Tensor:
        """[T, H, D] -> [T, C]."""
        return self.Wo(out_THD.flatten(1))
