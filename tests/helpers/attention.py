"""A backend of attention beside the dense mask, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference.dense import dense_attention


def check_equals_the_dense_mask(
    attend: Callable[..., Tensor],
    drawn: Callable[[], Sequence[Tensor]],
    *,
    lengths: list[int],
    radius: int | None,
) -> None:
    """Within 1e-12 in fp64.

    attend: (q, k, v, local=...) -> [T, H, D]
    drawn: q, k and v [T, H, D] that ask for gradients, the same ones each time
    lengths: of the documents, in tokens
    radius: of the window; None: of a global layer
    """
    ours, truth = drawn(), drawn()
    out = attend(*ours, local=radius is not None)
    expected = dense_attention(*truth, lengths=lengths, radius=radius)
    weights = torch.randn_like(expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)
