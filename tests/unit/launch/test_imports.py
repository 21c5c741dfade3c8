"""What commands import: torch takes 2 s of CPU, its compiler 1.5, DeepSpeed 1, transformers 4. Each waits until it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.prep import settings, write_jsonl
from tests.helpers.shards import random_documents, write_source
from tests.unit.launch.test_bad_input import run_file

ROOT = Path(__file__).resolve().parents[3]
ALWAYS_LATER = (
    "datasets",
    "deepspeed",
    "gradio",
    "matplotlib",
    "pandas",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "streaming",
    "transformers",
    "wandb",
)
COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "triton")
# what a fresh interpreter does, one after another: what it may not have imported by then
FORBIDDEN = {
    "names": (*ALWAYS_LATER, *COMPILER, "torch", "numpy", "yaml"),
    "help": (*ALWAYS_LATER, *COMPILER, "torch", "numpy"),
    "prepare": (*ALWAYS_LATER, *COMPILER, "torch"),
    "mistake": (*ALWAYS_LATER, *COMPILER),
    # ZeRO stage 3, fine-tuning and every reader of weights build a model without data
    "model": (*ALWAYS_LATER, *COMPILER),
    # activations are counted on a few real tokens: tensors without data would ask torch's compiler
    "plan": (*ALWAYS_LATER, *COMPILER),
}
SCRIPT = """
import contextlib, importlib, io, json, sys

found = {}


def ends(what, code, call):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            ended = call()
        except SystemExit as ending:
            ended = ending.code
    assert (ended or 0) == code, (what, ended, said.getvalue()[-2000:])


import encoder
assert encoder.__version__ and issubclass(encoder.UserError, Exception)
found["names"] = [*sys.modules]

from data_prep import cli
from launch import tessera
for verb in tessera.VERBS:
    ends(verb, 0, lambda: tessera.main([verb, "--help"]))
ends("help", 0, lambda: tessera.main(["--help"]))
ends("new", 0, lambda: tessera.main(["new", "tiny"]))
ends("new", 0, lambda: tessera.main(["new", "--list"]))
for words in ([], ["prepare"], ["plan"], ["tokenizer", "train"], ["verify"], ["report"]):
    ends(words, 0, lambda: cli.main([*words, "--help"]))
found["help"] = [*sys.modules]

prep, run = sys.argv[1:]
ends("prepare", 0, lambda: cli.main(["prepare", prep]))
found["prepare"] = [*sys.modules]

ends("mistake", 2, lambda: tessera.main(["pretrain", run, "engine.zero_stge=1"]))
assert callable(encoder.read_run)
found["mistake"] = [*sys.modules]

import torch
from encoder.models.catalog import build_model
with torch.device("meta"):
    build_model(encoder.read_run(run).model, seed=1)
found["model"] = [*sys.modules]

ends("plan", 0, lambda: tessera.main(["plan", run]))
found["plan"] = [*sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, list[str]]:
    """All modules after each, of one interpreter."""
    root = tmp_path_factory.mktemp("imports")
    (root / "text").mkdir()
    write_jsonl(root / "text/a.jsonl", ["the cat sees a house"] * 20)
    prep = settings(root / "text", held_out_share=0.0)
    shards = write_source(root / "shards", random_documents(60, longest=40), vocab_size=64)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(prep), str(run_file(root, shards))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_command_imports_no_library_before_it_is_used(imported, what):
    assert sorted({*FORBIDDEN[what]} & {*imported[what]}) == []
