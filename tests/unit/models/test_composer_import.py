"""A checkpoint of Composer's trainer comes in whole, by its own settings, or is refused by name."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import zipfile

import pytest
import torch

from encoder.base.batch import packed_documents
from encoder.base.errors import ModelError
from encoder.models.hf.composer import read_composer
from encoder.models.hf.flexbert import DEFAULTS, READ, WITHOUT_EFFECT
from encoder.models.hf.parity import our_model
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import read_stored
from launch import import_hf
from tests.helpers.composer import (
    FLEXBERT,
    composer_state,
    flexbert,
    flexbert_config,
    write_composer,
)
from tests.helpers.hf import CONFIG, stored, write_tokenizer_json
from tests.reference.plain_encoder import plain_logits

# what FlexBERT's configuration says of a model of ours, by the settings that differ from CONFIG's
MODELS = {
    "as published": ({}, {}),
    "RMSNorm": ({"norm": "rmsnorm"}, {"normalization": "triton_rmsnorm"}),
    "SwiGLU": ({"mlp": "swiglu"}, {"hidden_act": "silu"}),
    "plain feed-forward": ({"mlp": "gelu"}, {"mlp_layer": "mlp"}),
    "four heads": ({"num_attention_heads": 4}, {"num_attention_heads": 4, "rotary_emb_dim": 8}),
    "another window": ({"window_radius_tokens": 3}, {"sliding_window": 6}),
    "every second": ({"global_attn_every_n_layers": 2}, {"global_attn_every_n_layers": 2}),
    "no windows": (
        {"global_attn_every_n_layers": 1, "local_rope_theta": 160000.0},
        {"sliding_window": -1, "global_attn_every_n_layers": -1, "local_attn_rotary_emb_base": -1},
    ),
    "first phase": (
        {"global_rope_theta": 10000.0},
        {"rotary_emb_base": 10000.0, "local_attn_rotary_emb_base": -1},
    ),
    "local theta": ({"local_rope_theta": 20000.0}, {"local_attn_rotary_emb_base": 20000.0}),
    "eps": ({"norm_eps": 1e-3}, {"norm_kwargs": {"eps": 1e-3, "bias": False}}),
    "norms with biases": ({"norm_bias": True}, {"norm_kwargs": {"eps": 1e-5}}),
    "attention with biases": (
        {"attention_bias": True},
        {"attn_qkv_bias": True, "attn_out_bias": True},
    ),
    "feed-forward with biases": ({"mlp_bias": True}, {"mlp_in_bias": True, "mlp_out_bias": True}),
    "head with bias": ({"head_bias": True}, {"head_pred_bias": True}),
    "decoder without bias": ({"decoder_bias": False}, {"decoder_bias": False}),
    "untied": ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    "post-norm": (
        {"norm_place": "post"},
        {"bert_layer": "unpadded_postnorm", "final_norm": False, "skip_first_prenorm": False},
    ),
    "learned positions": (
        {"positions": "learned", "global_rope_theta": 10000.0, "max_position_embeddings": 64},
        {
            "attention_layer": "base",
            "embedding_layer": "absolute_pos",
            "max_position_embeddings": 64,
        },
    ),
}
DOCUMENTS = [[5, 9, 200, 31, 7, 8, 77, 12], list(range(20, 50))]


def model_of(changes: dict) -> tuple[ModernBertConfig, dict]:
    config = dataclasses.replace(CONFIG, max_position_embeddings=8192, initializer_range=0.02)
    config = dataclasses.replace(config, **changes)
    return config, stored(dataclasses.replace(config, initializer_range=0.2)).weights


@pytest.mark.parametrize("name", MODELS)
def test_settings_that_a_checkpoint_holds_make_the_model(tmp_path, name):
    changes, said = MODELS[name]
    config, weights = model_of(changes)
    path = write_composer(tmp_path / "ep0-ba7-rank0.pt", weights, flexbert_config(CONFIG, **said))
    model = read_composer(path)
    assert model.config == config
    documents = [torch.tensor(d) for d in DOCUMENTS]
    with torch.inference_mode():
        ours = our_model(model.weights, model.config).double().logits(packed_documents(documents))
    plain = plain_logits(
        {n: w.double() for n, w in weights.items()},
        config,
        torch.cat(documents),
        [len(d) for d in DOCUMENTS],
    )
    assert (ours - plain).abs().max() < 1e-9 * plain.abs().max()


def test_queries_and_keys_of_interleaved_pairs_are_laid_as_ours(tmp_path):
    """The file's rows by turns: of every head first the even features' rows, then the odd ones'."""
    config, weights = model_of({})
    heads, width = config.num_attention_heads, config.head_width
    order = torch.arange(width).view(2, -1).T.flatten()  # theirs: 0, D/2, 1, D/2 + 1, ...
    rows = (torch.arange(heads)[:, None] * width + order).flatten()
    theirs = dict(weights)
    for name, matrix in weights.items():
        if ".Wqkv." in name:
            q, k, v = matrix.chunk(3)
            theirs[name] = torch.cat((q[rows], k[rows], v))
    said = flexbert_config(CONFIG, rotary_emb_interleaved=True)
    model = read_composer(write_composer(tmp_path / "a.pt", theirs, said))
    assert all(torch.equal(model.weights[n], w) for n, w in weights.items())


