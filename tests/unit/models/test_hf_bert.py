"""BERT, RoBERTa, DistilBERT and ALBERT to Hugging Face and back: logits and gradients of its classes, and a bitwise round trip."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.base.errors import ExportError, ModelError
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.catalog import build_model
from encoder.models.hf.bert import SEGMENTS
from encoder.models.hf.catalog import bridge_of, export_blocker
from encoder.models.hf.read import prove_import, read_hf, read_hf_config
from encoder.models.stored import StoredModel
from tests.helpers.hf import SPECIALS, exported, names_in, write_tokenizer_json
from tests.helpers.packed import packed
from tests.unit.models.test_bert import QUIET, with_random_weights, with_segments

transformers = pytest.importorskip("transformers")

# the letters' tokenizer has its pad id at 3
SIZES = dict(
    vocab_size=280,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
)
CONFIGS = {
    "BertForPreTraining": BertConfig(**SIZES, sentence_head=True),
    "BertForMaskedLM": BertConfig(**SIZES, mlp="gelu_tanh"),
    "RobertaForMaskedLM": RobertaConfig(**SIZES, position_offset=SPECIALS.pad_id + 1),
    "DistilBertForMaskedLM": DistilBertConfig(**SIZES),
    "AlbertForPreTraining": AlbertConfig(
        **{**SIZES, "num_hidden_layers": 5},
        embedding_size=10,
        num_hidden_groups=2,
        inner_group_num=2,
        sentence_head=True,
    ),
    "AlbertForMaskedLM": AlbertConfig(**SIZES, embedding_size=10, mlp="gelu"),
}


def stored(config, *, seed: int = 2) -> StoredModel:
    """Drawn weights, every one of them off its first value."""
    draw = torch.Generator().manual_seed(seed)
    weights = {
        name: w + 0.2 * torch.randn(w.shape, generator=draw)
        for name, w in build_model(config, seed=seed).state_dict().items()
    }
    return StoredModel(
        config=config, weights=weights, tokenizer_json=None, origin="a test", max_tokens=64
    )


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    return write_tokenizer_json(tmp_path_factory.mktemp("shards") / "tokenizer.json")


@pytest.fixture(scope="module")
def folders(tokenizer_json, tmp_path_factory):
    """An export of each class."""
    root = tmp_path_factory.mktemp("exports")
    for name, config in CONFIGS.items():
        exported(tokenizer_json, root / name, stored(config))
    return root


def theirs_of(name: str, config, specials: SpecialIds = SPECIALS):
    """transformers' class with our random weights, in fp64, in training mode without dropout; and our model."""
    ours = with_random_weights(dataclasses.replace(config, **QUIET))
    bridge = bridge_of(ours.config, specials)
    settings = bridge.to_settings(ours.config, specials)
    settings["attention_probs_dropout_prob"] = settings["attention_dropout"] = 0.0
    settings["classifier_dropout_prob"] = 0.0  # of ALBERT's sentence head
    made = getattr(transformers, name)(
        getattr(transformers, bridge.config_class).from_dict(settings)
    ).double()
    notes = made.load_state_dict(bridge.weights_to(ours.state_dict(), ours.config), strict=False)
    assert not notes.unexpected_keys and {*notes.missing_keys} <= {*bridge.tied}
    return ours.train(), made.train(), bridge


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_and_every_gradient_are_those_of_transformers_padded(name):
    """Documents of 1, 2, 40 and the longest length, packed by us, padded to a batch by them."""
    config = CONFIGS[name]
    ours, theirs, bridge = theirs_of(name, config)
    lengths = [1, 40, 2, 64, 17]
    # the pad id is padding to RoBERTa wherever it stands
    batch = packed(lengths, vocab=270)
    batch = dataclasses.replace(batch, ids_T=batch.ids_T + 5)
    segments = None
    if config.type_vocab_size == 2:
        batch = with_segments(batch, 2)
        segments = padded(batch.segments_T, lengths, 0)
    ids_BL = padded(batch.ids_T, lengths, SPECIALS.pad_id)
    real_BL = padded(torch.ones_like(batch.ids_T), lengths, 0)
    weight_TV = torch.randn(
        len(batch.ids_T), 280, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )

    x_TC = ours.hidden_states(batch)
    found = ours.decode(x_TC)
    loss = (found * weight_TV).sum()
    asked = dict(input_ids=ids_BL, attention_mask=real_BL)
    answer = theirs(**asked, **({"token_type_ids": segments} if segments is not None else {}))
    expected = answer[0][real_BL.bool()]
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    their_loss = (expected * weight_TV).sum()
    if config.sentence_head:
        first = batch.cu_seqlens_S1[: len(lengths)]
        pairs = ours.sentence_decoder(x_TC[first])
        their_pairs = answer[1]
        assert (pairs - their_pairs).abs().max() < 1e-12
        loss = loss + pairs[:, 1].sum()
        their_loss = their_loss + their_pairs[:, 1].sum()
    loss.backward()
    their_loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    mine = bridge.weights_to({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    assert mine.keys() == grads.keys()
    for n, grad in mine.items():
        # a key's bias moves no probability: its gradient is rounding on both sides
        assert (grad - grads[n]).abs().max() <= 1e-10 * grads[n].abs().max().clamp(min=0.1), n


def padded(values_T: torch.Tensor, lengths: list[int], fill: int) -> torch.Tensor:
    rows = values_T.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_the_class_and_comes_back_to_the_bit(name, folders):
    folder, config = folders / name, CONFIGS[name]
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == [name]
    model = read_hf(folder)
    assert model.config == config and not model.drawn
    expected = stored(config).weights
    assert model.weights.keys() == expected.keys()
    assert all(torch.equal(model.weights[n], w) for n, w in expected.items())
    assert prove_import(model, folder).max_abs_difference < 2e-5
    proof = json.loads((folder / "export_proof.json").read_text())
    assert proof["drawn_weights_fp64_difference"] < 1e-11
    # positions of all but RoBERTa count padding
    assert proof["transformers"]["left_padded"] == name.startswith("Roberta")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_again_comes_back_to_the_bit(name, folders, tmp_path):
    """Loaded and saved by transformers: its own words and copies of the embedding."""
    theirs = getattr(transformers, name).from_pretrained(folders / name)
    theirs.save_pretrained(tmp_path / "again")
    model = read_hf(tmp_path / "again")
    assert model.config == CONFIGS[name]
    assert all(torch.equal(model.weights[n], w) for n, w in stored(CONFIGS[name]).weights.items())


def test_the_same_roberta_is_a_bert_where_its_tokenizer_pads_with_another_id(
    tokenizer_json, tmp_path
):
    config = RobertaConfig(**SIZES)  # positions begin at row 2, padding is 3
    exported(tokenizer_json, tmp_path / "out", stored(config))
    model = read_hf(tmp_path / "out")
    assert type(model.config) is BertConfig and model.config.position_offset == 0
    table = stored(config).weights["model.embeddings.position_embeddings.weight"]
    found = model.weights["model.embeddings.position_embeddings.weight"]
    assert torch.equal(found, table[2:])


def test_without_segments_and_another_epsilon_a_bert_gets_a_row_of_zeros(tokenizer_json, tmp_path):
    config = BertConfig(**SIZES, type_vocab_size=0, norm_eps=1e-6)
    exported(tokenizer_json, tmp_path / "out", stored(config))
    model = read_hf(tmp_path / "out")
    assert model.config.type_vocab_size == 1 and not model.weights[SEGMENTS].any()


@pytest.mark.parametrize(
    "name",
    [
        "BertForPreTraining",
        "RobertaForMaskedLM",
        "DistilBertForMaskedLM",
        "AlbertForPreTraining",
    ],
)
def test_a_body_without_heads_gets_drawn_ones_and_says_so(name, folders, tmp_path):
    folder = tmp_path / "body"
    theirs = transformers.AutoModel.from_pretrained(folders / name)
    theirs.save_pretrained(folder)
    shutil.copy(folders / name / "tokenizer.json", folder)
    model = read_hf(folder)
    first = stored(CONFIGS[name]).weights
    expected = {"head.dense", "head.norm", "decoder"}
    if name.endswith("ForPreTraining"):  # a BertModel has the pooler, and no head behind it
        expected |= {"nsp"}
        assert torch.equal(model.weights["pooler.dense.weight"], first["pooler.dense.weight"])
    drawn = {n.rpartition(".")[0] for n in model.drawn}
    assert (
        drawn - {"pooler.dense"} == expected
        and "drawn, for it has none: head.dense" in model.origin
    )
    body = [n for n in first if n.startswith("model.")]
    assert all(torch.equal(model.weights[n], first[n]) for n in body)
    assert prove_import(model, folder).max_abs_difference < 2e-5


def test_names_of_tensorflow_and_heads_beyond_the_class_are_read(folders, tmp_path):
    """As bert-base-uncased is: gamma and beta, all heads, and a config.json that says BertForMaskedLM."""
    folder = tmp_path / "old"
    shutil.copytree(folders / "BertForPreTraining", folder)
    rewrite(folder, architectures=["BertForMaskedLM"])
    weights = load_file(folder / "model.safetensors")
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): w
        for n, w in weights.items()
    }
    renamed["cls.predictions.decoder.weight"] = weights[
        "bert.embeddings.word_embeddings.weight"
    ].clone()
    renamed["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_hf_config(folder).sentence_head
    model = read_hf(folder)
    expected = stored(CONFIGS["BertForPreTraining"]).weights
    assert all(torch.equal(model.weights[n], w) for n, w in expected.items())
    assert prove_import(model, folder).max_abs_difference < 2e-5


def test_a_roberta_with_a_pooler_that_nobody_trained_leaves_it_out(folders, tmp_path):
    folder = tmp_path / "roberta"
    shutil.copytree(folders / "RobertaForMaskedLM", folder)
    weights = load_file(folder / "model.safetensors")
    weights["roberta.pooler.dense.weight"] = torch.zeros(24, 24)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = read_hf(folder)
    assert "left out: roberta.pooler.dense" in model.origin
    assert prove_import(model, folder).max_abs_difference < 2e-5


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("RobertaForMaskedLM", {"max_position_embeddings": 4}, "more rows than pad_token_id . 1"),
        ("RobertaForMaskedLM", {"max_position_embeddings": 60}, "have another shape in"),
        ("BertForMaskedLM", {"position_embedding_type": "relative_key"}, "needed: 'absolute'"),
        ("BertForMaskedLM", {"is_decoder": True}, "is_decoder is True; needed: False"),
        ("BertForMaskedLM", {"hidden_act": "relu"}, "hidden_act is 'relu'; needed: gelu"),
        ("BertForMaskedLM", {"layer_norm_eps": None}, "layer_norm_eps is null"),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("BertForMaskedLM", {"num_attention_heads": 5}, "hidden_size 24 over 5 heads"),
        ("BertForMaskedLM", {"architectures": ["BertLMHeadModel"]}, "needed: one of"),
        ("DistilBertForMaskedLM", {"activation": "relu"}, "activation is 'relu'"),
        ("AlbertForMaskedLM", {"num_hidden_groups": 9}, "num_hidden_groups is 9; needed: 1 to"),
        ("AlbertForMaskedLM", {"embedding_size": None}, "embedding_size is null"),
        ("AlbertForMaskedLM", {"embedding_size": 12}, "have another shape in"),
    ],
)
def test_what_our_model_cannot_be_is_one_sentence(name, changes, words, folders, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(folders / name, folder)
    rewrite(folder, **changes)
    with pytest.raises(ModelError, match=words):
        read_hf(folder)


def test_a_decoder_that_is_no_copy_of_the_embedding_is_refused(folders, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(folders / "BertForMaskedLM", folder)
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.decoder.weight"] = torch.zeros(280, 24)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="needed: a decoder that is the embedding"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"norm_place": "pre"}, "norm_place pre .needed: post"),
        ({"mlp": "geglu"}, "mlp geglu .needed: gelu or gelu_tanh"),
        ({"embedding_norm": False}, "embedding_norm False"),
        ({"attention_head_width": 4}, "attention_head_width 4"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ],
)
def test_what_transformers_has_no_word_for_is_refused_by_name(
    choice, words, tokenizer_json, tmp_path
):
    config = dataclasses.replace(CONFIGS["BertForMaskedLM"], **choice)
    assert "not to Hugging Face, whose BERT has no word for" in export_blocker(config)
    with pytest.raises(ExportError, match=words):
        exported(tokenizer_json, tmp_path / "out", stored(config))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_word_of_config_json_shows_on_drawn_weights(name):
    from encoder.models.hf.parity import drawn_difference

    config = CONFIGS[name]
    bridge = bridge_of(config, SPECIALS)
    said = bridge.to_settings(config, SPECIALS)
    assert drawn_difference(said, config) < 1e-11
    other = "gelu" if config.mlp == "gelu_tanh" else "gelu_new"
    act = "activation" if name.startswith("Distil") else "hidden_act"
    assert drawn_difference({**said, act: other}, config) > 1e-6
    if name.startswith("Roberta"):
        wrong = {**said, "pad_token_id": 1, "max_position_embeddings": 68}
        assert drawn_difference(wrong, config) > 1e-3
    if not name.startswith("Distil"):
        assert drawn_difference({**said, "layer_norm_eps": 1e-3}, config) > 1e-5


def rewrite(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_fill_mask_sentence_transformers_and_onnx_take_an_export(tokenizer_json, tmp_path):
    for package in ("sentence_transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    config = CONFIGS["BertForPreTraining"]
    model = stored(config)
    proofs = exported(tokenizer_json, tmp_path / "out", model, onnx=True)
    assert proofs["onnxruntime"].max_abs_difference < 1e-3
    from sentence_transformers import SentenceTransformer

    from encoder.base.batch import packed_documents
    from encoder.models.hf.parity import our_model

    vector = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a text"])[0]
    pipe = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")
    ids = pipe.tokenizer("a text")["input_ids"]
    with torch.inference_mode():
        x_TC = our_model(model.weights, config).hidden_states(packed_documents([torch.tensor(ids)]))
    assert abs(torch.from_numpy(vector) - x_TC.mean(0)).max() < 1e-5
    assert len(pipe("a [MASK] b")) == 5
