"""What a notebook asks of the library: transformers' numbers, clear refusals, and a page whose every block runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import encoder
from encoder.base.dist import World
from encoder.base.errors import ConfigError, ModelError, ShardError, UserError
from encoder.models.stored import write_stored
from encoder.tools import notebook
from encoder.tools.weights.card import checkpoint_of
from encoder.tools.weights.export import export_run, unfinished_text
from encoder.train.pretraining import pretrain
from tests.helpers.hf import exported, stored, write_tokenizer_json
from tests.helpers.prep import run as data_prep
from tests.helpers.prep import settings, texts, write_jsonl
from tests.helpers.shards import random_documents, write_source

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S
)
RUN = """
name: small
out: {root}/runs/small
seed: 1
model: {{system: modernbert, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
        max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/shards/own_text/text/train}}], row_tokens: 64, window_documents: 16}}
phases: [{{name: a, tokens: 1K, max_tokens_per_document: 64, batch_tokens: 256, lr: 1e-3}}]
engine: {{precision: fp32}}
loader: {{workers: 0}}
"""
TEXTS = ["a", "every letter of a [MASK] counts", "", "x" * 138, "two [MASK][MASK] and [SEP] inside"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of letters as a Hugging Face folder and as a weights folder."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_json = write_tokenizer_json(root / "tokenizer.json")
    exported(tokenizer_json, root / "hf")
    write_stored(dataclasses.replace(stored(), tokenizer_json=tokenizer_json), root / "weights")
    write_stored(stored(), root / "bare")
    return root


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The folders that docs/python.md names: shards, a run on them, and its export."""
    root = tmp_path_factory.mktemp("desk")
    write_jsonl(root / "a.jsonl", texts(200))
    sources = [{"name": "text", "format": "jsonl", "files": ["a.jsonl"]}]
    assert data_prep("prepare", settings(root, sources), f"out={root / 'shards' / 'own_text'}") == 0
    (root / "run.yaml").write_text(RUN.format(root=root))
    assert pretrain(encoder.read_run(root / "run.yaml"), World()).done
    export_run(root / "runs" / "small", root / "hf" / "small")
    return root


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_the_page_runs_and_has_at_most_five_lines(
    desk, number, monkeypatch, tmp_path
):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    block = tmp_path / "block.py"
    block.write_text(BLOCKS[number], encoding="utf-8")
    assert len([line for line in BLOCKS[number].splitlines() if line.strip()]) <= 5
    runpy.run_path(str(block))


def test_an_export_says_of_a_run_that_it_is_not_at_its_end(desk, tmp_path):
    run = desk / "runs" / "small"
    assert unfinished_text(run, checkpoint_of(run)) is None
    assert checkpoint_of(desk / "hf" / "small") is None
    assert unfinished_text(checkpoint_of(run), checkpoint_of(run)) is None
    stopped = shutil.copytree(run, tmp_path / "stopped")
    (stopped / "done.json").unlink()
    assert re.search(
        r"not trained to its end: step \d+, .* of 1K tokens",
        unfinished_text(stopped, checkpoint_of(stopped)),
    )


def test_the_page_shows_each_thing_that_a_notebook_may_ask():
    page = "".join(BLOCKS)
    for name in (
        "preset(",
        "load(",
        ".hidden_states(",
        ".logits(",
        "metrics(",
        "open_shards(",
        ".decode(",
        "UserError",
    ):
        assert name in page, name


def test_logits_and_hidden_states_are_those_of_transformers(place):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "hf")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(
        place / "hf", attn_implementation="sdpa"
    ).eval()
    for folder in ("hf", "weights"):
        bert = encoder.load(place / folder)
        for text, x_TC, logits_TV in zip(
            TEXTS, bert.hidden_states(TEXTS), bert.logits(TEXTS), strict=True
        ):
            inputs = tokenizer(text, return_tensors="pt")
            assert bert.tokenizer.encode(text).ids == inputs["input_ids"][0].tolist()
            with torch.no_grad():
                expected = theirs.model(**inputs).last_hidden_state[0]
                assert float((x_TC - expected).abs().max()) <= 1e-5
                assert float((logits_TV - theirs(**inputs).logits[0]).abs().max()) <= 2e-5


