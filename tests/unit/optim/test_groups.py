"""Which parameters decay."""

from __future__ import annotations

from torch import nn

from encoder.optim.groups import Factors, decay_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight
        self.frozen = nn.Parameter(self.norm.weight.detach().clone(), requires_grad=False)


def test_matrices_decay_vectors_and_biases_do_not_and_a_tied_matrix_comes_once():
    model = Tied()
    decay, rest = decay_groups(model, weight_decay=1e-5)
    assert [p is model.embedding.weight for p in decay["params"]] == [True]
    assert {id(p) for p in rest["params"]} == {
        id(model.norm.weight),
        id(model.norm.bias),
        id(model.decoder.bias),
    }
    assert (decay["weight_decay"], rest["weight_decay"]) == (1e-5, 0.0)
    assert (decay["decays"], rest["decays"]) == (True, False)


def test_a_model_without_vectors_has_one_group():
    assert len(decay_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)) == 1


def test_parameters_of_another_rate_stand_in_groups_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    groups = decay_groups(
        model,
        weight_decay=0.1,
        factors={name: Factors(rate=0.5) for name in ("0.weight", "0.bias")},
    )
    found = {(g["rate"], g["decays"]): [p.shape for p in g["params"]] for g in groups}
    assert found == {
        (0.5, True): [(2, 2)],
        (0.5, False): [(2,)],
        (1.0, True): [(3, 2)],
        (1.0, False): [(3,)],
    }
