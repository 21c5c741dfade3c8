"""XLNet to Hugging Face and back: both streams and every gradient of XLNetLMHeadModel, and a bitwise round trip."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from encoder.base.batch import packed_documents
from encoder.base.errors import ExportError, ModelError
from encoder.models.bert import BertConfig
from encoder.models.catalog import build_model
from encoder.models.electra import ElectraConfig
from encoder.models.hf.catalog import bridge_of, export_blocker
from encoder.models.hf.parity import drawn_difference, our_model
from encoder.models.hf.read import prove_import, read_hf, read_hf_config
from encoder.models.hf.write import export_hf
from encoder.models.hf.xlnet import XLNET, _blocked, _fp64_sinusoids, two_streams_differ
from encoder.models.stored import StoredModel
from encoder.tools.page.folders import open_folder
from encoder.train.hints import _fills_masks
from tests.helpers.plain import with_random_weights
from tests.helpers.xlnet import SPECIALS, TINY, batch_of, objective_of

transformers = pytest.importorskip("transformers")

CONFIG = dataclasses.replace(TINY, vocab_size=280, max_position_embeddings=64)
LENGTHS = [30, 9, 41, 5]
OBJECTIVES = {
    "both directions": objective_of(),
    "memory": objective_of(memory_tokens=6, segment_tokens=16),
}


def theirs_of(ours):
    """transformers' class with our weights, in fp64, without dropout; it reads the second text of a batch backwards."""
    settings = {**XLNET.to_settings(ours.config, SPECIALS), "bi_data": True, "dropout": 0.0}
    made = transformers.XLNetLMHeadModel(transformers.XLNetConfig.from_dict(settings)).double()
    notes = made.load_state_dict(XLNET.weights_to(ours.state_dict(), ours.config), strict=False)
    assert not notes.unexpected_keys and notes.missing_keys == ["lm_loss.weight"]
    return made.train()


def their_loss(theirs, batch, order):
    """Summed over the targets: document by document, segment by segment with mems, each text twice for its bi_data."""
    total = torch.zeros((), dtype=torch.float64)
    ends = batch.cu_seqlens_S1.unique().tolist()
    targets = batch.targets["plm"]
    for start, end in zip(ends, ends[1:]):
        mems = None
        row = int(order.place_T[end - 1] < 0)
        for stretch in range(int(order.stretch_T[start:end].max()) + 1):
            own = start + torch.nonzero(order.stretch_T[start:end] == stretch)[:, 0]
            own = own[order.stream_T[own].argsort()]
            asked = [
                (m, int((own == t).nonzero())) for m, t in enumerate(targets.index_M) if t in own
            ]
            mapping = F.one_hot(torch.tensor([i for _, i in asked], dtype=int), len(own)).double()
            ranks = order.key_rank_T[own]
            answer = theirs(
                input_ids=batch.ids_T[own].repeat(2, 1),
                token_type_ids=order.segment_T[own].repeat(2, 1),
                perm_mask=blocked(ranks, order.query_rank_T[own]).repeat(2, 1, 1),
                target_mapping=mapping.repeat(2, 1, 1),
                mems=mems,
                use_mems=True,
            )
            values = targets.value_M[[m for m, _ in asked]]
            total = total + F.cross_entropy(answer.logits[row], values, reduction="sum")
            mems = [m[-order.memory_tokens :] for m in answer.mems]
    return total


