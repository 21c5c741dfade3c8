"""Replaced-token detection: the fact sheet's case, the slow twin, masks of 85 and 15, and what is told of held-out text."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder.base.batch import IGNORE, Targets, TermSum, packed_documents
from encoder.base.errors import ConfigError
from encoder.models import encoder as shared
from encoder.models.catalog import build_model
from encoder.nn import sampling
from encoder.nn.attend import Choice
from encoder.nn.heads import TokenDecoder
from encoder.nn.loss import yes_no_sum
from encoder.objectives.catalog import build_objective
from encoder.objectives.rtd import RtdConfig, with_draws
from encoder.train.evaluate import area_under_curve, held_out_numbers, held_out_text
from tests.helpers.contracts import check_objective
from tests.helpers.memory_source import SPECIALS
from tests.helpers.packed import OnDevice
from tests.helpers.rtd import ELECTRA, SETTINGS, masked_batch
from tests.process.test_no_sync import host_reads
from tests.reference.plain_rtd import plain_rtd
from tests.unit.models.test_bert import with_random_weights


def objective(**settings):
    return build_objective(RtdConfig(**settings), vocab_size=64, specials=SPECIALS)


class Told:
    """A generator whose loss and draws are given, and a discriminator that says 0 of every token."""

    training = False

    def __init__(self, logits_MV: torch.Tensor) -> None:
        self.logits_MV = logits_MV

    def generator_states(self, batch, *, at_M):
        return torch.eye(len(batch.ids_T), dtype=torch.float64).index_select(0, at_M)

    def generator_decoder(self, x_MC):
        # rows of the identity pick a position's logits
        return TokenDecoder(x_MC, self.logits_MV.T, None)

    def hidden_states(self, batch):
        self.seen_T = batch.ids_T
        return torch.zeros(len(batch.ids_T), 1, dtype=torch.float64)

    def replaced_logits(self, x_MC):
        return x_MC[:, 0]


def test_labels_and_loss_are_those_of_the_fact_sheet():
    """[CLS] a b c d [SEP], drawn at 1 and 3: another id, and the true one. L_G = 2 nats, z = 0: 2 + 50 ln 2 = 36.657."""
    clean_T = torch.tensor([1, 10, 11, 12, 13, 2])
    other, true = 20, 12
    index_M = torch.tensor([1, 3])
    every = Targets(index_M=torch.arange(6), value_M=clean_T, count=6)
    masked = Targets(index_M=index_M, value_M=clean_T[index_M], count=2)
    batch = replace(
        packed_documents([clean_T.clone()], {"mlm": masked, "rtd": every}),
        ids_T=torch.tensor([1, 4, 11, 4, 13, 2]),
    )
    # p(true) = e^-2 in the mean: e^-4 at the first, where another id takes the rest, and 1 at the second
    logits_TV = torch.full((6, 64), -1e4, dtype=torch.float64)
    logits_TV[1, 10], logits_TV[1, other] = -4.0, math.log(1 - math.exp(-4))
    logits_TV[3, true] = 0.0
    model = Told(logits_TV)
    with torch.no_grad():
        terms = objective().loss(model, batch)
    assert model.seen_T.tolist() == [1, other, 11, true, 13, 2]
    loss = sum(t.weight * float(t.sum) / int(t.count) for t in terms.values())
    assert float(terms["mlm"].sum) / 2 == pytest.approx(2.0)
    assert loss == pytest.approx(36.657, abs=5e-4)
    # of labels 0 1 0 0 0 0 a logit of 0 is right five times
    assert int(terms["rtd"].correct) == 5 and int(terms["rtd"].count) == 6


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_every_gradient_equal_the_slow_twin_in_fp64(name):
    lengths = [9, 1, 30, 4]
    model = with_random_weights(SETTINGS[name], attention="sdpa")
    batch = masked_batch(lengths)
    temperature = 0.7 if name == "small" else 1.0
    settings = dict(temperature=temperature, disallow_correct=name == "two tables")
    terms = objective(**settings).loss(model, batch)
    found = sum(t.weight * t.total / int(t.count) for t in terms.values())
    found.backward()

    weights = {n: p.detach().clone().requires_grad_() for n, p in model.state_dict().items()}
    how = {"mlm_weight": 1.0, "rtd_weight": 50.0, "use": sampling._USE, **settings}
    plain = plain_rtd(weights, SETTINGS[name], batch, lengths, **how)
    plain.loss.backward()
    assert found.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert 0 < sum(plain.labels) < len(plain.labels)
    for parameter, p in model.named_parameters():
        true = weights[parameter].grad
        true = torch.zeros_like(p) if true is None else true
        assert (p.grad - true).abs().max() <= 1e-9 * true.abs().max().clamp(min=1e-3), parameter


def test_the_promises_of_an_objective_hold():
    ids = np.random.default_rng(0).integers(8, 60, 40)
    model = build_model(replace(ELECTRA, vocab_size=64), seed=0)
    check_objective(objective(), model, ids, [15, 20, 5])


def test_masks_are_15_of_100_without_repeats_85_of_them_hidden_and_every_token_is_asked():
    asking = objective()
    ids = np.random.default_rng(1).integers(8, 60, 20_000)
    row = asking.mask(ids, np.random.default_rng(2), lengths=[100] * 200)
    index = row.targets["mlm"].index
    # round(0.15 x 100) of each document
    assert len(index) == len({*index.tolist()}) == 200 * 15
    changed = row.ids != ids
    assert {*row.ids[changed].tolist()} == {SPECIALS.mask_id}
    # 3,000 places: five deviations are 3.3 %
    assert changed.sum() == pytest.approx(0.85 * 3000, abs=0.033 * 3000)
    every = row.targets["rtd"]
    assert np.array_equal(every.index, np.arange(20_000)) and np.array_equal(every.value, ids)


def test_draws_go_to_their_places_and_unused_room_changes_nothing():
    masked = Targets(
        index_M=torch.tensor([2, 4, 0, 0]), value_M=torch.tensor([7, 8, IGNORE, IGNORE]), count=2
    )
    ids_T = torch.tensor([1, 5, 63, 6, 63, 2])
    found = with_draws(ids_T, masked, torch.tensor([30, 31, 32, 33]))
    assert found.tolist() == [1, 5, 30, 6, 31, 2]


def test_micro_batches_and_unused_targets_draw_and_count_the_same():
    """Two rows in one forward, and each alone with room that is not used."""
    model = with_random_weights(ELECTRA, attention="sdpa")
    whole = masked_batch([12, 18])
    parts = []
    for start, stop in ((0, 12), (12, 30)):
        masked = whole.targets["mlm"]
        inside = (masked.index_M >= start) & (masked.index_M < stop)
        own = Targets(
            index_M=torch.cat((masked.index_M[inside] - start, torch.zeros(3, dtype=torch.int64))),
            value_M=torch.cat((masked.value_M[inside], torch.full((3,), IGNORE))),
            count=int(inside.sum()),
        )
        clean_T = whole.targets["rtd"].value_M[start:stop]
        room = torch.full((2,), IGNORE)
        every = Targets(
            index_M=torch.cat((torch.arange(stop - start), torch.zeros(2, dtype=torch.int64))),
            value_M=torch.cat((clean_T, room)),
            count=stop - start,
        )
        batch = packed_documents([whole.ids_T[start:stop]], {"mlm": own, "rtd": every})
        parts.append(replace(batch, token_key_T=whole.token_key_T[start:stop]))
    with torch.no_grad():
        together = objective().loss(model, whole)
        alone = [objective().loss(model, part) for part in parts]
    for name, term in together.items():
        assert float(term.sum) == pytest.approx(sum(float(a[name].sum) for a in alone), rel=1e-12)
        assert int(term.count) == sum(int(a[name].count) for a in alone)
        assert int(term.correct) == sum(int(a[name].correct) for a in alone)
    assert torch.equal(together["rtd"].scores, sum(a["rtd"].scores for a in alone))


@pytest.mark.parametrize("name", ["small", "differences"])
def test_a_micro_step_of_both_networks_asks_the_device_nothing(name, monkeypatch):
    choice = Choice(backend=OnDevice(), reason="stands for a kernel")
    monkeypatch.setattr(shared, "choose_backend", lambda *_: choice)
    model = build_model(replace(SETTINGS[name], mlp_output_dropout=0.1), seed=0)
    asking, batch = objective(disallow_correct=True, temperature=0.9), masked_batch([9, 30, 4])
    with host_reads() as reads:
        terms = asking.loss(model, batch)
        torch.stack([term.total * term.weight for term in terms.values()]).sum().backward()
    assert reads == []


def test_yes_and_no_are_torchs_binary_cross_entropy():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=draw, dtype=torch.float64, requires_grad=True)
    yes = torch.rand(50, generator=draw) < 0.3
    target = torch.ones(50, dtype=torch.int64)
    target[::7] = IGNORE
    term = yes_no_sum(logits, yes, target)
    kept = target != IGNORE
    expected = F.binary_cross_entropy_with_logits(logits[kept], yes[kept].double(), reduction="sum")
    assert torch.allclose(term.total, expected, rtol=1e-12) and term.scores is None
    (found,) = torch.autograd.grad(term.total, logits, retain_graph=True)
    (true,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(found, true, rtol=1e-12)
    assert int(term.count) == int(kept.sum())


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(400, generator=draw) * 3
    yes = torch.rand(400, generator=draw) < (logits / 3).sigmoid()
    target = torch.zeros(400, dtype=torch.int64)
    target[::5] = IGNORE
    with torch.no_grad():
        term = yes_no_sum(logits, yes, target)
    kept = target != IGNORE
    high, low = logits[kept & yes], logits[kept & ~yes]
    pairs = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
    assert area_under_curve(term.scores) == pytest.approx(float(pairs.mean()), abs=2e-3)
    assert int(term.correct) == int((((logits > 0) == yes) & kept).sum())
    assert math.isnan(area_under_curve(torch.zeros(2, 8)))
    ordered = torch.tensor([[3, 1, 0, 0], [0, 0, 2, 2]])
    assert area_under_curve(ordered) == 1.0
    assert area_under_curve(torch.tensor([[4], [2]])) == 0.5


def test_held_out_text_tells_the_area_over_all_sources():
    scores = torch.tensor([[3, 1, 0], [1, 0, 3]])
    sums = {"mlm": TermSum(6.0, 3, 1), "rtd": TermSum(2.0, 8, 6, scores)}

    class Set:
        name = "web"
        batches = ()

    numbers = held_out_numbers([Set()], lambda batches: sums)
    # of 16 pairs: 12 in order with the highest three; the lowest yes: 3 ties of a half
    assert numbers["held_out_auc_rtd"] == pytest.approx((3 * 4 + 1.5) / 16)
    assert "held_out_auc" not in numbers
    said = held_out_text(numbers, ["web"], terms=("mlm", "rtd"), entropy=None, phase=None)
    assert said.endswith("rtd 0.250 75.0% AUC 0.844")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(rtd_weight=-1.0), "rtd_weight -1.0 must be at least 0"),
        (dict(temperature=0.0), "temperature 0.0 must be above 0"),
        (dict(keep_share=1.2), "shares of the predicted tokens"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        RtdConfig(**wrong)