def test_a_whole_checkpoint_is_read_with_the_types_beside_its_tensors(tmp_path):
    config, weights = model_of({})
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG))
    assert all(torch.equal(read_composer(path).weights[n], w) for n, w in weights.items())
    with pytest.raises(Exception, match="GLOBAL"):
        torch.load(path, weights_only=True)  # the file does hold more than tensors


@pytest.mark.parametrize("spelling", ["numpy.core", "numpy._core"])
def test_arrays_of_either_numpy_are_read(tmp_path, spelling):
    config, weights = model_of({})
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG))
    respelt = tmp_path / "b.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(respelt, "w", zipfile.ZIP_STORED) as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("/data.pkl"):
                for word in (b"numpy._core", b"numpy.core"):
                    content = content.replace(b"c" + word + b".multiarray\n", b"c@.multiarray\n")
                assert content.count(b"c@.multiarray\n_reconstruct") == 1
                content = content.replace(b"c@.", b"c" + spelling.encode() + b".")
            new.writestr(item, content)
    assert read_composer(respelt).config == config


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, ("touch {path}",)), "posix.system"),
        ((exec, ("open({path!r}, 'w')",)), "builtins.exec|exec"),
        ((datetime.datetime, (2024, 1, 1)), "datetime.datetime"),
        ((getattr, (datetime.timedelta, "min")), "getattr"),
    ],
)
@pytest.mark.parametrize("place", ["rng", "timestamp", "content"])
def test_any_other_type_is_refused_by_name_and_nothing_is_run(tmp_path, call, named, place):
    made = tmp_path / "made"
    function, arguments = call
    arguments = tuple(a.format(path=str(made)) if isinstance(a, str) else a for a in arguments)
    _, weights = model_of({})
    state = composer_state(weights, flexbert_config(CONFIG))
    evil = Evil(function, arguments)
    holders = {
        "rng": state["rng"][0],
        "timestamp": state["state"]["timestamp"]["Timestamp"],
        "content": state["state"]["integrations"]["huggingface"]["model"]["config"]["content"],
    }
    holders[place]["evil"] = evil
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=f"a.pt holds .*({named}) beside tensors"):
        read_composer(tmp_path / "a.pt")
    assert not made.exists()


def test_what_an_import_allows_is_forgotten_after_it(tmp_path):
    _, weights = model_of({})
    read_composer(write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG)))
    assert datetime.timedelta not in torch.serialization.get_safe_globals()


CANNOT_BE = {
    "normalization": ("batchnorm", "layernorm or rmsnorm"),
    "norm_kwargs": ({"elementwise_affine": False}, "elementwise_affine true"),
    "hidden_act": ("relu", "hidden_act gelu or silu"),
    "head_pred_act": ("silu", "'gelu'"),
    "head_pred_norm": (False, "True"),
    "embed_norm": (False, "True"),
    "final_norm": (False, "True with bert_layer prenorm"),
    "skip_first_prenorm": (False, "True"),
    "attention_layer": ("rope_parallel", "attention_layer rope"),
    "embedding_layer": ("absolute_pos", "rope with embedding_layer sans_pos"),
    "bert_layer": ("parallel_prenorm", "prenorm or postnorm"),
    "mlp_layer": ("parallel_glu", "mlp_layer glu"),
    "encoder_layer": ("looped", "'base'"),
    "initial_mlp_layer": ("mlp", "glu, as in the other layers"),
    "initial_bert_layer": ("postnorm", "prenorm, as in the other layers"),
    "initial_attention_layer": ("base", "rope, as in the other layers"),
    "attn_qkv_bias": (True, "False, as attn_out_bias"),
    "mlp_out_bias": (True, "True, as mlp_out_bias"),
    "embed_dropout_prob": (0.1, "0.0"),
    "mlp_dropout_prob": (0.1, "0.0"),
    "attention_probs_dropout_prob": (0.1, "0.0"),
    "sliding_window": (1, "-1, or at least 2"),
    "global_attn_every_n_layers": (-1, "at least 1"),
    "rotary_emb_dim": (8, "the whole head, 16"),
    "local_attn_rotary_emb_dim": (8, "the whole head, 16"),
    "rotary_emb_scale_base": (512, "None"),
    "rotary_emb_base": (0, "above 0, and finite"),
    "local_attn_rotary_emb_base": (-2.0, "above 0, and finite"),
    "num_attention_heads": (5, "divides hidden_size 32"),
    "attn_out_dropout_prob": ("much", "a number"),
}


