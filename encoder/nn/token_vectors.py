"""Token vectors from counts of neighbours: tokens with the same neighbours get vectors that lie close together.

    r_i = sum_j c_ij                                   what token i counts in all, c_ii twice
    q_i = r_i^(3/4) / sum_j r_j^(3/4)                  contexts, smoothed
    m_ij = max(0, log c_ij - (log r_i q_j + log r_j q_i) / 2)
    M ~ U L U^T                                        the largest eigenvalues by their size, as many as a vector is wide
    E = U |L|^(1/2) R                                  R: orthonormal rows, the same wherever this is computed
    S = 1 - 2 N^T N                                    N: rows of R of negative eigenvalues; E S E^T ~ M, so that a vector
                                                       turned by S scores its neighbours

The positive pointwise mutual information of words and their contexts, factorized, is what word2vec approximates (Levy and
Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization; smoothing and |L|^(1/2): Levy, Goldberg and Dagan
2015). Here the contexts are the tokens themselves and M is symmetric, so that one vector serves before and after the layers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from encoder.base.rng import address_seed

# more vectors than asked for, and multiplications by M, of the subspace iteration (Halko, Martinsson and Tropp 2011)
MORE = 64
ROUNDS = 4
CONTEXT_POWER = 0.75
# of the usual size of an element: rows near zero would all begin alike, and a norm behind them would blow their gradients up
LEAST = 0.1
# of the largest eigenvalue; smaller ones are rounding, as are their directions
NOTHING = 1e-10


class CountedPairs(Protocol):
    """Pairs of tokens, each once (encoder.data.neighbours.Neighbours)."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def first_P(self) -> np.ndarray:
        """int64 [P], first <= second."""

    @property
    def second_P(self) -> np.ndarray:
        """int64 [P]."""

    @property
    def count_P(self) -> np.ndarray:
        """[P], above 0, in any unit."""


@dataclass(frozen=True, kw_only=True)
class TokenVectors:
    """What was found; fp32."""

    vectors_VC: Tensor  # of a mean square of 1; of tokens that have none, zero
    there_V: Tensor  # bool: which tokens have one
    turn_CC: Tensor  # S; the identity where no eigenvalue is negative


def token_vectors(pairs: CountedPairs, *, width: int, seed: int) -> TokenVectors:
    """Vectors of tokens, and what turns them towards their neighbours'.

    A token has none where no pair says anything of it, or where its elements would be less than LEAST of the usual size.
    Computed in fp64 on the CPU.

    pairs: that were counted
    width: of a vector
    seed: of the subspace's start and of R
    """
    if not len(pairs.count_P):
        return TokenVectors(
            vectors_VC=torch.zeros(pairs.vocab_size, width),
            there_V=torch.zeros(pairs.vocab_size, dtype=torch.bool),
            turn_CC=torch.eye(width),
        )
    information = _mutual_information(pairs)
    vectors, turn = _factor(information, width=width, seed=seed)

    # twice: vectors that are left out have no say in the size of the others
    size_V = vectors.square().mean(dim=1).sqrt()
    there_V = size_V > 0
    for _ in range(2):
        usual = size_V[there_V].square().mean().sqrt()
        there_V = size_V > LEAST * usual
    vectors[~there_V] = 0.0
    # text of which no pair says anything has no vectors
    if there_V.any():
        vectors /= vectors[there_V].square().mean().sqrt()
    return TokenVectors(vectors_VC=vectors.float(), there_V=there_V, turn_CC=turn.float())


def _mutual_information(pairs: CountedPairs) -> Tensor:
    """M [V, V], symmetric and sparse."""
    first_P, second_P, vocab_size = pairs.first_P, pairs.second_P, pairs.vocab_size
    count_P = pairs.count_P.astype(np.float64)
    apart_P = first_P != second_P
    # a pair of one token stands in both of its places
    rows = np.concatenate([first_P, second_P[apart_P]])
    columns = np.concatenate([second_P, first_P[apart_P]])
    counts = np.concatenate([np.where(apart_P, count_P, 2 * count_P), count_P[apart_P]])

    total_V = np.bincount(rows, weights=counts, minlength=vocab_size)
    context_V = total_V**CONTEXT_POWER
    context_V /= context_V.sum()
    # log r_i q_i; what was never counted is in no pair
    half_V = np.log(np.where(total_V > 0, total_V * context_V, 1.0)) / 2
    values = np.log(counts) - half_V[rows] - half_V[columns]
    informs = values > 0
    rows, columns, values = rows[informs], columns[informs], values[informs]

    # row after row, as torch's compressed rows have them
    order = np.lexsort((columns, rows))
    ends = np.cumsum(np.bincount(rows, minlength=vocab_size))
    with warnings.catch_warnings():
        # that such tensors are young, and that they are not checked, which these are
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], ends])),
            torch.from_numpy(columns[order]),
            torch.from_numpy(values[order]),
            (vocab_size, vocab_size),
            check_invariants=True,
        )


def _factor(matrix: Tensor, *, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """E [V, width] and S [width, width] of a symmetric matrix [V, V]; S is the identity in directions that E has nothing in."""
    size = len(matrix)
    if not matrix.values().numel():
        nothing = torch.zeros(size, width, dtype=torch.float64)
        return nothing, torch.eye(width, dtype=torch.float64)
    kept = min(width, size)
    draw = torch.Generator().manual_seed(address_seed(seed, "token vectors"))
    basis = torch.randn(size, min(size, kept + MORE), generator=draw, dtype=torch.float64)
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(matrix @ basis)
    small = basis.T @ (matrix @ basis)
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    largest = values.abs().argsort(descending=True, stable=True)[:kept]
    largest = largest[values[largest].abs() > NOTHING * values.abs().max()]
    vectors, values = basis @ rotation[:, largest], values[largest]

    # the sign of an eigenvector is the library's choice. B = U^T G takes it over, and so does R = (B B^T)^(-1/2) B:
    # in U |L|^(1/2) R it cancels
    drawn = torch.randn(size, width, generator=draw, dtype=torch.float64)
    left, _, right = torch.linalg.svd(vectors.T @ drawn, full_matrices=False)
    rows = left @ right
    # where L is negative R's rows are turned about
    negative = rows[values < 0]
    turn = torch.eye(width, dtype=torch.float64) - 2 * negative.T @ negative
    return (vectors * values.abs().sqrt()) @ rows, turn