def test_texts_keep_their_states_however_many_share_a_forward(place, monkeypatch):
    bert = encoder.load(place / "hf")
    monkeypatch.setattr(notebook, "FORWARD_TOKENS", 40)
    asked = []
    hidden_states = bert.model.hidden_states

    def counted(batch):
        asked.append(batch.cu_seqlens_S1.diff().tolist())
        return hidden_states(batch)

    monkeypatch.setattr(bert.model, "hidden_states", counted)
    found = bert.hidden_states(["a" * 18, "b" * 18, "c", "d" * 60, "e"])
    assert asked == [[20, 20], [3], [62], [3]] and [len(x) for x in found] == [20, 20, 3, 62, 3]
    monkeypatch.setattr(notebook, "FORWARD_TOKENS", 8192)
    together = bert.hidden_states(["a" * 18, "b" * 18, "c", "d" * 60, "e"])
    assert asked[4:] == [[20, 20, 3, 62, 3]]
    assert max(float((a - b).abs().max()) for a, b in zip(found, together, strict=True)) <= 1e-5
    assert bert.hidden_states([]) == bert.logits([]) == []


def test_states_hold_no_gradients_but_train_a_probe(place):
    bert = encoder.load(place / "hf")
    x_TC, other_TC = bert.hidden_states(["ab", "a longer text"])
    assert not x_TC.requires_grad and x_TC.dtype == torch.float32 and not bert.model.training
    assert (
        x_TC.untyped_storage().nbytes() == x_TC.numel() * 4
    )  # saved alone, it is not saved with the others
    probe = torch.nn.Linear(32, 1)
    probe(other_TC).sum().backward()
    assert probe.weight.grad is not None


def test_a_run_and_its_export_give_the_same_logits(desk):
    text = "the cat [MASK] the dog"
    one, other = (encoder.load(desk / name) for name in ("runs/small", "hf/small"))
    assert one.tokenizer.encode(text).ids == other.tokenizer.encode(text).ids
    assert torch.equal(one.logits([text])[0], other.logits([text])[0])
    assert one.max_tokens == other.max_tokens == 64 and one.origin.startswith(
        "run small, checkpoint "
    )
    assert repr(one) == f"LoadedModel(origin={one.origin!r}, max_tokens=64)"
    checkpoint = next((desk / "runs/small/checkpoints").iterdir())
    assert torch.equal(encoder.load(str(checkpoint)).logits([text])[0], one.logits([text])[0])


def test_what_cannot_be_asked_is_one_sentence(place):
    bert = encoder.load(place / "hf")
    with pytest.raises(
        UserError,
        match=r"^texts\[1\] has 141 tokens, \[CLS\] and \[SEP\] among them; needed: at most 140",
    ):
        bert.hidden_states(["a", "b" * 139])
    with pytest.raises(
        UserError, match=r"^texts is one text, 'a text'; needed: a list of texts. Write \[text\].$"
    ):
        bert.logits("a text")
    with pytest.raises(
        ModelError,
        match=r"bare has no tokenizer.json; needed: .*encoder.load\(path, tokenizer=FILE\)",
    ):
        encoder.load(place / "bare")
    given = encoder.load(place / "bare", tokenizer=place / "tokenizer.json")
    assert torch.equal(given.logits(["a"])[0], bert.logits(["a"])[0])
    with pytest.raises(ModelError, match="does not exist; needed: a run folder"):
        encoder.load(place / "nowhere")


