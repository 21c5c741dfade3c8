"""What Hugging Face and ModernBERT's own code hold comes in bit for bit, goes out again the same, and misfits are one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.base.errors import ExportError, ModelError, UserError
from encoder.models.hf.catalog import BRIDGES
from encoder.models.hf.composer import read_composer
from encoder.models.hf.modernbert import (
    HF_KEYS,
    MODERNBERT,
    NOT_IN_HF_CONFIG,
    OURS_ONLY,
    config_from_hf,
    hf_config,
)
from encoder.models.hf.read import DECODER, EMBEDDING, prove_import, read_hf
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import read_stored, write_stored
from encoder.runs.weights import read_model
from tests.helpers.composer import flexbert
from tests.helpers.hf import CONFIG, SPECIALS, exported, names_in, stored, write_tokenizer_json

SHAPE = dict(
    vocab_size=280,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    pad_token_id=3,
    cls_token_id=1,
    bos_token_id=1,
    sep_token_id=2,
    eos_token_id=2,
    max_position_embeddings=140,
)


@pytest.fixture
def tokenizer_json(tmp_path):
    return write_tokenizer_json(tmp_path / "shards" / "tokenizer.json")


@pytest.fixture
def folder(tmp_path, tokenizer_json):
    exported(tokenizer_json, tmp_path / "hf")
    return tmp_path / "hf"


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def saved(folder, **changes):
    """A random model as transformers itself saves it."""
    import transformers

    torch.manual_seed(1)
    config = transformers.ModernBertConfig(**{**SHAPE, **changes})
    model = transformers.ModernBertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(folder)
    return model


def test_export_import_export_gives_the_same_bytes(folder, tokenizer_json, tmp_path):
    model = read_hf(folder)
    assert (
        model.config == CONFIG
        and equal(model.weights, stored().weights)
        and model.max_tokens == 140
    )
    write_stored(model, tmp_path / "weights")
    again = read_stored(tmp_path / "weights")
    assert (
        again.config == model.config
        and again.origin == model.origin
        and again.tokenizer_json.is_file()
    )
    exported(again.tokenizer_json, tmp_path / "hf2", again)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf2" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "tie_word_embeddings": False,
            "hidden_activation": "silu",
            "norm_bias": True,
            "local_attention": 64,
            "classifier_bias": True,
            "attention_bias": True,
        },
    ],
    ids=["tied", "untied"],
)
def test_what_transformers_saved_comes_in_proven_and_goes_out_with_equal_tensors(
    tmp_path, tokenizer_json, changes
):
    theirs = saved(tmp_path / "hf", **changes).state_dict()
    model = read_hf(tmp_path / "hf")
    assert prove_import(model, tmp_path / "hf").lengths[-1] == 140
    assert (model.config.global_rope_theta, model.config.local_rope_theta) == (160_000.0, 10_000.0)
    assert model.config.window_radius_tokens == changes.get("local_attention", 128) // 2
    exported(tokenizer_json, tmp_path / "out", model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert equal({**written, DECODER: written.get(DECODER, written[EMBEDDING])}, theirs)


def test_the_defaults_of_config_json_are_those_of_transformers():
    import transformers

    said = json.loads(
        transformers.ModernBertConfig(architectures=["ModernBertForMaskedLM"]).to_json_string(
            use_diff=False
        )
    )
    bare = config_from_hf({"model_type": "modernbert"}, where="")
    assert config_from_hf(said, where="") == bare == ModernBertConfig(global_rope_theta=160_000.0)


def test_every_setting_of_ours_has_its_word_or_its_refusal():
    told = {
        *HF_KEYS,
        # one of its words follows from others
        *(OURS_ONLY.keys() - {"embedding_projection"}),
        NOT_IN_HF_CONFIG,
        "mlp",
        "attention_head_width",
        "window_radius_tokens",
        "global_attn_every_n_layers",
        "global_rope_theta",
        "local_rope_theta",
    }
    assert {f.name for f in dataclasses.fields(ModernBertConfig)} == told
    assert config_from_hf(hf_config(CONFIG, SPECIALS), where="") == CONFIG


def test_the_words_of_transformers_4_alone_and_of_5_alone_are_enough():
    both = hf_config(CONFIG, SPECIALS)
    four = {k: v for k, v in both.items() if k not in ("rope_parameters", "layer_types")}
    five = {
        k: v
        for k, v in both.items()
        if k not in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")
    }
    assert config_from_hf(four, where="") == config_from_hf(five, where="") == CONFIG
    assert (
        config_from_hf({**four, "local_rope_theta": None}, where="").local_rope_theta == 160_000.0
    )


@pytest.mark.parametrize(
    ("without", "put"),
    [
        (("rope_parameters", "layer_types"), {}),
        (("rope_parameters", "layer_types"), {"local_rope_theta": None}),
        (("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"), {}),
    ],
    ids=["4", "4, local as global", "5"],
)
def test_a_folder_in_the_words_of_either_transformers_is_proven_by_the_installed_one(
    folder, without, put
):
    path = folder / "config.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in {**json.loads(path.read_text()), **put}.items() if k not in without}
        )
    )
    model = read_hf(folder)
    assert model.config.local_rope_theta == (160_000.0 if put else 10_000.0)
    assert prove_import(model, folder).max_abs_difference <= 2e-5


ALWAYS_FULL = ["full_attention"] * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "is of a BertForMaskedLM; needed: ModernBertForMaskedLM",
        ),
        ({"architectures": ["ModernBertForCausalLM"]}, "is of a ModernBertForCausalLM; needed"),
        ({"model_type": "bert", "architectures": None}, "is of a bert; needed"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'; needed: gelu or silu"),
        ({"classifier_activation": "silu"}, "classifier_activation is 'silu'; needed: 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; needed: 0.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is .*; needed: None"),
        ({"local_attention": 127}, "local_attention is 127; needed: an even number"),
        ({"local_attention": -1}, "local_attention is -1; needed: an even number"),
        (
            {"local_rope_theta": -1, "rope_parameters": None},
            "local_rope_theta is -1; needed: above 0.* to 10000",
        ),
        (
            {"global_rope_theta": 10000.0},
            "global_rope_theta is 10000.0, but rope_parameters say 160000.0 for full_attention",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2}}},
            "hold rope_type 'yarn', factor 2; needed",
        ),
        (
            {"layer_types": ALWAYS_FULL},
            "layer_types is not full_attention at layers 0, 3, 6, ... of 4",
        ),
        (
            {"layer_types": ["sliding_attention"] * 4, "global_attn_every_n_layers": None},
            "layer_types is not full_attention",
        ),
        (
            {"global_attn_every_n_layers": 0, "layer_types": None},
            "global_attn_every_n_layers is 0; needed",
        ),
        (
            {"num_attention_heads": 5},
            (
                "32 over 5 heads gives a head width of 6.4; needed: an even whole number. Put the"
                " hidden_size"
            ),
        ),
        ({"head_dim": 8}, "head_dim is 8; needed: hidden_size / num_attention_heads, 16"),
        (
            {"architectures": ["ModernBertForMaskedLM", "X"]},
            "is of a ModernBertForMaskedLM, X; needed",
        ),
        ({"architectures": "ModernBertForMaskedLM"}, "needed: ModernBertForMaskedLM alone"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; needed: a mapping"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters is .*; needed: a mapping"),
        (
            {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
            "rope_parameters is .*; needed: a mapping of full_att",
        ),
        ({"rope_theta": 2e4}, "rope_theta is 20000.0, but global_rope_theta is 160000"),
        (
            {"global_rope_theta": True, "rope_parameters": None},
            "global_rope_theta is True; needed: above 0, and finite",
        ),
        (
            {"sliding_window": 4},
            "sliding_window is 4, which transformers 5 takes for half of local_attention 128",
        ),
        ({"is_causal": True}, "is_causal is True; needed: False"),
        ({"hidden_activation": ["gelu"]}, r"hidden_activation is \['gelu'\]"),
        ({"layer_types": 5}, "layer_types is 5; needed: a list"),
        (
            {"global_attn_every_n_layers": None, "layer_types": None},
            "global_attn_every_n_layers is None; needed",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is null; needed: a value"),
        ({"norm_eps": None}, "norm_eps is null"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
    ],
)
def test_a_config_that_our_model_cannot_be_is_refused_by_name(changes, words):
    with pytest.raises(ModelError, match=f"^x.json.*{words}"):
        config_from_hf({**hf_config(CONFIG, SPECIALS), **changes}, where="x.json")


def test_the_kind_of_each_layer_is_read_where_only_layer_types_say_it():
    said = {**hf_config(CONFIG, SPECIALS), "global_attn_every_n_layers": None}
    assert (
        config_from_hf({**said, "layer_types": ALWAYS_FULL}, where="").global_attn_every_n_layers
        == 1
    )
    first = ["full_attention", *["sliding_attention"] * 3]
    assert [
        config_from_hf({**said, "layer_types": first}, where="").is_local(i) for i in range(4)
    ] == [False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_fp32(folder, dtype):
    weights = {n: w.to(dtype) for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert equal(read_hf(folder).weights, {n: w.float() for n, w in weights.items()})


def test_weights_in_several_files_and_in_pytorch_model_bin_are_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert equal(read_hf(folder).weights, weights)
    names = sorted(weights)
    files = {n: f"model-{1 + (i % 2)}-of-2.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert equal(read_hf(folder).weights, weights)
    (folder / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match="model-1-of-2.safetensors cannot be read"):
        read_hf(folder)


def test_a_tensor_is_taken_only_from_the_file_that_the_index_names(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:9]}, folder / "a.safetensors")
    save_file(
        {n: weights[n] * (3 if n in names[:9] else 1) for n in names}, folder / "b.safetensors"
    )  # older copies beside
    index = folder / "model.safetensors.index.json"
    files = {n: "a.safetensors" if n in names[:9] else "b.safetensors" for n in names}
    index.write_text(json.dumps({"weight_map": files}))
    assert equal(read_hf(folder).weights, weights)
    for wrong in (5, ["a.safetensors"], "../hf/a.safetensors"):
        index.write_text(json.dumps({"weight_map": {**files, names[0]: wrong}}))
        with pytest.raises(ModelError, match="which .*; needed: the name of a file beside it"):
            read_hf(folder)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([1], "holds a list; needed"),
        (torch.ones(3), "holds a Tensor; needed"),
        ({"a": {"b": 1}}, "holds a dict under 'a'"),
        ({1: torch.ones(2)}, "holds a Tensor under 1"),
        ({"a": torch.ones(3).to_sparse()}, "holds a torch.sparse_coo tensor"),
    ],
)
def test_a_pickled_file_of_something_else_is_one_line(folder, held, words):
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"pytorch_model.bin {words}"):
        read_hf(folder)


def test_a_length_that_is_no_number_is_none_and_a_short_one_still_passes_the_window(folder):
    said = folder / "tokenizer_config.json"
    said.write_text('{"model_max_length": true}')
    assert read_hf(folder).max_tokens is None
    said.write_text('{"model_max_length": 2}')
    assert prove_import(read_hf(folder), folder).lengths == (1, 2, 127, 128, 129, 130)


def test_a_word_that_transformers_reads_otherwise_is_seen_on_drawn_weights(folder, monkeypatch):
    another = dataclasses.replace(
        MODERNBERT,
        from_settings=lambda values, where, names: dataclasses.replace(CONFIG, norm_eps=1e-6),
    )
    monkeypatch.setitem(BRIDGES, "modernbert", another)
    with pytest.raises(
        ModelError, match="config.json means another model to transformers than to us"
    ):
        read_model(folder)


def test_what_transformers_itself_cannot_run_is_one_line(folder, monkeypatch):
    from encoder.models.hf import read as hf_import

    model, theirs = read_hf(folder), hf_import.transformers_model

    def broken(*args, **named):
        found = theirs(*args, **named)
        del found.model.layers[1].mlp.Wo
        return found

    monkeypatch.setattr(hf_import, "transformers_model", broken)
    with pytest.raises(ExportError, match="loads the model but cannot run it: .*Wo"):
        prove_import(model, folder)


def test_a_stored_copy_of_the_embedding_is_dropped_and_another_decoder_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, DECODER: weights[EMBEDDING].clone()}, path)
    assert equal(read_hf(folder).weights, weights)
    save_file({**weights, DECODER: weights[EMBEDDING] + 1e-3}, path)
    with pytest.raises(ModelError, match="tie_word_embeddings is true, but decoder.weight is not"):
        read_hf(folder)


def test_a_folder_that_lacks_or_exceeds_is_named_by_its_first_three(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({n: w for n, w in weights.items() if ".mlp.Wi" not in n}, path)
    with pytest.raises(
        ModelError,
        match="hf: the weights lack model.layers.0.mlp.Wi.weight, .*2.mlp.Wi.weight and 1 more",
    ):
        read_hf(folder)
    save_file({**weights, "classifier.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="the weights hold unknown classifier.weight"):
        read_hf(folder)
    save_file({**weights, "decoder.bias": torch.zeros(9)}, path)
    with pytest.raises(ModelError, match=r"another shape in decoder.bias \[9\] for \[280\]"):
        read_hf(folder)
    save_file({n: w.to(torch.int8) for n, w in weights.items()}, path)
    with pytest.raises(ModelError, match="torch.int8"):
        read_hf(folder)
    path.write_bytes(b"short")
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        read_hf(folder)
    path.unlink()
    with pytest.raises(ModelError, match="but no model.safetensors"):
        read_hf(folder)


def test_a_model_is_read_from_a_weights_folder_and_a_hugging_face_folder_alike(folder, tmp_path):
    write_stored(stored(), tmp_path / "weights")
    assert equal(read_model(tmp_path / "weights").weights, read_model(folder).weights)
    said = tmp_path / "weights" / "model.yaml"
    said.write_text(said.read_text().replace("hidden_size: 32", "hidden_size: 36"))
    with pytest.raises(ModelError, match=r"another shape in model.*\[280, 32\] for \[280, 36\]"):
        read_model(tmp_path / "weights")
    (tmp_path / "weights" / "origin.json").unlink()
    with pytest.raises(ModelError, match="has no origin.json"):
        read_model(tmp_path / "weights")
    with pytest.raises(
        ModelError, match="shards holds tokenizer.json; needed: a run folder, a checkpoint"
    ):
        read_model(tmp_path / "shards")


@pytest.mark.parametrize("layout", ["composer", "state dict"])
def test_flexbert_names_come_in_with_the_shape_their_tensors_have(tmp_path, layout):
    weights = stored().weights
    path = tmp_path / "ep0-ba1-rank0.pt"
    torch.save(
        (
            {"state": {"model": flexbert(weights, "model.")}}
            if layout == "composer"
            else flexbert(weights)
        ),
        path,
    )
    model = read_composer(path, global_rope_theta=160_000.0, heads=2)
    assert equal(model.weights, weights)
    assert model.config == dataclasses.replace(
        CONFIG, max_position_embeddings=8192, initializer_range=0.02
    )
    assert (
        "2 heads, RoPE theta 160000 and 10000, layernorm, geglu, by its tensors and as told"
        in model.origin
    )
    assert (
        "not said by the file and assumed: local_rope_theta 10000.0, norm layernorm, mlp geglu"
        in model.origin
    )


def test_an_untied_flexbert_decoder_is_kept(tmp_path):
    model = stored(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    torch.save(
        {**flexbert(model.weights), "decoder.weight": model.weights[DECODER]}, tmp_path / "a.pt"
    )
    assert equal(
        read_composer(tmp_path / "a.pt", global_rope_theta=1e4, heads=2).weights, model.weights
    )


def test_a_flexbert_file_that_does_not_serve_is_one_line(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(flexbert(stored().weights), path)
    with pytest.raises(ModelError, match="does not say its RoPE thetas.*--global-rope-theta 10000"):
        read_composer(path, global_rope_theta=None)
    torch.save({"state": {"model": flexbert(stored().weights), "timestamp": SPECIALS}}, path)
    with pytest.raises(
        ModelError,
        match="holds .*SpecialIds beside tensors.*torch.save the state dict alone",
    ):
        read_composer(path, global_rope_theta=1e4)
    torch.save(stored().weights, path)
    with pytest.raises(ModelError, match="holds decoder.bias, .*; needed: FlexBERT's names"):
        read_composer(path, global_rope_theta=1e4)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ModelError, match="holds no tensors by name"):
        read_composer(path, global_rope_theta=1e4)
    torch.save(flexbert(stored().weights), path)
    with pytest.raises(ModelError, match="32 over 5 heads.*--heads"):
        read_composer(path, global_rope_theta=1e4, heads=5)
    with pytest.raises(ModelError, match="--heads is 0; needed: at least 1"):
        read_composer(path, global_rope_theta=1e4, heads=0)
    with pytest.raises(
        ModelError, match="32 features are no whole number of heads of 64.*Give --heads"
    ):
        read_composer(path, global_rope_theta=1e4)
    for theta in (float("nan"), float("inf"), -1.0):
        with pytest.raises(
            ModelError, match=r"^--local-rope-theta is .*; needed: above 0, and finite"
        ):
            read_composer(path, global_rope_theta=1e4, local_rope_theta=theta)
    path.write_text("not a checkpoint")
    with pytest.raises(ModelError, match="a.pt cannot be read"):
        read_composer(path, global_rope_theta=1e4)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (1, torch.ones(2), "holds a Tensor under 1"),
        ("bert.encoder.layers.foo.x", torch.ones(1), "has a layer 'foo'"),
        (
            "bert.embeddings.tok_embeddings.weight",
            torch.ones(5),
            r"tok_embeddings.weight is \[5\]; needed: a matrix",
        ),
        (
            "bert.encoder.layers.0.mlp.Wo.weight",
            torch.ones(5),
            r"mlp.Wo.weight is \[5\]; needed: a matrix",
        ),
        (
            "head.norm.weight",
            torch.ones(32).to_sparse(),
            "holds a torch.sparse_coo tensor under 'head.norm.weight'",
        ),
    ],
)
def test_a_flexbert_file_with_one_strange_tensor_is_one_line(tmp_path, name, tensor, words):
    torch.save({**flexbert(stored().weights), name: tensor}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=f"a.pt.*{words}"):
        read_composer(tmp_path / "a.pt", global_rope_theta=1e4, heads=2)


def test_a_write_that_fails_leaves_nothing_and_keeps_the_earlier_folder(tmp_path, monkeypatch):
    from encoder.models import stored as room

    write_stored(stored(), tmp_path / "weights")
    monkeypatch.setattr(room, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    for name in ("weights", "other"):
        with pytest.raises(KeyboardInterrupt):
            write_stored(stored(seed=3), tmp_path / name)
    assert names_in(tmp_path) == ["weights"] and equal(
        read_stored(tmp_path / "weights").weights, stored().weights
    )


def test_a_weights_folder_is_not_replaced_with_what_a_person_put_there(tmp_path):
    write_stored(stored(), tmp_path / "weights")
    write_stored(stored(seed=3), tmp_path / "weights")
    (tmp_path / "weights" / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match="weights holds notes.txt, which this command did not write"
    ):
        write_stored(stored(), tmp_path / "weights")
    assert (tmp_path / "weights" / "notes.txt").read_text() == "mine" and names_in(tmp_path) == [
        "weights"
    ]
    assert equal(read_stored(tmp_path / "weights").weights, stored(seed=3).weights)
