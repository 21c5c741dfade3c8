"""ELECTRA and ModernBERT of two networks to transformers' classes and back, and as the start of a task."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from encoder.base.errors import ExportError, ModelError
from encoder.models.catalog import build_model, networks_of
from encoder.models.electra import ElectraConfig, ElectraDiscriminatorConfig, ModernBertRtdConfig
from encoder.models.hf.catalog import export_blocker
from encoder.models.hf.parity import drawn_difference, our_model
from encoder.models.hf.read import prove_import, read_hf
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, check_weights, network_of, read_stored, write_stored
from encoder.models.with_task import HeadShape, TaskModel, first_weights
from encoder.tools.weights.export import export_run
from tests.helpers.hf import SPECIALS, exported, names_in, write_tokenizer_json

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=280,
    hidden_size=36,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
)
ELECTRA = ElectraConfig(**SIZES, embedding_size=16)
MODERNBERT = ModernBertRtdConfig(**SIZES, generator_layers=2)
# name -> both networks, which of them, and its class in transformers
FOLDERS = {
    "discriminator": (ELECTRA, "discriminator", "ElectraForPreTraining"),
    "generator": (ELECTRA, "generator", "ElectraForMaskedLM"),
    "differences": (
        replace(ELECTRA, embedding_size=None, embedding_sharing="difference", mlp="gelu_tanh"),
        "discriminator",
        "ElectraForPreTraining",
    ),
    "modernbert": (MODERNBERT, "discriminator", "ModernBertForTokenClassification"),
    "its generator": (MODERNBERT, "generator", "ModernBertForMaskedLM"),
}
BACK = ("discriminator", "generator", "differences")


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


def network(name: str) -> StoredModel:
    config, which, _ = FOLDERS[name]
    return network_of(stored(config), which)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    return write_tokenizer_json(tmp_path_factory.mktemp("shards") / "tokenizer.json")


@pytest.fixture(scope="module")
def folders(tokenizer_json, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for name in FOLDERS:
        exported(tokenizer_json, root / name, network(name))
    return root


@pytest.mark.parametrize("name", FOLDERS)
def test_each_network_is_its_class_and_comes_back_to_the_bit(name, folders):
    folder, expected = folders / name, network(name)
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == [FOLDERS[name][2]]
    proof = json.loads((folder / "export_proof.json").read_text())
    assert proof["drawn_weights_fp64_difference"] < 1e-11
    assert proof["transformers"]["max_abs_difference"] < 1e-4
    model = read_hf(folder)
    # ModernBERT's discriminator is a class for a task: its body is read, a decoder drawn
    assert (model.config == expected.config) == (name in BACK)
    kept = model.weights.keys() & expected.weights.keys()
    assert all(torch.equal(model.weights[n], expected.weights[n]) for n in kept)
    assert {n for n in expected.weights if n.startswith("model.")} <= kept
    assert bool(model.drawn) == (name == "modernbert")
    assert prove_import(model, folder).max_abs_difference < 1e-4


@pytest.mark.parametrize("name", BACK)
def test_what_transformers_saves_again_comes_back_to_the_bit(name, folders, tmp_path):
    theirs = getattr(transformers, FOLDERS[name][2]).from_pretrained(folders / name)
    theirs.save_pretrained(tmp_path / "again")
    model, expected = read_hf(tmp_path / "again"), network(name)
    assert model.config == expected.config
    assert all(torch.equal(model.weights[n], w) for n, w in expected.weights.items())


def test_a_body_alone_is_a_discriminators_and_gets_a_drawn_head(folders, tmp_path):
    body = transformers.AutoModel.from_pretrained(folders / "discriminator")
    body.save_pretrained(tmp_path / "body")
    model, expected = read_hf(tmp_path / "body"), network("discriminator").weights
    assert type(model.config) is ElectraDiscriminatorConfig
    assert {n.rpartition(".")[0] for n in model.drawn} == {"head.dense", "classifier"}
    same = [n for n in expected if n.startswith("model.")]
    assert same and all(torch.equal(model.weights[n], expected[n]) for n in same)


@pytest.mark.parametrize("name", ["discriminator", "modernbert"])
def test_the_discriminators_body_starts_a_classifier_in_transformers_and_here(name, folders):
    """The logits of both are compared once fine-tuned (tests/unit/models/test_hf_task.py)."""
    # ModernBERT's folder has a classifier of one output
    made, notes = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders / name, num_labels=3, output_loading_info=True, ignore_mismatched_sizes=True
    )
    lost = {n for n in notes["missing_keys"] if not n.startswith("classifier.")}
    assert not lost
    ids = torch.arange(5, 25)[None]
    assert made(ids).logits.shape == (1, 3)

    model = network(name)
    family = "electra" if name == "discriminator" else "modernbert"
    shape = HeadShape(family=family, outputs=1)
    with torch.device("meta"):
        task = TaskModel(model.config, shape, seed=0)
    weights, drawn = first_weights(model.weights, task)
    # one output as well, and of another meaning
    assert {"classifier.weight", "classifier.bias"} <= {*drawn}
    assert ("head.dense.weight" in drawn) == (name == "discriminator")
    assert torch.equal(
        weights["model.layers.0.attn.Wqkv.weight"], model.weights["model.layers.0.attn.Wqkv.weight"]
    )


def test_the_command_writes_the_discriminator_or_the_network_that_is_named(
    tokenizer_json, tmp_path
):
    both = replace(stored(ELECTRA), tokenizer_json=tokenizer_json)
    write_stored(both, tmp_path / "both")
    assert read_stored(tmp_path / "both").config == ELECTRA
    export_run(tmp_path / "both", tmp_path / "used")
    export_run(tmp_path / "both", tmp_path / "small", network="generator")
    for folder, class_name in (("used", "ElectraForPreTraining"), ("small", "ElectraForMaskedLM")):
        said = json.loads((tmp_path / folder / "config.json").read_text())
        assert said["architectures"] == [class_name]
    card = (tmp_path / "used" / "README.md").read_text()
    assert "AutoModelForPreTraining" in card and "fill-mask" not in card
    with pytest.raises(ExportError, match="no such network; needed: discriminator or generator"):
        export_run(tmp_path / "both", tmp_path / "none", network="teacher")
    alone = replace(network("generator"), tokenizer_json=tokenizer_json)
    write_stored(alone, tmp_path / "one")
    with pytest.raises(ExportError, match="--network generator has no effect"):
        export_run(tmp_path / "one", tmp_path / "none", network="generator")
    assert "none" not in names_in(tmp_path)


# what a discriminator has of its own is one logit: the way there is BERT's
@pytest.mark.slow
def test_a_discriminator_goes_to_onnx(tokenizer_json, tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    proofs = exported(tokenizer_json, tmp_path / "out", network("discriminator"), onnx=True)
    assert proofs["onnxruntime"].max_abs_difference < 1e-3


def test_a_generator_fills_in_and_a_discriminator_has_one_logit(folders):
    pipe = transformers.pipeline("fill-mask", model=str(folders / "generator"), device="cpu")
    assert len(pipe("a [MASK] b")) == 5
    found = network("discriminator")
    assert our_model(found.weights, found.config).decode(torch.zeros(4, 36)).shape == (4, 1)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("generator", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; needed: gelu for a"),
        ("generator", {"architectures": ["ElectraForCausalLM"]}, "needed: one of"),
        ("discriminator", {"embedding_size": 24}, "have another shape in"),
        ("discriminator", {"embedding_size": None}, "embedding_size is null"),
        ("discriminator", {"num_attention_heads": 5}, "hidden_size 36 over 5 heads"),
    ],
)
def test_what_our_model_cannot_be_is_one_sentence(name, changes, words, folders, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(folders / name, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=words):
        read_hf(folder)


def test_what_transformers_has_no_word_for_is_refused_by_name():
    tanh = replace(ELECTRA, mlp="gelu_tanh")
    # the discriminator is what goes there by default, and has its word
    assert export_blocker(tanh) is None
    assert "mlp gelu_tanh (needed: gelu)" in export_blocker(tanh.generator)
    narrow = replace(MODERNBERT, generator_fraction=1 / 3)
    assert "embedding_projection True" in export_blocker(narrow.generator)
    assert export_blocker(narrow) is None
    assert "norm_place pre" in export_blocker(replace(ELECTRA, norm_place="pre"))


def test_a_wrong_word_of_config_json_shows_on_drawn_weights():
    from encoder.models.hf.catalog import bridge_of

    for config in networks_of(ELECTRA).values():
        said = bridge_of(config, SPECIALS).to_settings(config, SPECIALS)
        assert drawn_difference(said, config) < 1e-11
        assert drawn_difference({**said, "hidden_act": "gelu_new"}, config) > 1e-6
        assert drawn_difference({**said, "layer_norm_eps": 1e-3}, config) > 1e-5


def test_both_networks_of_a_stored_model_fit_their_settings():
    for config in (ELECTRA, FOLDERS["differences"][0], MODERNBERT):
        for name in networks_of(config):
            one = network_of(stored(config), name)
            check_weights(one.weights, one.config, of=name)
    # a model of one network stays as it is
    plain = stored(ModernBertConfig(**SIZES))
    assert network_of(plain, "generator") is plain