def test_a_preset_is_the_published_shape_with_settings_put_over():
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    one, same, other = (encoder.preset("modernbert_17m", seed=seed, **small) for seed in (1, 1, 2))
    assert (
        one.config.num_hidden_layers == encoder.PRESETS["modernbert_17m"]["num_hidden_layers"] == 7
    )
    assert (one.config.hidden_size, one.config.initializer_range) == (32, 0.03953) and one.training
    weights = [model.state_dict()["model.layers.3.mlp.Wi.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(
        ConfigError, match="^there is no preset 'modernbert_bass'. Did you mean modernbert_base"
    ):
        encoder.preset("modernbert_bass")
    with pytest.raises(ConfigError, match="hiden_size is unknown. Did you mean hidden_size"):
        encoder.preset("modernbert_17m", hiden_size=32)


def test_metrics_are_columns_of_equal_length(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "phase": "a", "loss": 3.0, "spent": {"training": 2.0}}\n{"step": 1, "phase":'
        ' "a", "loss": 4.0, "spent": {"training": 1.0}}\n{"step": 2, "phase": "a", "held_out_loss":'
        ' 3.5, "spent": {"training": 2.5}}\n{"step": 3, "pha'
    )
    assert encoder.metrics(tmp_path) == {
        "step": [1, 2],
        "phase": ["a", "a"],
        "loss": [4.0, 3.0],
        "spent.training": [1.0, 2.5],
        "held_out_loss": [None, 3.5],
    }
    with pytest.raises(
        UserError, match=r"none holds no metrics.jsonl .*needed: the folder of a run that has begun"
    ):
        encoder.metrics(tmp_path / "none")


def test_the_metrics_of_a_run_are_a_table_for_pandas(desk):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(encoder.metrics(desk / "runs" / "small"))
    assert table["step"].tolist() == list(range(len(table))) and len(table) > 3
    assert table["loss"].isna().tolist() == [True] + [False] * (
        len(table) - 1
    )  # step 0 is evaluated, not trained
    assert table["tokens"].iloc[-1] >= 1000 and table["spent.training"].is_monotonic_increasing


def test_shards_are_a_sequence_of_documents_with_their_text(tmp_path):
    documents = random_documents(30, seed=3)
    shards = encoder.open_shards(write_source(tmp_path / "source", documents, shard_bytes=1024))
    assert len(shards) == 30 and shards.lengths.tolist() == [len(d) for d in documents]
    assert [ids.tolist() for ids in shards] == [d.tolist() for d in documents]
    assert shards[-1].tolist() == documents[-1].tolist() and shards[3].dtype == np.int64
    assert torch.from_numpy(shards[3]).tolist() == shards[np.int64(3)].tolist()
    words = [f"t{i}" for i in documents[3][1:-1]]
    assert shards.decode(3).split() == ["[CLS]", *words, "[SEP]"]
    assert repr(shards) == f"Shards(path={str(tmp_path / 'source')!r})"
    for wrong in (30, -31):
        with pytest.raises(IndexError):
            shards[wrong]


def test_shards_that_cannot_be_decoded_are_refused(tmp_path):
    source = write_source(tmp_path / "source", random_documents(3))
    with pytest.raises(ConfigError, match="lies elsewhere. Add cache: FOLDER"):
        encoder.open_shards("s3://bucket/source")
    cached = encoder.open_shards(f"file://{source}", cache=tmp_path / "cache")
    assert cached.decode(1) == encoder.open_shards(source).decode(1)
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ShardError, match="tokenizer.json is not the one that made these ids"):
        encoder.open_shards(source)
    with pytest.raises(ShardError, match="does not exist; needed: a folder of shards"):
        encoder.open_shards(tmp_path / "nowhere")


def test_type_checkers_see_the_names_that_the_library_has():
    tree = ast.parse((ROOT / "encoder" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == encoder._ROOMS and set(encoder.__all__) == {"__version__", *seen}
    assert all(hasattr(importlib.import_module(module), name) for name, module in seen.items())


def test_shards_and_metrics_need_no_training_engine():
    code = (
        "import encoder, sys; encoder.metrics; encoder.load; encoder.open_shards\nassert not"
        " {'deepspeed', 'transformers', 'pandas', 'wandb'} & set(sys.modules), set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