def blocked(key_rank_T, query_rank_T):
    return (key_rank_T[None, :] >= query_rank_T[:, None]).double()[None]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_and_every_gradient_of_both_streams_are_those_of_transformers(kind):
    """Packed by us; one document after another by them, half of them backwards, with mems where there is a memory."""
    objective = OBJECTIVES[kind]
    ours = with_random_weights(TINY)
    theirs = theirs_of(ours)
    batch = batch_of(objective, LENGTHS)
    order = objective.order(batch)
    backwards = order.place_T[torch.tensor(LENGTHS).cumsum(0) - 1] < 0
    assert 0 < int(backwards.sum()) < len(LENGTHS)
    found = objective.loss(ours, batch)["plm"].total
    found.backward()
    with _fp64_sinusoids(theirs):
        expected = their_loss(theirs, batch, order)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = XLNET.weights_to({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    for name, p in theirs.named_parameters():
        assert (gradients[name] - p.grad).abs().max() <= 1e-10 * p.grad.abs().max(), name


def stored(config=CONFIG) -> StoredModel:
    """Drawn weights, every one of them off its first value."""
    weights = {name: w.float() for name, w in with_random_weights(config).state_dict().items()}
    return StoredModel(
        config=config, weights=weights, tokenizer_json=None, origin="a test", max_tokens=64
    )


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> Path:
    """Letters; the frame is that of the special ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<cls>", "<sep>", "<pad>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(names + letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    path = tmp_path_factory.mktemp("shards") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tokenizer_json, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "xlnet"
    proofs = export_hf(stored(), tokenizer_json, SPECIALS, out)
    assert proofs["transformers"].left_padded
    return out


def test_there_and_back_is_the_same_to_the_bit(folder):
    back = read_hf(folder)
    first = stored()
    assert back.weights.keys() == first.weights.keys()
    assert all(torch.equal(back.weights[n], w) for n, w in first.weights.items())
    # one rate of dropout, and no length: config.json has no more words
    assert dataclasses.replace(back.config, max_position_embeddings=64) == first.config
    assert prove_import(back, folder).max_abs_difference < 1e-4


def test_transformers_finds_every_weight_and_its_own_frame(folder):
    model, notes = transformers.XLNetLMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.ff_activation == "gelu_new" and model.config.mem_len is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("ab", "c")
    assert asked["input_ids"][-2:] == [2, 1]
    assert asked["token_type_ids"] == [0, 0, 0, 1, 1, 2]
    assert tokenizer.padding_side == "left"


def test_a_body_gets_a_drawn_decoder(folder, tmp_path):
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["XLNetModel"]}))
    weights = load_file(folder / "model.safetensors")
    body = {n.removeprefix("transformer."): w for n, w in weights.items() if "lm_loss" not in n}
    save_file(body, tmp_path / "model.safetensors")
    back = read_hf(tmp_path)
    assert back.drawn == ("decoder.bias",)
    assert torch.equal(back.weights["first_query.weight"], stored().weights["first_query.weight"])


def test_a_model_without_a_query_stream_is_exported_too(
    tmp_path, tokenizer_json, monkeypatch, capsys
):
    config = dataclasses.replace(CONFIG, query_stream=False)
    export_hf(stored(config), tokenizer_json, SPECIALS, tmp_path / "out")
    assert not load_file(tmp_path / "out/model.safetensors")["transformer.mask_emb"].any()
    assert answers_of_card(tmp_path / "out", monkeypatch, capsys)
    card = (tmp_path / "out/README.md").read_text()
    assert "- masked-language-modelling" in card and "fill-mask" not in card


def answers_of_card(folder, monkeypatch, capsys) -> list[str]:
    """What the first snippet of a card prints: five tokens."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    script = folder.parent / "snippet.py"
    script.write_text(snippet)
    monkeypatch.chdir(folder.parent)
    runpy.run_path(str(script))
    found = ast.literal_eval(capsys.readouterr().out)
    assert len(found) == 5
    return found


def test_a_card_asks_the_query_stream_and_promises_no_fill_mask(folder, monkeypatch, capsys):
    """Its snippet gives the tokens that our own model gives of a text whose mask nobody sees."""
    card = (folder / "README.md").read_text()
    assert "- permutation-language-modelling" in card and "pipeline_tag: feature-extraction" in card
    assert "fill-mask" not in card and "masked language" not in card
    found = answers_of_card(folder, monkeypatch, capsys)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids_T = torch.tensor(tokenizer("The capital of France is <mask>.")["input_ids"])
    ours = our_model(stored().weights, CONFIG)
    batch = dataclasses.replace(
        packed_documents([ids_T]), segments_T=(ids_T == SPECIALS.cls_id) * 2
    )
    with torch.no_grad():
        logits_MV = ours.decode(
            ours.masked_states(batch, (ids_T == SPECIALS.mask_id).nonzero()[:, 0])
        )
    assert found == tokenizer.convert_ids_to_tokens(logits_MV[0].topk(5).indices)


def test_fill_mask_and_the_hints_know_that_it_has_no_such_class(folder):
    with pytest.raises(ExportError, match="XLNetLMHeadModel.*needed: one for fill_mask"):
        open_folder(folder, kind="fill_mask")
    assert not _fills_masks(CONFIG) and _fills_masks(BertConfig())
    assert not _fills_masks(ElectraConfig())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"bi_data": True}, "bi_data is True; needed: False"),
        ({"untie_r": False}, "untie_r is False; needed: True"),
        ({"attn_type": "uni"}, "attn_type is 'uni'; needed: 'bi'"),
        ({"clamp_len": 9}, "clamp_len is 9; needed: -1"),
        ({"ff_activation": "relu"}, "ff_activation is 'relu'; needed: gelu"),
        ({"d_model": None}, "d_model is null; needed: a value"),
        ({"architectures": ["XLNetForMultipleThings"]}, "needed: one of XLNetLMHeadModel"),
    ],
)
def test_a_config_that_ours_cannot_be_is_refused(folder, tmp_path, changes, said):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        read_hf_config(tmp_path)


def test_the_proof_sees_what_config_json_means():
    said = XLNET.to_settings(CONFIG, SPECIALS)
    assert export_blocker(CONFIG) is None and bridge_of(CONFIG) is XLNET
    assert drawn_difference(said, CONFIG) < 1e-12
    assert drawn_difference({**said, "ff_activation": "gelu"}, CONFIG) > 1e-6
    assert drawn_difference({**said, "layer_norm_eps": 1e-3}, CONFIG) > 1e-5


def test_the_proof_sees_the_query_stream_alone():
    """A wrong first state, which no hidden state of the content stream depends on."""
    ours = with_random_weights(TINY)
    theirs = theirs_of(ours)
    theirs.transformer.bi_data = False
    assert two_streams_differ(ours, theirs.eval()) < 1e-12
    with torch.no_grad():
        theirs.transformer.mask_emb.add_(1e-3)
    assert two_streams_differ(ours, theirs) > 1e-6
    assert _blocked(torch.tensor([-1, 0])).tolist() == [[[0.0, 1.0], [0.0, 1.0]]]
    assert build_model(TINY, seed=0).config.query_stream
