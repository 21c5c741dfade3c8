"""How embeddings fill their space: anisotropy, uniformity and rank.

one direction for all texts      anisotropy near 1, uniformity near 0, rank near 1
evenly on the sphere             anisotropy near 0, uniformity near -4, rank near the width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 1024  # of the matrix of all pairs


def embedding_health(x_NC: Tensor) -> dict[str, float]:
    """Of N texts' embeddings [N, C], N at least 2.

    anisotropy    mean cosine of all pairs of different texts
    uniformity    log of the mean of exp(-2 |x - y|^2) over these pairs, x and y of length 1 (Wang and Isola 2020)
    rank_me       exp of the entropy of the singular values as shares of their sum (Garrido et al. 2023)
    """
    x_NC = x_NC.double()
    unit_NC = F.normalize(x_NC, dim=-1)
    count = len(unit_NC)
    pairs = count * (count - 1)

    # |sum of x|^2 is the sum of all cosines, of which N are of a text with itself
    total = unit_NC.sum(0)
    anisotropy = (float(total @ total) - count) / pairs

    # |x - y|^2 = 2 - 2 cos, so exp(-2 |x - y|^2) = exp(4 cos - 4); of a text with itself it is 1
    energy = 0.0
    for start in range(0, count, ROWS_AT_ONCE):
        cosines = unit_NC[start : start + ROWS_AT_ONCE] @ unit_NC.T
        energy += float(torch.exp(4.0 * cosines - 4.0).sum())
    uniformity = torch.log(torch.tensor((energy - count) / pairs, dtype=torch.float64))

    singular = torch.linalg.svdvals(x_NC)
    share = singular / singular.sum()
    share = share[share > 0]
    rank_me = torch.exp(-(share * share.log()).sum())
    return {
        "anisotropy": anisotropy,
        "uniformity": float(uniformity),
        "rank_me": float(rank_me),
    }
