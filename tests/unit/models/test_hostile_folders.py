"""Hugging Face folders of ALBERT, BERT and XLNet whose config.json or tensors were made to harm: one sentence each, at once."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import encoder.models.hf.read as read
from encoder.base.errors import ModelError
from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig
from encoder.models.catalog import build_model
from encoder.models.hf.catalog import BRIDGES, TITLES, bridge_of, bridge_of_settings
from encoder.models.hf.read import read_hf
from tests.helpers.xlnet import SPECIALS, TINY

SIZES = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=32,
)
CONFIGS = {
    "albert": AlbertConfig(**SIZES, embedding_size=10),
    "bert": BertConfig(**SIZES),
    "xlnet": TINY,
}


@pytest.fixture(autouse=True)
def no_gigabytes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.fixture(scope="module")
def written() -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """config.json and tensors of an honest folder, by model_type."""
    found = {}
    for kind, config in CONFIGS.items():
        bridge = bridge_of(config)
        weights = build_model(config, seed=0).state_dict()
        found[kind] = bridge.to_settings(config, SPECIALS), bridge.weights_to(weights, config)
    return found


@pytest.fixture
def refused(written, tmp_path, monkeypatch) -> Callable[..., str]:
    """The sentence that a folder with these changes gets; transformers is not asked."""
    monkeypatch.setattr(read, "_check_meaning", lambda *_: None)

    def ask(kind: str, config: dict, tensors: dict[str, torch.Tensor] | None = None) -> str:
        settings, weights = written[kind]
        path = Path(tmp_path / "config.json")
        path.write_text(json.dumps({**settings, **config}))
        save_file({**weights, **(tensors or {})}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            read_hf(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
        return str(caught.value)

    return ask


def test_the_honest_folders_are_read(written, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_check_meaning", lambda *_: None)
    for settings, weights in written.values():
        (tmp_path / "config.json").write_text(json.dumps(settings))
        save_file(weights, tmp_path / "model.safetensors")
        assert not read_hf(tmp_path).drawn


def test_what_can_be_read_is_listed_where_people_look(tmp_path):
    root = Path(read.__file__).parents[3]
    with pytest.raises(ModelError) as caught:
        read_hf(tmp_path)
    said = [str(caught.value)]
    said += [(root / name).read_text() for name in ("launch/import_hf.py", "docs/commands.md")]
    listed = f"{', '.join(TITLES[:-1])} or {TITLES[-1]}"
    assert all(f"of {listed}" in " ".join(text.split()) for text in said)
    for name in ("README.md", "docs/README.md"):
        text = (root / name).read_text()
        assert ", ".join(TITLES[1:]) in text


# what a size may not be
STRANGE = (-1, 0, 1e30, 2.5, "many", True, [3], {"a": 1})
OF_XLNET = ("vocab_size", "d_model", "d_inner", "n_layer", "n_head")
OF_ALBERT = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_hidden_groups",
    "inner_group_num",
    "num_attention_heads",
    "max_position_embeddings",
)


@pytest.mark.parametrize("value", STRANGE, ids=str)
@pytest.mark.parametrize(
    "kind, name",
    [*(("xlnet", name) for name in OF_XLNET), *(("albert", name) for name in OF_ALBERT)],
)
def test_a_size_that_is_none_is_refused(refused, kind, name, value):
    assert "config.json" in refused(kind, {name: value})


@pytest.mark.parametrize("value", [-1.0, 1e400, "x", [1]], ids=str)
@pytest.mark.parametrize(
    "kind, name",
    [
        ("xlnet", "dropout"),
        ("xlnet", "layer_norm_eps"),
        ("albert", "hidden_dropout_prob"),
        ("albert", "layer_norm_eps"),
    ],
)
def test_a_rate_that_is_none_is_refused(refused, kind, name, value):
    assert "config.json" in refused(kind, {name: value})


@pytest.mark.parametrize(
    "kind, config",
    [
        ("xlnet", {"n_head": 5}),
        ("xlnet", {"d_head": 7}),
        ("xlnet", {"d_head": "x"}),
        ("albert", {"num_attention_heads": 5}),
        ("albert", {"num_hidden_groups": 3}),
        ("albert", {"inner_group_num": 2000}),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(refused, kind, config):
    assert "config.json" in refused(kind, config)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("found", [5, True, 2.5, {"a": 1}, "BertModel", [None], [["x"]]], ids=str)
def test_architectures_that_are_no_list_of_texts_are_refused(kind, found):
    with pytest.raises(ModelError, match="needed: a list of one text") as caught:
        bridge_of_settings({"model_type": kind, "architectures": found}, where="a/config.json")
    assert str(caught.value).startswith("a/config.json: architectures is ")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "found", [5, True, {"a": 1}, "XLNetLMHeadModel", ["AModel"], ["A", "B"]], ids=str
)
def test_a_folder_of_strange_architectures_is_refused(refused, kind, found):
    assert "config.json" in refused(kind, {"architectures": found})


LAYER = "transformer.layer.0"
ATTENTION = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
SHAPES = [
    *(
        ("xlnet", f"{LAYER}.rel_attn.{part}", shape)
        for part in ("q", "k", "v", "r", "o", "seg_embed", "r_w_bias")
        for shape in ((), (24,), (24, 24), (2, 24, 3, 8))
    ),
    *(("xlnet", "transformer.mask_emb", shape) for shape in ((), (0,), (24,), (2, 1, 24))),
    # as many values as are needed, of which key has more than value
    ("xlnet", f"{LAYER}.rel_attn.v", (24, 3, 7)),
    *(
        (kind, f"{place}.{part}.{ending}", shape)
        for kind, place in (
            ("albert", ATTENTION),
            ("bert", "bert.encoder.layer.0.attention.self"),
        )
        for part in ("query", "value")
        for ending, shape in (("weight", ()), ("weight", (24,)), ("bias", ()), ("bias", (2, 24)))
    ),
    ("albert", f"{ATTENTION}.key.weight", (24, 23)),
]


@pytest.mark.parametrize("kind, name, shape", SHAPES, ids=str)
def test_a_tensor_of_another_shape_is_refused_by_its_name(refused, kind, name, shape):
    said = refused(kind, {}, {name: torch.zeros(shape)})
    assert f"have another shape in {name} {list(shape)} for " in said


def test_a_head_is_not_drawn_for_a_body_that_is_not_there(refused, written, monkeypatch):
    """262,144 features of one tiny tensor: its head alone were 275 GB."""

    def drawn(*_, **__):
        raise AssertionError("drawn before names and shapes were compared")

    monkeypatch.setattr(read, "drawn_weights", drawn)
    settings, _ = written["albert"]
    monkeypatch.setitem(written, "albert", (settings, {"embeddings.LayerNorm.bias": torch.ones(2)}))
    wide = {"hidden_size": 2**18, "embedding_size": 2**18, "num_attention_heads": 2**12}
    said = refused("albert", {**wide, "architectures": ["AlbertModel"]})
    assert "have another shape in" in said
    monkeypatch.setitem(written, "albert", (settings, {"embeddings.other": torch.ones(2)}))
    assert "the weights lack" in refused("albert", {**wide, "architectures": ["AlbertModel"]})


def test_the_largest_config_that_is_allowed_makes_no_dropout(refused):
    """Constants of dropout are 8 bytes a feature and place: 810 MB for 64 such layers."""
    wide = {"d_model": 2**18, "d_inner": 2**20, "n_layer": 64, "n_head": 2**12, "d_head": 64}
    assert "have another shape in" in refused("xlnet", {**wide, "dropout": 0.1})
