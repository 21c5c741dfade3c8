"""An export is proven before it exists, loads in transformers, and is refused where it would not be true."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from encoder.base.errors import ExportError
from encoder.models import hf
from encoder.models.hf import export_hf
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

SPECIALS = SimpleNamespace(cls_id=1, sep_id=2, pad_id=3, mask_id=4, unk_id=0)
CONFIG = ModernBertConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                          global_rope_theta=160000.0, initializer_range=0.2, max_position_embeddings=1024)


@pytest.fixture
def tokenizer_json(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(names + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                             special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    path = tmp_path / "shards" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def exported(tokenizer_json, out, **changes):
    values = dict(weights=ModernBertForMaskedLM(CONFIG, seed=2).state_dict(), config=CONFIG, tokenizer_json=tokenizer_json,
                  specials=SPECIALS, out=out, max_tokens=300)
    return export_hf(**{**values, **changes})


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_export_loads_in_transformers_with_the_same_logits_and_tokenizer(tokenizer_json, tmp_path):
    import transformers

    proof = exported(tokenizer_json, tmp_path / "out")
    assert proof.lengths == (1, 127, 128, 129, 130, 300) and proof.max_abs_difference <= 2e-5
    assert names_in(tmp_path) == ["out", "shards"]
    assert names_in(tmp_path / "out") == ["config.json", "export_proof.json", "model.safetensors", "tokenizer.json",
                                          "tokenizer_config.json"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer("a [MASK]b")
    assert set(asked) == {"input_ids", "attention_mask"}
    assert tokenizer.convert_ids_to_tokens(asked["input_ids"]) == ["[CLS]", "a", "[MASK]", "b", "[SEP]"]   # space taken
    assert tokenizer.model_max_length == 300 and tokenizer.pad_token_id == 3 and tokenizer.mask_token_id == 4
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.attention_dropout == 0.0 and model.config.max_position_embeddings == 1024
    assert torch.equal(model.decoder.weight, model.model.embeddings.tok_embeddings.weight)


def test_both_thetas_are_always_written_in_the_words_of_transformers_4_and_5():
    written = hf.hf_config(CONFIG, SPECIALS)
    assert (written["global_rope_theta"], written["local_rope_theta"]) == (160000.0, 10000.0)
    assert written["rope_parameters"]["full_attention"]["rope_theta"] == 160000.0
    assert written["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert written["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("wrong", [{"global_rope_theta": 10000.0, "rope_parameters": None}, {"local_attention": 64},
                                   {"hidden_activation": "silu"}])
def test_logits_that_differ_are_refused_and_nothing_is_left(tokenizer_json, tmp_path, monkeypatch, wrong):
    true_config = hf.hf_config
    monkeypatch.setattr(hf, "hf_config", lambda *a: {k: v for k, v in {**true_config(*a), **wrong}.items()
                                                     if v is not None})
    with pytest.raises(ExportError, match="transformers' logits differ from ours by .*Nothing was written"):
        exported(tokenizer_json, tmp_path / "out")
    assert names_in(tmp_path) == ["shards"]


def test_a_failed_export_leaves_the_earlier_one_and_a_good_one_replaces_it(tokenizer_json, tmp_path):
    out = tmp_path / "out"
    exported(tokenizer_json, out)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="max_tokens 2,000 is more than max_position_embeddings 1,024"):
        exported(tokenizer_json, out, max_tokens=2000)
    assert (out / "model.safetensors").read_bytes() == first
    exported(tokenizer_json, out, weights=ModernBertForMaskedLM(CONFIG, seed=3).state_dict(), max_tokens=20)
    assert (out / "model.safetensors").read_bytes() != first
    assert json.loads((out / "export_proof.json").read_text())["lengths"] == [1, 20]
    assert names_in(tmp_path) == ["out", "shards"]


def test_a_folder_of_something_else_is_never_touched(tokenizer_json, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="out is not empty and was not written by an export"):
        exported(tokenizer_json, out)
    with pytest.raises(ExportError, match="thesis.txt is a file; needed: a folder"):
        exported(tokenizer_json, out / "thesis.txt")
    assert names_in(tmp_path) == ["out", "shards"] and names_in(out) == ["thesis.txt"]


def test_weights_of_another_model_are_refused_by_name(tokenizer_json, tmp_path):
    weights = ModernBertForMaskedLM(CONFIG).state_dict()
    lacking = {k: v for k, v in weights.items() if k != "head.dense.weight"}
    for wrong, words in ((lacking, "the weights lack head.dense.weight"),
                         ({**weights, "head.dense.bias": torch.zeros(32)}, "the weights hold unknown head.dense.bias"),
                         ({**weights, "decoder.bias": torch.zeros(9)}, r"another shape in decoder.bias \[9\] for \[280\]")):
        with pytest.raises(ExportError, match=words):
            exported(tokenizer_json, tmp_path / "out", weights=wrong)
    assert names_in(tmp_path) == ["shards"]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tokenizer_json, tmp_path):
    with pytest.raises(ExportError, match="has no token mask 279; the model's vocabulary is 280"):
        exported(tokenizer_json, tmp_path / "out", specials=SimpleNamespace(**{**vars(SPECIALS), "mask_id": 279}))
    small = ModernBertConfig(**{**vars(CONFIG), "vocab_size": 200})
    with pytest.raises(ExportError, match="has ids up to 260; the model's vocabulary is 200"):
        exported(tokenizer_json, tmp_path / "out", config=small, weights=ModernBertForMaskedLM(small).state_dict())
    tokenizer_json.write_text("not json")
    with pytest.raises(ExportError, match="cannot be used as a tokenizer.json"):
        exported(tokenizer_json, tmp_path / "out")
    assert names_in(tmp_path) == ["shards"]
