"""One class, many encoders: each choice against a reference written out by hand, and against transformers where it has one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from tests.helpers.hf import transformers_modernbert
from tests.helpers.packed import packed
from tests.helpers.plain import check_loss_and_gradients, with_random_weights

TINY = ModernBertConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=3,
    window_radius_tokens=4,
    global_rope_theta=500.0,
    local_rope_theta=100.0,
    attention_output_dropout=0.0,
    max_position_embeddings=64,
)
LEARNED = dict(positions="learned", global_rope_theta=1e4, local_rope_theta=1e4)
BIASED = dict(norm_bias=True, attention_bias=True, mlp_bias=True, head_bias=True)
BERT = dict(
    norm_place="post",
    mlp="gelu",
    **LEARNED,
    type_vocab_size=2,
    global_attn_every_n_layers=1,
    **BIASED,
)
SETTINGS = {
    "modernbert": {},
    "swiglu": dict(mlp="swiglu"),
    "gelu": dict(mlp="gelu"),
    "rmsnorm": dict(norm="rmsnorm"),
    "learned positions": LEARNED,
    "norms after the sums": dict(norm_place="post"),
    "narrow heads": dict(attention_head_width=4),
    "wide heads": dict(attention_head_width=10),
    "untied": dict(tie_word_embeddings=False),
    "no bias at all": dict(decoder_bias=False),
    "biases everywhere": BIASED,
    "bert": BERT,
    "ropert": dict(mlp="swiglu", global_attn_every_n_layers=1),
}
# documents of one token, one window exactly, its edges (radius 4: 9 keys), and an empty tail (packed repeats the last end)
PACKINGS = [[1], [9, 1, 5, 8, 10], [1, 1, 30, 4, 3], [20, 17, 1]]


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_loss_and_gradients_of_every_setting_equal_the_plain_reference_in_fp64(setting, lengths):
    model = with_random_weights(
        replace(TINY, **setting), attention="sdpa" if len(lengths) % 2 else "tiles"
    )
    check_loss_and_gradients(model, lengths)


def test_a_setting_changes_the_parameters_it_names_and_no_others():
    plain = set(ModernBertForMaskedLM(TINY).state_dict())

    def names(**setting: object) -> tuple[set[str], set[str]]:
        found = set(ModernBertForMaskedLM(replace(TINY, **setting)).state_dict())
        return found - plain, plain - found

    assert names(tie_word_embeddings=False) == ({"decoder.weight"}, set())
    assert names(decoder_bias=False) == (set(), {"decoder.bias"})
    assert names(**LEARNED) == ({"model.embeddings.position_embeddings.weight"}, set())
    assert names(norm_place="post") == (
        {"model.layers.0.attn_norm.weight"},
        {"model.final_norm.weight"},
    )
    assert (
        names(mlp="swiglu")
        == names(norm="rmsnorm")
        == names(attention_head_width=4)
        == (set(), set())
    )
    shapes = {
        n: tuple(p.shape)
        for n, p in (
            ModernBertForMaskedLM(replace(TINY, attention_head_width=10, mlp="gelu"))
            .state_dict()
            .items()
        )
    }
    assert shapes["model.layers.1.attn.Wqkv.weight"] == (90, 24) and shapes[
        "model.layers.1.attn.Wo.weight"
    ] == (24, 30)
    assert shapes["model.layers.1.mlp.Wi.weight"] == (20, 24)


@pytest.mark.parametrize(
    "settings, theirs",
    [
        (dict(mlp="swiglu"), dict(hidden_activation="silu")),
        (BIASED, dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True)),
        (dict(decoder_bias=False), dict(decoder_bias=False)),
        (dict(tie_word_embeddings=False), dict(tie_word_embeddings=False)),
        (
            dict(window_radius_tokens=16, global_attn_every_n_layers=2),
            dict(local_attention=32, global_attn_every_n_layers=2),
        ),
    ],
    ids=["swiglu", "biases", "no decoder bias", "untied", "window and period"],
)
def test_what_transformers_modernbert_can_be_told_gives_its_logits(settings, theirs):
    config = replace(
        TINY, **{"window_radius_tokens": 64, "max_position_embeddings": 256, **settings}
    )
    other = transformers_modernbert(config, **theirs)
    assert_same_logits(config, other, lambda name: name, lengths=[1, 127, 128, 129, 130, 140])


def test_bert_is_a_matter_of_settings():
    transformers = pytest.importorskip("transformers")
    other = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=20,
            max_position_embeddings=64,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            pad_token_id=0,
        )
    ).eval()
    assert_same_logits(
        replace(TINY, **BERT, norm_eps=1e-12), other, name_in_bert, lengths=[1, 20, 64]
    )


def test_roberta_is_a_matter_of_settings():
    transformers = pytest.importorskip("transformers")
    other = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=20,
            max_position_embeddings=66,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=1,
        )
    ).eval()
    # its table begins at pad_token_id + 1: two rows that no token meets
    assert_same_logits(
        replace(TINY, **{**BERT, "type_vocab_size": 1}),
        other,
        name_in_roberta,
        lengths=[1, 20, 64],
        skip_positions=2,
    )


def assert_same_logits(config, other, name_of, *, lengths, skip_positions=0) -> None:
    """Our random weights, put into a model of transformers, give our logits."""
    ours = with_random_weights(config).float().eval()
    theirs, filled = other.state_dict(), set()
    for name, value in ours.state_dict().items():
        if "position_embeddings" in name and skip_positions:
            value = torch.cat((torch.zeros(skip_positions, value.shape[1]), value))
        names = name_of(name)
        names = [names] if isinstance(names, str) else names
        for their_name, part in zip(names, value.chunk(len(names)), strict=True):
            assert theirs[their_name].shape == part.shape, their_name
            theirs[their_name], _ = part, filled.add(their_name)
    tied = (
        {n for n in theirs if n.endswith(("decoder.weight", "decoder.bias"))}
        if config.tie_word_embeddings
        else set()
    )
    assert {
        n for n in theirs if "position_ids" not in n and "token_type_ids" not in n
    } - filled <= tied
    other.load_state_dict(theirs)
    other.tie_weights()
    batch = packed(lengths, vocab=60)
    # transformers reads the pad id as padding even where the mask says otherwise (RoBERTa's positions): leave it out
    batch = replace(batch, ids_T=batch.ids_T.clamp(min=3))
    with torch.no_grad():
        for ids, found in zip(
            batch.ids_T.split(lengths), ours.logits(batch).split(lengths), strict=True
        ):
            expected = other(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[
                0
            ]
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def name_in_bert(name: str, *, roberta: bool = False) -> str | list[str]:
    stem, _, kind = name.rpartition(".")
    family = "roberta" if roberta else "bert"
    fixed = {
        "model.embeddings.tok_embeddings": "embeddings.word_embeddings",
        "model.embeddings.norm": "embeddings.LayerNorm",
        "model.embeddings.position_embeddings": "embeddings.position_embeddings",
        "model.embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    }
    heads = (
        {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "decoder": "lm_head"}
        if roberta
        else {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "decoder": "cls.predictions",
        }
    )
    if stem in heads:
        return f"{heads[stem]}.{kind}"
    if stem in fixed:
        return f"{family}.{fixed[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    at = f"{family}.encoder.layer.{layer}"
    if part == "attn.Wqkv":
        return [f"{at}.attention.self.{which}.{kind}" for which in ("query", "key", "value")]
    parts = {
        "attn.Wo": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "mlp.Wi": "intermediate.dense",
        "mlp.Wo": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    return f"{at}.{parts[part]}.{kind}"


def name_in_roberta(name: str) -> str | list[str]:
    return name_in_bert(name, roberta=True)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(norm="rmsnorm", norm_bias=True),
            "norm_bias true with norm rmsnorm: an RMSNorm has no bias",
        ),
        (
            dict(attention_head_width=5),
            "attention_head_width is 5; needed: at least 1, and even where positions are rope",
        ),
        (dict(positions="learned"), "a RoPE theta has no effect on positions learned"),
        (dict(type_vocab_size=-1), "type_vocab_size is -1; needed: 0 .no segments. or more"),
        (
            dict(hidden_size=25),
            (
                "hidden_size 25 over 3 heads gives a head width of 8.33333; .*or set"
                " attention_head_width"
            ),
        ),
        (dict(global_rope_theta=-1.0), "global_rope_theta is -1.0; needed: more than 0"),
    ],
)
def test_choices_that_cannot_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **wrong)
