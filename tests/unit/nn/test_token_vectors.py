"""Token vectors: their products against the whole matrix's eigenvectors; the same whatever sign a library gives these."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoder.base.rng import generator
from encoder.data.neighbours import Neighbours, count_neighbours
from encoder.nn.token_vectors import TokenVectors, token_vectors
from tests.reference.neighbour_vectors import counted, information, products


def text_of_classes(*, vocab_size: int, classes: int, tokens: int) -> list[np.ndarray]:
    """Documents in which the token behind one of class c is of class c + 1: a class is known by its neighbours alone."""
    random = generator(3, "classes")
    documents = []
    for _ in range(tokens // 50):
        kinds = (random.integers(0, classes) + np.arange(50)) % classes
        documents.append(kinds + classes * random.integers(0, vocab_size // classes, 50))
    return documents


def found_in(documents: list[np.ndarray], *, vocab_size: int, width: int) -> TokenVectors:
    pairs = count_neighbours(documents, window=2, vocab_size=vocab_size)
    return token_vectors(pairs, width=width, seed=1)


def vectors_of(
    found: Neighbours, *, width: int, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    known = token_vectors(found, width=width, seed=seed)
    return known.vectors_VC, known.there_V


# the last: more tokens than the subspace has dimensions, so that four rounds come near
@pytest.mark.parametrize(
    ("vocab_size", "width", "near"),
    [(12, 5, 1e-4), (12, 12, 2e-4), (40, 16, 3e-4), (200, 1, 1e-2)],
    ids=str,
)
def test_their_products_are_those_of_the_largest_eigenvalues(vocab_size, width, near):
    documents = text_of_classes(vocab_size=vocab_size, classes=4, tokens=3000)
    found = count_neighbours(documents, window=2, vocab_size=vocab_size)
    vectors, there = vectors_of(found, width=width)
    pairs = counted([d.tolist() for d in documents], window=2)
    expected = products(information(pairs, vocab_size=vocab_size), width=width)
    assert there.all()

    # vectors are scaled to a mean square of 1
    expected *= vocab_size * width / np.trace(expected)
    assert vectors.double() @ vectors.double().T == pytest.approx(expected, abs=near)
    assert vectors.square().mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("width", [12, 20], ids=["as wide as the vocabulary", "wider"])
def test_turned_vectors_score_neighbours(width):
    """E S E^T is M itself, of which E E^T has the size alone; and S turns about, so that twice is nothing."""
    documents = text_of_classes(vocab_size=12, classes=4, tokens=3000)
    known = found_in(documents, vocab_size=12, width=width)
    pairs = counted([d.tolist() for d in documents], window=2)
    expected = information(pairs, vocab_size=12)
    vectors, turn = known.vectors_VC.double(), known.turn_CC.double()
    scale = np.abs(np.linalg.eigvalsh(expected)).sum() / (12 * width)
    assert scale * vectors @ turn @ vectors.T == pytest.approx(expected, abs=1e-3)
    assert not np.allclose(scale * vectors @ vectors.T, expected, atol=0.1)
    assert turn @ turn == pytest.approx(np.eye(width), abs=1e-6)
    assert torch.equal(turn, turn.T)


def test_text_of_which_nothing_is_known_is_not_turned():
    assert torch.equal(found_in([], vocab_size=6, width=3).turn_CC, torch.eye(3))


def test_tokens_with_the_same_neighbours_lie_together():
    found = count_neighbours(
        text_of_classes(vocab_size=60, classes=6, tokens=6000), window=1, vocab_size=60
    )
    vectors, _ = vectors_of(found, width=12)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    like = unit @ unit.T
    same = torch.arange(60)[:, None] % 6 == torch.arange(60) % 6
    assert like[same].mean() > like[~same].mean() + 0.4


def test_the_sign_of_an_eigenvector_has_no_say(monkeypatch):
    found = count_neighbours(
        text_of_classes(vocab_size=40, classes=4, tokens=3000), window=2, vocab_size=40
    )
    expected, _ = vectors_of(found, width=8)
    right = torch.linalg.eigh
    qr = torch.linalg.qr

    def other_signs(matrix):
        values, vectors = right(matrix)
        return values, vectors * (1 - 2 * (torch.arange(len(vectors)) % 2))

    def other_qr_signs(matrix):
        q, r = qr(matrix)
        return -q, -r

    turn = token_vectors(found, width=8, seed=1).turn_CC
    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    monkeypatch.setattr(torch.linalg, "qr", other_qr_signs)
    other = token_vectors(found, width=8, seed=1)
    assert other.vectors_VC == pytest.approx(expected, abs=1e-6)
    assert other.turn_CC == pytest.approx(turn, abs=1e-6)


def test_another_seed_turns_them_and_changes_no_product():
    found = count_neighbours(
        text_of_classes(vocab_size=40, classes=4, tokens=3000), window=2, vocab_size=40
    )
    one, other = (vectors_of(found, width=8, seed=seed)[0] for seed in (1, 2))
    assert (one - other).abs().max() > 0.1
    assert one @ one.T == pytest.approx(other @ other.T, abs=1e-4)


def test_tokens_that_were_not_met_have_none():
    documents = [np.array([1, 2, 1, 4, 2, 4, 1])]
    vectors, there = vectors_of(count_neighbours(documents, window=1, vocab_size=6), width=3)
    assert there.tolist() == [False, True, True, False, True, False]
    assert not vectors[~there].any()
    assert vectors[there].square().mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("documents", [[], [np.array([3])]])
def test_no_text_no_vectors(documents):
    vectors, there = vectors_of(count_neighbours(documents, window=2, vocab_size=6), width=3)
    assert vectors.shape == (6, 3)
    assert not vectors.any() and not there.any()


def test_vectors_may_be_wider_than_the_vocabulary():
    found = count_neighbours(
        text_of_classes(vocab_size=12, classes=4, tokens=1000), window=1, vocab_size=12
    )
    vectors, there = vectors_of(found, width=20)
    assert vectors.shape == (12, 20) and there.all() and vectors.isfinite().all()


def test_tokens_of_which_little_is_known_have_none():
    # token 0 stands beside every other one, less often than chance has it
    first = np.array([0, 0, 0, 0, 0, 0, 1, 3, 5])
    second = np.array([1, 2, 3, 4, 5, 6, 2, 4, 6])
    count = np.array([1, 1, 1, 1, 1, 1, 1000, 1000, 1000])
    found = Neighbours(vocab_size=8, first_P=first, second_P=second, count_P=count, tokens=0)
    vectors, there = vectors_of(found, width=3)
    assert there.tolist() == [False, *[True] * 6, False]
    sizes = vectors.square().mean(dim=1).sqrt()
    assert (sizes[there] > 0.1).all()
    assert not vectors[~there].any()


def test_directions_that_are_rounding_have_no_say(monkeypatch):
    # 20 tokens of 300 were met, so that most of a subspace of 128 is empty
    found = count_neighbours(
        text_of_classes(vocab_size=20, classes=4, tokens=2000), window=1, vocab_size=300
    )
    expected, there = vectors_of(found, width=64)
    assert int(there.sum()) == 20
    eigh = torch.linalg.eigh

    def other_nothings(matrix):
        values, vectors = eigh(matrix)
        empty = values.abs() < 1e-10 * values.abs().max()
        turned = torch.linalg.qr(
            torch.randn(int(empty.sum()), int(empty.sum()), dtype=vectors.dtype)
        )[0]
        vectors[:, empty] = vectors[:, empty] @ turned
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", other_nothings)
    assert vectors_of(found, width=64)[0] == pytest.approx(expected, abs=1e-5)