@pytest.mark.parametrize("key", CANNOT_BE)
def test_a_setting_that_our_model_cannot_be_is_refused_by_name(tmp_path, key):
    value, needed = CANNOT_BE[key]
    _, weights = model_of({})
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG, **{key: value}))
    blamed = "mlp_in_bias" if key == "mlp_out_bias" else key
    with pytest.raises(ModelError, match=f"a.pt.*configuration has {blamed} .*needed: .*{needed}"):
        read_composer(path)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
)
def test_a_size_that_the_tensors_do_not_have_is_refused_by_name(tmp_path, key):
    _, weights = model_of({})
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG, **{key: 40}))
    with pytest.raises(ModelError, match=f"configuration says {key} 40, its tensors"):
        read_composer(path)


def test_no_key_of_a_configuration_is_put_aside_unseen(tmp_path):
    _, weights = model_of({})
    path = tmp_path / "a.pt"
    write_composer(path, weights, flexbert_config(CONFIG, qk_norm=True))
    with pytest.raises(ModelError, match="has qk_norm 'True', which is no setting of FlexBERT"):
        read_composer(path)
    write_composer(path, weights, flexbert_config(CONFIG, sliding_window=torch.ones(3)))
    with pytest.raises(ModelError, match="holds a Tensor under 'sliding_window'"):
        read_composer(path)
    write_composer(path, weights, flexbert_config(CONFIG, qk_norm=False, other=None))
    assert read_composer(path).config.num_hidden_layers == 4
    # each key either has its fate in a table, or begins with _
    assert {key for key in FLEXBERT if not key.startswith("_")} <= READ | WITHOUT_EFFECT
    assert not READ & WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"global_rope_theta": 10000.0}, "--global-rope-theta is 10000, but .* says 160000"),
        ({"local_rope_theta": 160000.0}, "--local-rope-theta is 160000, but .* says 10000"),
        ({"heads": 4}, "--heads is 4, but .* says num_attention_heads 2"),
    ],
)
def test_what_a_file_says_is_not_put_aside_for_what_is_told(tmp_path, told, words):
    _, weights = model_of({})
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG))
    with pytest.raises(ModelError, match=words):
        read_composer(path, **told)
    assert read_composer(path, global_rope_theta=160000.0, local_rope_theta=10000.0, heads=2)


def test_what_a_configuration_does_not_say_is_listed_as_assumed(tmp_path):
    _, weights = model_of({})
    path = tmp_path / "a.pt"
    left_out = {
        "attn_out_dropout_prob": ...,
        "tie_word_embeddings": ...,
        "local_attn_rotary_emb_base": ...,
    }
    write_composer(path, weights, flexbert_config(CONFIG, **left_out))
    model = read_composer(path)
    assert (
        model.config.attention_output_dropout == 0.0 and model.config.local_rope_theta == 160000.0
    )
    for words in (
        "attn_out_dropout_prob 0.0",
        "tie_word_embeddings True",
        "max_position_embeddings 8192",
    ):
        assert words in model.origin.partition("assumed: ")[2]
    # FlexBERT's default is another norm, and another activation of the head
    write_composer(path, weights, flexbert_config(CONFIG, normalization=...))
    assert read_composer(path).config.norm == "rmsnorm" == DEFAULTS["normalization"]
    write_composer(path, weights, flexbert_config(CONFIG, head_pred_act=...))
    with pytest.raises(
        ModelError, match="head_pred_act 'silu' .it is not said: FlexBERT's default"
    ):
        read_composer(path)
    write_composer(path, weights, flexbert_config(CONFIG, rotary_emb_base=...))
    with pytest.raises(ModelError, match="does not say its RoPE theta.*--global-rope-theta 10000"):
        read_composer(path)
    assert read_composer(path, global_rope_theta=5e4).config.global_rope_theta == 5e4


def test_tables_of_angles_that_are_not_those_of_theta_are_refused(tmp_path):
    weights = stored().weights
    angles = 160000.0 ** (-torch.arange(0, 16, 2) / 16)
    name = "bert.encoder.layers.3.attn.rotary_emb.inv_freq"
    torch.save({**flexbert(weights), name: angles}, tmp_path / "a.pt")
    assert read_composer(tmp_path / "a.pt", global_rope_theta=160000.0, heads=2)
    with pytest.raises(ModelError, match="inv_freq is no table of RoPE theta 10000"):
        read_composer(tmp_path / "a.pt", global_rope_theta=10000.0, heads=2)


def test_the_command_takes_settings_and_tokenizer_out_of_the_checkpoint(tmp_path, capsys):
    _, weights = model_of({})
    tokenizer = json.loads(write_tokenizer_json(tmp_path / "tokenizer.json").read_text())
    path = write_composer(tmp_path / "a.pt", weights, flexbert_config(CONFIG), tokenizer)
    assert import_hf.main([str(path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "with its tokenizer" in said and "by its own configuration" in said
    model = read_stored(tmp_path / "out")
    assert json.loads(model.tokenizer_json.read_text()) == tokenizer
    assert model.config.global_rope_theta == 160000.0
    more = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert import_hf.main([str(path), str(tmp_path / "out"), *more]) == 2
    assert "--tokenizer is not needed" in capsys.readouterr().err
