"""BERT, RoBERTa and DistilBERT by the commands, from text to an answer: tokenizer, shards, plan, run, export, import, shrink."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from encoder.base.dist import World
from encoder.runs.config import read_run
from encoder.train.pretraining import pretrain
from launch import export_hf, fill_mask, import_hf, plan, shrink
from tests.helpers.prep import texts, write_jsonl
from tests.process.ranks import run_ranks

SIZES = (
    "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,"
    " max_position_embeddings: 64"
)
PHASE = "{tokens: 2K, max_tokens_per_document: 64, batch_tokens: 512, lr: 1.0e-3}"
RUN = """
name: {name}
out: {folder}/runs/{name}
data: {{sources: [{{path: {folder}/{shards}/text/train}}]{join}}}
{model}
objective: {{{objective}}}
phases: {phase}
loader: {{workers: 0}}
"""
TOKENIZERS = {
    "bert": ("--kind", "wordpiece", "--lowercase", "--vocab-size", 90),
    "roberta": ("--kind", "bpe", "--names", "roberta", "--vocab-size", 320),
}
RUNS = {
    "bert": dict(
        shards="bert", join="", model=f"model: {{system: bert, {SIZES}}}", objective="name: mlm_nsp"
    ),
    "roberta": dict(
        shards="roberta",
        join=", join: sentences",
        model=f"model: {{system: roberta, {SIZES}}}",
        objective="name: mlm, mask_count: round_at_random, mask_special_tokens: true",
    ),
    "distilbert": dict(
        shards="bert",
        join="",
        model="init_from: {folder}/weights/student",
        objective="name: distill, teacher: {folder}/weights/bert",
    ),
}


def said(command: Any, *words: object) -> str:
    """What a command printed; it must end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = command.main([str(word) for word in words])
    assert code == 0, f"{words} ended with {code}"
    return out.getvalue()


def all_families(world: World, *, folder: str) -> dict[str, dict[str, str]]:
    """By family what its commands printed."""
    root = Path(folder)
    prep = root / "prep.yaml"
    for family, options in TOKENIZERS.items():
        file = root / f"{family}.json"
        asked = ("--files", root / "a.jsonl", "--out", file)
        said(cli, "tokenizer", "train", *options, *asked)
        said(cli, "prepare", prep, f"tokenizer={file}", f"out={root / family}", "sentences=true")
    found = {}
    for name, words in RUNS.items():
        if name == "distilbert":
            said(import_hf, root / "hf/bert", root / "weights/bert")
            layers = ("--layers", "1", "--system", "distilbert")
            said(shrink, root / "weights/bert", root / "weights/student", *layers)
        run_file = root / f"{name}.yaml"
        words = {key: text.replace("{folder}", folder) for key, text in words.items()}
        run_file.write_text(RUN.format(name=name, folder=folder, phase=PHASE, **words))
        planned = said(plan, run_file)
        pretrain(read_run(run_file), world)
        exported = said(export_hf, root / "runs" / name, root / "hf" / name)
        mask = "<mask>" if name == "roberta" else "[MASK]"
        asked = (root / "hf" / name, f"the cat {mask} a dog", "the [MASK] house")
        found[name] = {
            "plan": planned,
            "export": exported,
            "answers": said(fill_mask, *asked),
        }
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, dict[str, str]]]:
    root = tmp_path_factory.mktemp("families")
    joined = [" ".join(texts(4, seed=i, longest=12)) for i in range(200)]
    write_jsonl(root / "a.jsonl", joined)
    source = "{name: text, format: jsonl, files: [a.jsonl]}"
    settings = f"tokenizer: none\nroot: {root}\nout: none\nheld_out_share: 0.1\nprocesses: 1\n"
    (root / "prep.yaml").write_text(f"{settings}sources: [{source}]\n")
    return root, run_ranks(all_families, 1, folder=str(root))[0]


CLASSES = {
    "bert": "BertForPreTraining",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_family_goes_from_text_to_answers_by_its_commands(made, name):
    root, found = made
    config = json.loads((root / "hf" / name / "config.json").read_text())
    assert config["architectures"] == [CLASSES[name]]
    assert "transformers gives the same logits" in found[name]["export"]
    # five answers for each text, whichever name its mask was asked by
    answers = found[name]["answers"].splitlines()
    assert len(answers) == 4 and all(line.count("%") == 5 for line in answers[1::2])
    joined = "blocks of whole sentences" in found[name]["plan"]
    assert joined == (name == "roberta")
