"""An export is proven before it exists, loads in transformers, and is refused where it would not be true."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from encoder.base.errors import ExportError, ModelError, UserError
from encoder.models.hf import write as hf_export
from encoder.models.hf.catalog import BRIDGES
from encoder.models.hf.modernbert import MODERNBERT, hf_config
from encoder.models.hf.parity import drawn_difference, prove
from encoder.models.modernbert import ModernBertForMaskedLM
from tests.helpers.hf import CONFIG, SPECIALS, exported, names_in, stored, write_tokenizer_json


@pytest.fixture
def tokenizer_json(tmp_path):
    return write_tokenizer_json(tmp_path / "shards" / "tokenizer.json")


def test_an_export_is_compared_at_the_edges_of_the_window_at_1024_and_at_the_longest_document(
    tokenizer_json, tmp_path
):
    proof = exported(tokenizer_json, tmp_path / "out", stored(max_tokens=1100))["transformers"]
    assert proof.lengths == (1, 127, 128, 129, 130, 1024, 1100) and proof.max_abs_difference <= 2e-5
    assert names_in(tmp_path) == ["out", "shards"]
    assert names_in(tmp_path / "out") == [
        "1_Pooling",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "export_proof.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (
        json.loads((tmp_path / "out" / "export_proof.json").read_text())["transformers"]["lengths"][
            -1
        ]
        == 1100
    )


def test_each_length_is_asked_alone_padded_on_the_right_and_on_the_left():
    ours = ModernBertForMaskedLM(dataclasses.replace(CONFIG, num_hidden_layers=1)).eval()
    asked = []

    def ask(ids_BL, real_BL):
        asked.append(["".join("x" if r else "-" for r in row) for row in real_BL.tolist()])
        return lambda row, positions: torch.zeros(
            positions.stop - positions.start, CONFIG.vocab_size
        )

    with pytest.raises(ExportError, match="the logits of nobody differ from ours"):
        prove(ours, ask, max_tokens=600, asked="nobody")
    alone, right, left, long = asked[:5], asked[5], asked[6], asked[7:]
    assert [len(rows[0]) for rows in alone] == [1, 127, 128, 129, 130] and len(right) == 5
    assert (
        right[0] == "x" + "-" * 132 and left[0] == "-" * 132 + "x" and left[4] == "---" + "x" * 130
    )
    assert long == [["x" * 600], ["x" * 600 + "---"], ["---" + "x" * 600]]


def test_both_thetas_are_always_written_in_the_words_of_transformers_4_and_5():
    written = hf_config(CONFIG, SPECIALS)
    assert (written["global_rope_theta"], written["local_rope_theta"]) == (160000.0, 10000.0)
    assert written["rope_parameters"]["full_attention"]["rope_theta"] == 160000.0
    assert written["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert written["layer_types"] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]


@pytest.mark.parametrize(
    "choice",
    [
        {"mlp": "swiglu"},
        {"tie_word_embeddings": False},
        {"decoder_bias": False},
        {"global_attn_every_n_layers": 2},
        {
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "window_radius_tokens": 16,
            "norm_eps": 1e-2,
            "local_rope_theta": 500.0,
            "num_attention_heads": 4,
        },
    ],
    ids=lambda c: next(iter(c)),
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_setting_that_hugging_face_knows_is_the_same_model_there(
    tokenizer_json, tmp_path, choice, attention, monkeypatch
):
    theirs = hf_export.transformers_model

    def transformers_model(folder, bridge):
        model = theirs(folder, bridge)
        model.set_attn_implementation(attention)
        return model

    monkeypatch.setattr(hf_export, "transformers_model", transformers_model)
    proof = exported(
        tokenizer_json, tmp_path / "out", stored(dataclasses.replace(CONFIG, **choice))
    )["transformers"]
    assert proof.max_abs_difference <= 2e-5


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"norm": "rmsnorm"}, r"no word for norm rmsnorm \(needed: layernorm\)"),
        ({"mlp": "gelu"}, "mlp gelu"),
        ({"norm_place": "post"}, "norm_place post"),
        (
            {"positions": "learned", "type_vocab_size": 2, "global_rope_theta": 1e4},
            "positions learned.*, type_vocab",
        ),
        (
            {"attention_head_width": 8},
            r"attention_head_width 8 \(needed: hidden_size / num_attention_heads, 16\)",
        ),
    ],
)
def test_a_setting_that_hugging_face_has_no_word_for_is_refused_by_name(choice, words):
    with pytest.raises(ExportError, match=words):
        hf_config(dataclasses.replace(CONFIG, **choice), SPECIALS)


def write_settings_by(monkeypatch, to_settings):
    """config.json is written by another function."""
    monkeypatch.setitem(
        BRIDGES, "modernbert", dataclasses.replace(MODERNBERT, to_settings=to_settings)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_rope_theta": 10000.0, "rope_parameters": None},
        {"local_attention": 64},
        {"hidden_activation": "silu"},
    ],
)
def test_logits_that_differ_are_refused_and_nothing_is_left(
    tokenizer_json, tmp_path, monkeypatch, wrong
):
    write_settings_by(
        monkeypatch,
        lambda *a: {k: v for k, v in {**hf_config(*a), **wrong}.items() if v is not None},
    )
    with pytest.raises(
        ExportError, match="logits of transformers differ from ours by .*Nothing was written"
    ):
        exported(tokenizer_json, tmp_path / "out")
    assert names_in(tmp_path) == ["shards"]


@pytest.mark.parametrize(
    ("wrong", "at_least"),
    [
        ({"global_rope_theta": 160001.0}, 1e-5),
        ({"local_rope_theta": 160000.0}, 1e-1),
        ({"norm_eps": 1e-6}, 1e-5),
        ({"window_radius_tokens": 63}, 1e-1),
        ({"global_attn_every_n_layers": 2}, 1e-1),
        ({"mlp": "swiglu"}, 1e-1),
    ],
    ids=lambda w: next(iter(w)) if isinstance(w, dict) else "",
)
def test_every_wrong_word_shows_on_drawn_weights(wrong, at_least):
    config = dataclasses.replace(
        CONFIG, hidden_size=768, num_attention_heads=12, num_hidden_layers=22, vocab_size=50368
    )
    said = hf_config(dataclasses.replace(config, **wrong), SPECIALS)
    assert drawn_difference(said, config) > at_least
    assert drawn_difference(hf_config(config, SPECIALS), config) < 1e-11


def test_an_untrained_model_cannot_hide_a_wrong_theta(tokenizer_json, tmp_path, monkeypatch):
    write_settings_by(
        monkeypatch,
        lambda config, specials: hf_config(
            dataclasses.replace(config, global_rope_theta=10000.0), specials
        ),
    )
    fresh = dataclasses.replace(CONFIG, initializer_range=0.002)
    model = dataclasses.replace(
        stored(fresh), weights=ModernBertForMaskedLM(fresh).state_dict()
    )  # its own logits: 1e-9 off
    with pytest.raises(ExportError, match="on drawn weights in fp64"):
        exported(tokenizer_json, tmp_path / "out", model)
    assert names_in(tmp_path) == ["shards"]


def test_sharp_attention_is_judged_in_fp64_and_both_figures_are_kept(tokenizer_json, tmp_path):
    model = stored(max_tokens=20)
    sharp = {n: w * 12 if n.endswith("Wqkv.weight") else w for n, w in model.weights.items()}
    proof = exported(tokenizer_json, tmp_path / "out", dataclasses.replace(model, weights=sharp))[
        "transformers"
    ]
    assert (
        proof.max_abs_difference > 1e-4 and proof.fp64_difference < 1e-9 and "in fp64" in str(proof)
    )
    written = json.loads((tmp_path / "out" / "export_proof.json").read_text())
    assert written["transformers"]["fp64_difference"] == proof.fp64_difference
    assert written["drawn_weights_fp64_difference"] < 1e-11


def test_a_failed_export_leaves_the_earlier_one_and_a_good_one_replaces_it(
    tokenizer_json, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    exported(tokenizer_json, out)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(
        ExportError, match="max_tokens 2,000 is more than max_position_embeddings 1,200"
    ):
        exported(tokenizer_json, out, stored(max_tokens=2000))
    with monkeypatch.context() as patched:
        patched.setattr(
            hf_export, "transformers_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            exported(tokenizer_json, out, stored(seed=3))
    assert (out / "model.safetensors").read_bytes() == first
    exported(tokenizer_json, out, stored(seed=3, max_tokens=20))
    assert (out / "model.safetensors").read_bytes() != first
    assert json.loads((out / "export_proof.json").read_text())["transformers"]["lengths"] == [
        1,
        20,
        127,
        128,
        129,
        130,
    ]
    assert names_in(tmp_path) == ["out", "shards"]


def test_a_folder_of_something_else_is_never_touched(tokenizer_json, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="out is not empty and holds no export_proof.json"):
        exported(tokenizer_json, out)
    with pytest.raises(UserError, match="thesis.txt is a file; needed: a folder"):
        exported(tokenizer_json, out / "thesis.txt")
    assert names_in(tmp_path) == ["out", "shards"] and names_in(out) == ["thesis.txt"]


def test_weights_of_another_model_are_refused_by_name(tokenizer_json, tmp_path):
    weights = stored().weights
    lacking = {k: v for k, v in weights.items() if k != "head.dense.weight"}
    for wrong, words in (
        (lacking, "the weights lack head.dense.weight"),
        (
            {**weights, "head.dense.bias": torch.zeros(32)},
            "the weights hold unknown head.dense.bias",
        ),
        (
            {**weights, "decoder.bias": torch.zeros(9)},
            r"another shape in decoder.bias \[9\] for \[280\]",
        ),
    ):
        with pytest.raises(ModelError, match=words):
            exported(tokenizer_json, tmp_path / "out", dataclasses.replace(stored(), weights=wrong))
    assert names_in(tmp_path) == ["shards"]


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer_json, tmp_path):
    model = stored()
    with pytest.raises(ModelError, match="has no token mask 270"):
        hf_export.export_hf(
            model,
            tokenizer_json,
            dataclasses.replace(SPECIALS, mask_id=270),
            tmp_path / "out",
        )
    with pytest.raises(ModelError, match="has ids up to 260; the model's vocabulary is 200"):
        exported(
            tokenizer_json, tmp_path / "out", stored(dataclasses.replace(CONFIG, vocab_size=200))
        )
    good = json.loads(tokenizer_json.read_text())
    tokenizer_json.write_text(
        json.dumps(
            {
                **good,
                "added_tokens": good["added_tokens"][:4],
                "model": {**good["model"], "vocab": {**good["model"]["vocab"], "[MASK]": 4}},
            }
        )
    )
    with pytest.raises(
        ModelError, match=r"has \[MASK\] in its vocabulary, but not among added_tokens"
    ):
        exported(tokenizer_json, tmp_path / "out")
    for post in (
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {**good["post_processor"], "single": good["post_processor"]["single"][:2]},
    ):
        tokenizer_json.write_text(json.dumps({**good, "post_processor": post}))
        with pytest.raises(
            ModelError, match=r"of an empty text; needed: \[CLS\] and \[SEP\], \[1, 2\]"
        ):
            exported(tokenizer_json, tmp_path / "out")
    tokenizer_json.write_text("not json")
    with pytest.raises(ModelError, match="cannot be used as a tokenizer.json"):
        exported(tokenizer_json, tmp_path / "out")
    assert names_in(tmp_path) == ["shards"]


def test_a_tokenizer_without_frame_is_given_one_and_loses_cuts_and_fillings(
    tokenizer_json, tmp_path
):
    import transformers

    good = json.loads(tokenizer_json.read_text())
    tokenizer_json.write_text(
        json.dumps(
            {
                **good,
                "post_processor": None,
                "truncation": {
                    "direction": "Right",
                    "max_length": 3,
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
            }
        )
    )
    exported(tokenizer_json, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcde")["input_ids"]) == [
        "[CLS]",
        *"abcde",
        "[SEP]",
    ]
