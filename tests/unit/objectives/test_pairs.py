"""Pair objectives: labels, segments, the two losses, and what they ask of a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder.base.batch import IGNORE, Targets
from encoder.base.errors import ConfigError
from encoder.base.objective import PairRule, RowPairs
from encoder.base.rng import generator
from encoder.data.assembly import Assembler, RowSpec
from encoder.data.windows import GOES_ON, RowGeometry
from encoder.models.bert import BertConfig
from encoder.models.catalog import build_model
from encoder.nn.loss import class_loss_sum
from encoder.objectives.catalog import OBJECTIVES, build_objective
from encoder.objectives.mlm import MlmConfig
from encoder.objectives.pairs import MlmNspConfig, MlmSopConfig
from tests.helpers.contracts import check_objective
from tests.helpers.memory_source import SPECIALS, of_sentences

CLS, SEP = SPECIALS.cls_id, SPECIALS.sep_id


def objective(config=None):
    return build_objective(config or MlmNspConfig(), vocab_size=64, specials=SPECIALS)


def assembler(masker, **changes) -> Assembler:
    # ids of a document count up from 0 behind [CLS]
    source = of_sentences("a", [[3, 2], [4, 4]], shards=1)
    settings = dict(
        sources=[source],
        masker=masker,
        seed=1,
        geometry=RowGeometry(row_tokens=32, max_tokens_per_document=16),
        micro_batch_rows=1,
        static_shapes=False,
    )
    return Assembler(**{**settings, **changes})


# A = first sentence of document 0, B = its second; A = two tokens of document 1, B = the end of document 0
PIECES = np.array([[0, 0, 1, 4], [0, 0, 4, 6], [0, 1, 2, 4], [0, 0, 3, 6]])
LABELS = np.array([0, GOES_ON, 1, GOES_ON], dtype=np.int8)


@pytest.mark.parametrize("static_shapes", [False, True])
def test_pairs_are_laid_with_segments_and_labels(static_shapes):
    masker = objective(MlmNspConfig(mask_share=0.001))
    spec = RowSpec(address=(0, 0, 0), number=0, pieces_P4=PIECES, label_P=LABELS)
    batch = assembler(masker, static_shapes=static_shapes).assemble([spec]).batch
    ids = [CLS, 0, 1, 2, SEP, 3, 4, SEP, CLS, 1, 2, SEP, 2, 3, 4, SEP]
    assert batch.ids_T[:16].tolist() == ids
    assert batch.segments_T[:16].tolist() == [0] * 5 + [1] * 3 + [0] * 4 + [1] * 4
    assert batch.positions_T[:16].tolist() == [*range(8), *range(8)]
    assert batch.cu_seqlens_S1[:3].tolist() == [0, 8, 16]
    pairs = batch.targets["nsp"]
    assert pairs.count == 2
    assert pairs.index_M[:2].tolist() == [0, 8] and pairs.value_M[:2].tolist() == [0, 1]
    if static_shapes:
        assert len(pairs.value_M) == 32 // 5 and set(pairs.value_M[2:].tolist()) == {IGNORE}
        assert not batch.segments_T[16:].any()


def test_a_row_of_the_shortest_pairs_keeps_every_label():
    masker = objective()
    lengths = [5] * 6
    pairs = RowPairs(np.arange(6) % 2, np.full(6, 3))
    row = masker.mask(np.arange(30), generator(1, "x"), lengths=lengths, pairs=pairs)
    assert row.targets["nsp"].index.tolist() == [0, 5, 10, 15, 20, 25]
    assert masker.capacity("nsp", 32) == 6


def test_masks_of_a_row_are_those_of_plain_masking():
    """The pairs draw nothing: the same address gives the same masked tokens."""
    ids = np.arange(58)
    pairs = RowPairs(np.zeros(1, np.int64), np.array([20]))
    plain = objective(MlmConfig()).mask(ids, generator(1, "x"), lengths=[58])
    row = objective().mask(ids, generator(1, "x"), lengths=[58], pairs=pairs)
    assert np.array_equal(plain.ids, row.ids)
    assert np.array_equal(plain.targets["mlm"].index, row.targets["mlm"].index)


def bert():
    """A small BERT with segments and a sentence head."""
    size = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        sentence_head=True,
    )
    return build_model(size, attention="sdpa", seed=5).double().eval()


@pytest.mark.parametrize("name", ["mlm_nsp", "mlm_sop"])
def test_a_pair_objective_keeps_the_promises_of_an_objective(name):
    ids = np.concatenate([[CLS, *range(n - 2), SEP] for n in (5, 9, 16)])
    check_objective(objective(OBJECTIVES[name]()), bert().float(), ids, [5, 9, 16])


def test_the_loss_is_torchs_cross_entropy_of_both_terms():
    masker = objective(MlmSopConfig(pair_weight=0.5))
    spec = RowSpec(address=(0, 0, 0), number=0, pieces_P4=PIECES, label_P=LABELS)
    batch = assembler(masker, static_shapes=True).assemble([spec]).batch
    model = bert()
    terms = masker.loss(model, batch)
    assert [*terms] == ["mlm", "sop"] and terms["sop"].weight == 0.5
    x_TC = model.hidden_states(batch)
    expected = F.cross_entropy(
        model.sentence_decoder(x_TC[[0, 8]]), torch.tensor([0, 1]), reduction="sum"
    )
    torch.testing.assert_close(terms["sop"].total, expected)
    assert int(terms["sop"].count) == 2
    asked = batch.targets["mlm"]
    kept = asked.value_M != IGNORE
    logits = model.decode(x_TC[asked.index_M[kept]])
    expected = F.cross_entropy(logits, asked.value_M[kept], reduction="sum")
    torch.testing.assert_close(terms["mlm"].total, expected)
    # segments are seen: without them the states are others
    without = dataclasses.replace(batch, segments_T=None)
    assert not torch.allclose(model.hidden_states(without)[:16], x_TC[:16])


def test_without_a_target_every_parameter_has_a_gradient():
    masker = objective()
    batch = assembler(masker).assemble([]).batch
    model = bert()
    sum(term.total for term in masker.loss(model, batch).values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_few_classes_are_counted_without_gradients_alone():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, IGNORE])
    assert int(class_loss_sum(logits, target).correct) == 0
    with torch.no_grad():
        term = class_loss_sum(logits, target)
    assert (int(term.correct), int(term.count)) == (1, 2)
    expected = F.cross_entropy(logits[:2], target[:2], reduction="sum")
    torch.testing.assert_close(term.sum, expected.detach())
    half = class_loss_sum(logits.detach().bfloat16(), target)
    assert half.total.dtype == torch.float32


def test_the_held_out_question_keeps_pairs_and_their_lengths():
    config = MlmNspConfig(short_share=0.2, mask_share=0.4)
    held_out = config.held_out(mask_share=0.15)
    assert held_out.pairs == config.pairs == PairRule(label_1="random", short_share=0.2)
    assert objective(held_out).terms == ("mlm", "nsp")
    assert MlmConfig().pairs is None and MlmSopConfig().pairs.label_1 == "swapped"


def test_the_fingerprint_asks_the_sentence_head_too():
    masker = objective()
    targets = masker.all_targets(torch.arange(7))
    assert isinstance(targets["nsp"], Targets) and targets["nsp"].count == 1


@pytest.mark.parametrize("setting", [{"short_share": 1.5}, {"pair_weight": -1.0}])
@pytest.mark.parametrize("name", ["mlm_nsp", "mlm_sop"])
def test_settings_out_of_range_are_refused(name, setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        OBJECTIVES[name](**setting)
